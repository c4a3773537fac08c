"""From `repeat` to training: counted exactly, stored once, read as often as asked in each pass."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puna.core.artifact import Artifact, write_record
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.compose import ComposeConfig, compose_documents
from puna.data.testing import folder_bytes, kept_rows, make_documents
from puna.tokens.count import CountConfig, count_tokens
from puna.tokens.encode import EncodeConfig, encode_documents
from puna.tokens.loader import PackedLoader
from puna.tokens.shards import REPEATS_FILE, TokenShards
from puna.tokens.train import TokenizerTrainingConfig, train_tokenizer

WORDS = ["alpha", "beta", "gamma", "délta", "日本", "épsilon", "return", "if", "else", "12"]
SEQ_LEN = 64


def done(folder, stage):
    write_record(folder, {"stage": stage, "fingerprint": "f", "config": {}, "metrics": {}})
    return Artifact(folder)


def stage(function, cfg, root, name, **inputs):
    (root / name).mkdir()
    metrics = function(cfg, inputs, root / name, Ledger(None))
    return done(root / name, name), metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """data.split, tokens.train, tokens.count, data.compose (2.5 and 0.5 times), tokens.encode."""
    root = tmp_path_factory.mktemp("repeat")
    random = np.random.default_rng(2)
    texts = [
        (("web", "code")[i % 2], f"{i}", " ".join(random.choice(WORDS, random.integers(5, 80))))
        for i in range(80)
    ]
    extra = {"split": ["heldout" if i % 8 > 5 else "train" for i in range(80)]}
    documents = make_documents(
        root / "data.split", texts, n_shards=3, stage="data.split", extra=extra
    )
    cfg = TokenizerTrainingConfig(vocab_size=300, n_special=12)
    tokenizer, _ = stage(train_tokenizer, cfg, root, "tokens.train", documents=documents)
    counted, _ = stage(count_tokens, CountConfig(workers=1), root, "tokens.count",
                       documents=documents, tokenizer=tokenizer)  # fmt: skip
    groups = [{"match": {"source": "code"}, "repeat": 2.5}, {"match": {"source": "web"},
                                                             "rate": 0.5}]  # fmt: skip
    compose = ComposeConfig(workers=1, groups=groups)
    composed, metrics = stage(compose_documents, compose, root, "data.compose", documents=counted)
    stage(encode_documents, EncodeConfig(workers=1), root, "tokens.encode", documents=composed,
          tokenizer=tokenizer)  # fmt: skip
    return root, metrics


def test_counts_are_those_of_the_shards(run):
    root, metrics = run
    shards = TokenShards(root / "tokens.encode")
    rows = kept_rows(root / "data.compose")
    assert metrics["token_counts"] == "tokenizer"
    for split in shards.splits:
        for source in shards.counts(split):
            shard = shards.open(split, source)
            mine = sorted(
                (row for row in rows if (row["split"], row["source"]) == (split, source)),
                key=lambda row: row["id"],
            )
            assert [row["n_tokens"] for row in mine] == np.diff(shard.offsets).tolist()
            assert shard.n_tokens_read == sum(row["n_tokens"] * row["repeat"] for row in mine)
    assert metrics["train_tokens"] == sum(
        shards.open("train", source).n_tokens_read for source in shards.counts("train")
    )


def test_nothing_is_stored_twice_and_held_out_documents_are_read_once(run):
    root, _ = run
    rows = kept_rows(root / "data.compose")
    shards = TokenShards(root / "tokens.encode")
    code = shards.open("train", "code")
    assert len(set(code.ids.tolist())) == code.n_docs
    assert set(code.repeats.tolist()) == {2, 3}
    assert shards.open("train", "web").repeats is None
    assert not list((root / "tokens.encode" / "heldout").rglob(REPEATS_FILE))
    heldout = {row["id"] for row in rows if row["split"] == "heldout"}
    stored = {i.decode() for s in ("web", "code") for i in shards.open("heldout", s).ids.tolist()}
    assert stored == heldout
    assert len(heldout) == 20


def test_a_pass_reads_every_token_as_often_as_asked(run):
    root, _ = run
    loader = PackedLoader(root / "tokens.encode", "train", {"code": 1, "web": 0}, SEQ_LEN, 1, 5)
    shard = loader.shards.open("train", "code")
    repeats = dict(zip(shard.ids.tolist(), shard.repeats.tolist(), strict=True))
    n_rows = -(-shard.n_tokens_read // SEQ_LEN)
    seen = Counter()
    read = 0
    for step in range(n_rows):
        for segment in loader.lineage(step)[0]["segments"]:
            if segment["epoch"] == 0:
                start, end = segment["tokens"]
                read += end - start
                seen.update((segment["document_id"].encode(), at) for at in range(start, end))
    assert read == shard.n_tokens_read
    lengths = dict(zip(shard.ids.tolist(), np.diff(shard.offsets).tolist(), strict=True))
    assert seen == {(i, at): repeats[i] for i, n in lengths.items() for at in range(n)}
    assert loader.epochs(n_rows)["code"] == n_rows * SEQ_LEN / shard.n_tokens_read


def test_without_weights_sources_count_with_their_repetitions(run):
    root, _ = run
    loader = PackedLoader(root / "tokens.encode", "train", None, SEQ_LEN, 4, 0)
    shards = loader.shards
    read = {one: shards.open("train", one).n_tokens_read for one in ("code", "web")}
    total = sum(read.values())
    assert loader.weights == pytest.approx({k: n / total for k, n in read.items()}, abs=1e-5)


def test_more_workers_write_the_same_bytes(run, tmp_path):
    root, _ = run
    inputs = {"documents": Artifact(root / "data.compose"),
              "tokenizer": Artifact(root / "tokens.train")}  # fmt: skip
    stage(encode_documents, EncodeConfig(workers=2), tmp_path, "tokens.encode", **inputs)
    one, two = (folder_bytes(folder / "tokens.encode") for folder in (root, tmp_path))
    assert {**one, "artifact.json": b""} == {**two, "artifact.json": b""}


def test_damaged_repetitions_are_named(run, tmp_path):
    import shutil

    root, _ = run
    folder = tmp_path / "shards"
    shutil.copytree(root / "tokens.encode", folder)
    path = folder / "train" / "code" / REPEATS_FILE
    np.save(path, np.load(path) + 1)
    with pytest.raises(PunaError, match=r"repeats\.npy is damaged"):
        TokenShards(folder).open("train", "code")


def test_the_tokenizer_is_trained_on_documents_as_often_as_they_are_read(run, tmp_path):
    texts = [("web", "a", "llama puna " * 40), ("web", "b", "qocha " * 100), ("web", "c", "x" * 9)]
    splits = ["train", "train", "heldout"]
    copies = [("web", "a2", texts[0][2]), ("web", "a3", texts[0][2])]
    documents = {
        name: make_documents(tmp_path / name, rows, n_shards=1, stage=name, extra={"split": split})
        for name, rows, split in (
            ("split", texts, splits), ("once", texts, splits), ("repeated", texts, splits),
            ("copied", [*texts, *copies], [*splits, "train", "train"]),
        )
    }  # fmt: skip
    for name, times in (("once", 1), ("repeated", 3)):
        (path,) = (tmp_path / name / "documents").glob("*.parquet")
        table = pq.read_table(path)
        repeat = [times if one == "a" else 1 for one in table.column("path").to_pylist()]
        pq.write_table(table.append_column("repeat", pa.array(repeat, pa.int32())), path)
    cfg = TokenizerTrainingConfig(vocab_size=280, n_special=12)
    done_ = {name: stage(train_tokenizer, cfg, tmp_path, f"t-{name}", documents=one)[1]
             for name, one in documents.items()}  # fmt: skip
    assert done_["repeated"]["digest"] == done_["copied"]["digest"] != done_["once"]["digest"]
    assert done_["once"]["digest"] == done_["split"]["digest"]
    assert done_["repeated"]["bytes"] == done_["copied"]["bytes"] == 3 * 440 + 600
    assert done_["repeated"]["docs"] == 2


def test_columns_that_are_there_already_are_refused(run, tmp_path):
    root, _ = run
    inputs = {"documents": Artifact(root / "data.compose"),
              "tokenizer": Artifact(root / "tokens.train")}  # fmt: skip
    with pytest.raises(PunaError, match="'n_tokens' already"):
        stage(count_tokens, CountConfig(workers=1), tmp_path, "count", **inputs)
    with pytest.raises(PunaError, match="'repeat' already"):
        stage(compose_documents, ComposeConfig(workers=1), tmp_path, "compose", **inputs)
