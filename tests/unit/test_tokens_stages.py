"""The stages tokens.train and tokens.encode: equal bytes, nothing lost; lineage of a step."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from puna.cli.lineage import lineage
from puna.cli.tokens import tokens
from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.core.fsio import write_json
from puna.core.ledger import Ledger
from puna.core.pool import WorkerPool
from puna.data.schema import DOCUMENTS_DIR, document_id, shard_name
from puna.tokens import encode, encode_publish
from puna.tokens import encode_unit as encode_unit_module
from puna.tokens.documents import document_pieces
from puna.tokens.encode import EncodeConfig, encode_documents
from puna.tokens.encode_unit import WORK_DIR, Unit, encode_unit
from puna.tokens.loader import PackedLoader
from puna.tokens.shards import TokenShards, token_dtype
from puna.tokens.tokenizer import load_tokenizer
from puna.tokens.train import TokenizerTrainingConfig, train_tokenizer

TEXT = "alpha beta gamma délta 日本 épsilon zeta eta 🎉 return if else 12 345 <|eot_id|> \n \t"
WORDS = [*TEXT.split(" "), ""]


def make_documents(n: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        source, path = ("web", "code")[i % 2], f"folder/{i}.txt"
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(200))) if i else ""
        id_ = document_id(source, path)
        rows.append(
            {"id": id_, "source": source, "path": path, "text": text, "metadata": "{}",
             "n_bytes": len(text.encode()), "split": "heldout" if i % 10 == 3 else "train",
             "cluster": id_}
        )  # fmt: skip
    return rows


def artifact(folder: Path, stage: str) -> Artifact:
    write_json(
        folder / "artifact.json",
        {"stage": stage, "fingerprint": "f", "content_hash": "c", "metrics": {}, "config": {},
         "files": []},
    )  # fmt: skip
    return Artifact(folder)


def write_documents(folder: Path, rows: list[dict[str, Any]], n_shards: int = 4) -> Artifact:
    target = folder / DOCUMENTS_DIR
    target.mkdir(parents=True)
    for shard in range(n_shards):
        mine = sorted(rows[shard::n_shards], key=lambda row: row["id"])
        columns = {key: [row[key] for row in mine] for key in rows[0]}
        pq.write_table(pa.table(columns), target / shard_name(shard), row_group_size=8)
    return artifact(folder, "data.split")


def train(folder: Path, documents: Artifact, **config: Any) -> tuple[Artifact, dict[str, Any]]:
    folder.mkdir()
    values = {"vocab_size": 320, "n_special": 12, **config}
    metrics = train_tokenizer(
        TokenizerTrainingConfig(**values), {"documents": documents}, folder, Ledger(None)
    )
    return artifact(folder, "tokens.train"), metrics


def run_encode(
    folder: Path, documents: Artifact, tokenizer: Artifact, workers: int = 1
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    inputs = {"documents": documents, "tokenizer": tokenizer}
    return encode_documents(EncodeConfig(workers=workers), inputs, folder, Ledger(None))


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "artifact.json"
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with data.split, tokens.train and tokens.encode."""
    folder = tmp_path_factory.mktemp("run")
    documents = write_documents(folder / "data.split", make_documents())
    tokenizer, _ = train(folder / "tokens.train", documents)
    metrics = run_encode(folder / "tokens.encode", documents, tokenizer)
    write_json(folder / "encode_metrics.json", metrics)
    artifact(folder / "tokens.encode", "tokens.encode")
    return folder


def test_training_gives_equal_bytes(run: Path, tmp_path: Path) -> None:
    """Whatever the order of the documents and the number of threads."""
    shuffled = make_documents()
    random.Random(1).shuffle(shuffled)
    documents = write_documents(tmp_path / "data.split", shuffled, n_shards=1)
    again, _ = train(tmp_path / "again", documents)
    assert files_of(again.path) == files_of(run / "tokens.train")
    code = (
        "import sys; from pathlib import Path; from puna.core.artifact import Artifact;"
        "from puna.core.ledger import Ledger;"
        "from puna.tokens.train import TokenizerTrainingConfig as C, train_tokenizer;"
        "train_tokenizer(C(vocab_size=320, n_special=12), "
        "{'documents': Artifact(Path(sys.argv[1]))}, Path(sys.argv[2]), Ledger(None))"
    )
    for threads in ("1", "3"):
        out = tmp_path / threads
        out.mkdir()
        subprocess.run(
            [sys.executable, "-c", code, str(run / "data.split"), str(out)],
            env={**os.environ, "RAYON_NUM_THREADS": threads}, check=True,
        )  # fmt: skip
        assert files_of(out) == files_of(run / "tokens.train")


def test_training_reads_the_training_split_only(run: Path, tmp_path: Path) -> None:
    rows = make_documents()
    for row in rows:
        if row["split"] == "heldout":
            row["text"] = "zzqq " * 500
    again, metrics = train(tmp_path / "t", write_documents(tmp_path / "data.split", rows))
    assert files_of(again.path) == files_of(run / "tokens.train")
    assert metrics["docs"] == sum(row["split"] == "train" for row in rows)
    assert metrics["bytes"] == sum(row["n_bytes"] for row in rows if row["split"] == "train")
    assert set(metrics["bytes_per_token"]) == {"web", "code"}


def test_a_large_corpus_is_sampled(run: Path, tmp_path: Path) -> None:
    documents = Artifact(run / "data.split")
    whole = sum(row["n_bytes"] for row in make_documents() if row["split"] == "train")
    one, metrics = train(tmp_path / "a", documents, vocab_size=300, max_bytes=whole // 2)
    assert 0 < metrics["bytes"] <= whole // 2 < metrics["corpus_bytes"] == whole
    two, _ = train(tmp_path / "b", documents, vocab_size=300, max_bytes=whole // 2)
    assert files_of(one.path) == files_of(two.path)
    _, other = train(tmp_path / "c", documents, vocab_size=300, max_bytes=whole // 2, seed=1)
    assert other["bytes"] != metrics["bytes"]


def test_too_small_a_corpus_is_refused(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "d", make_documents(8), n_shards=1)
    with pytest.raises(PunaError, match="20000 ids") as raised:
        train(tmp_path / "t", documents, vocab_size=20_000)
    assert "tokens.train.vocab_size" in str(raised.value.fix)
    assert not (tmp_path / "t" / "tokenizer.json").exists()
    rows = [{**row, "split": "heldout"} for row in make_documents(4)]
    with pytest.raises(PunaError, match="no document of the split 'train'"):
        train(tmp_path / "u", write_documents(tmp_path / "e", rows, n_shards=1))


def test_encoding_loses_nothing(run: Path) -> None:
    rows = {row["id"]: row for row in make_documents()}
    tokenizer = load_tokenizer(run / "tokens.train")
    shards = TokenShards(run / "tokens.encode")
    seen = []
    for split in ("train", "heldout"):
        for source in shards.counts(split):
            shard = shards.open(split, source)
            names = [shard.document_id(i) for i in range(shard.n_docs)]
            assert names == sorted(names)
            seen += names
            for i, name in enumerate(names):
                row = rows[name]
                assert (row["split"], row["source"]) == (split, source)
                assert shard.document(i).tolist() == tokenizer.encode(row["text"], True, True)
                assert shard.n_bytes[i] == row["n_bytes"]
    assert sorted(seen) == sorted(rows)


def test_metrics_count_documents_tokens_and_bytes(run: Path) -> None:
    metrics = json.loads((run / "encode_metrics.json").read_text())
    rows = make_documents()
    assert metrics["docs"] == len(rows)
    assert metrics["bytes"] == sum(row["n_bytes"] for row in rows)
    shards = TokenShards(run / "tokens.encode")
    for split, sources in metrics["splits"].items():
        for source, counts in sources.items():
            assert counts["tokens"] == shards.open(split, source).n_tokens
            per_token = counts["bytes"] / counts["tokens"] if counts["tokens"] else None
            assert counts["bytes_per_token"] == per_token
    assert not (run / "tokens.encode" / WORK_DIR).exists()


def test_shards_do_not_depend_on_workers_or_layout(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Artifact(run / "tokens.train")
    monkeypatch.setattr(encode, "_BYTES_PER_WORKER", {True: 1})
    pools: list[int] = []

    class Pool(WorkerPool):
        def __init__(self, n_workers: int) -> None:
            super().__init__(n_workers)
            pools.append(n_workers)

    monkeypatch.setattr("puna.data.engine.local.WorkerPool", Pool)
    run_encode(tmp_path / "two", Artifact(run / "data.split"), tokenizer, workers=2)
    assert pools == [2]
    assert files_of(tmp_path / "two") == files_of(run / "tokens.encode")
    other = write_documents(tmp_path / "d", make_documents(), n_shards=1)
    run_encode(tmp_path / "one", other, tokenizer)
    assert files_of(tmp_path / "one") == files_of(run / "tokens.encode")


def test_a_killed_attempt_is_continued(run: Path, tmp_path: Path) -> None:
    documents, tokenizer = Artifact(run / "data.split"), Artifact(run / "tokens.train")
    out = tmp_path / "out"
    work = out / WORK_DIR
    work.mkdir(parents=True)
    pieces = document_pieces(documents.path)
    for index in (0, 3):
        encode_unit(Unit(pieces[index], tokenizer.path, work / f"{index:06d}"))
    (work / "000001.partial").mkdir()
    (work / "000001.partial" / "tokens.bin").write_bytes(b"half")
    (out / "train" / "web").mkdir(parents=True)
    (out / "train" / "web" / "tokens.bin").write_bytes(b"half")
    metrics = run_encode(out, documents, tokenizer)
    assert metrics["units_resumed"] == 2
    assert files_of(out) == files_of(run / "tokens.encode")


def broken(rows: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    return [*rows[:-1], {**rows[-1], **changes}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "test"}, "has the split 'test'"),
        ({"id": "x" * 40}, "1 to 32 ASCII"),
        ({"id": document_id("web", "folder/0.txt")}, "two documents have the id"),
        ({"source": "../web"}, r"source name '\.\./web'"),
    ],
)
def test_bad_documents_are_named(
    run: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    documents = write_documents(tmp_path / "d", broken(make_documents(), **changes))
    with pytest.raises(PunaError, match=words) as raised:
        run_encode(tmp_path / "out", documents, Artifact(run / "tokens.train"))
    assert raised.value.fix


def test_damaged_or_missing_documents_are_named(run: Path, tmp_path: Path) -> None:
    tokenizer = Artifact(run / "tokens.train")
    documents = write_documents(tmp_path / "d", make_documents())
    file = documents.path / DOCUMENTS_DIR / shard_name(2)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(PunaError, match=r"part-00002.parquet is damaged"):
        run_encode(tmp_path / "a", documents, tokenizer)
    file.write_bytes(whole[:100] + bytes(200) + whole[300:])
    with pytest.raises(PunaError, match=r"part-00002.parquet is damaged"):
        run_encode(tmp_path / "b", documents, tokenizer)
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), file)
    with pytest.raises(PunaError, match="has no column source"):
        run_encode(tmp_path / "c", documents, tokenizer)
    (tmp_path / "none").mkdir()
    with pytest.raises(PunaError, match="holds no Parquet file"):
        run_encode(tmp_path / "e", artifact(tmp_path / "none", "data.split"), tokenizer)


def test_wide_vocabularies_use_wider_tokens(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [token_dtype(n) for n in (65_535, 65_536)] == [np.uint16, np.uint32]
    for module in (encode_unit_module, encode_publish):
        monkeypatch.setattr(module, "token_dtype", lambda vocab_size: np.dtype(np.uint32))
    run_encode(tmp_path / "out", Artifact(run / "data.split"), Artifact(run / "tokens.train"))
    wide, narrow = TokenShards(tmp_path / "out"), TokenShards(run / "tokens.encode")
    assert (wide.dtype, narrow.dtype) == (np.uint32, np.uint16)
    for source in ("web", "code"):
        tokens_of = [shards.open("train", source).tokens[:] for shards in (wide, narrow)]
        np.testing.assert_array_equal(*tokens_of)


def loader_json(run: Path, stage: str, **changes: Any) -> PackedLoader:
    loader = PackedLoader(run / "tokens.encode", "train", {"web": 1, "code": 1}, 32, 4, 0)
    (run / stage).mkdir(exist_ok=True)
    write_json(run / stage / "loader.json", {**loader.spec(), "steps": 10, **changes})
    return loader


def test_lineage_prints_the_documents_of_a_step(run: Path) -> None:
    loader = loader_json(run, "train.pretrain.partial")
    paths = {row["id"]: row["path"] for row in make_documents()}
    result = CliRunner().invoke(lineage, [str(run), "--step", "4", "--json"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    for row, expected in zip(rows, loader.lineage(4), strict=True):
        for segment, known in zip(row["segments"], expected["segments"], strict=True):
            assert segment == {**known, "path": paths[known["document_id"]]}
    shown = CliRunner().invoke(lineage, [str(run), "--step", "4", "--row", "1", "--text"])
    assert shown.exit_code == 0, shown.output
    first = loader.lineage(4)[1]["segments"][0]
    assert first["document_id"] in shown.output
    text = next(row["text"] for row in make_documents() if row["id"] == first["document_id"])
    ids = load_tokenizer(run / "tokens.train").encode(text, True, True)[slice(*first["tokens"])]
    excerpt = " ".join(load_tokenizer(run / "tokens.train").decode(ids, True).split())
    assert excerpt[:100] in shown.output


def test_lineage_follows_a_run_that_moved(run: Path) -> None:
    gone = "/nowhere/runs/old/tokens.encode.partial"
    loader = loader_json(run, "train.other")
    spec = loader.spec()
    loader_json(run, "train.other", kwargs={**spec["kwargs"], "folder": gone})
    arguments = [str(run), "--step", "2", "--stage", "train.other", "--json"]
    result = CliRunner().invoke(lineage, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output.splitlines()[0])["source"] == loader.lineage(2)[0]["source"]


@pytest.mark.parametrize(
    ("spec", "arguments", "words"),
    [
        ({}, ["--step", "10"], "no step 10"),
        ({}, ["--step", "-1"], "no step -1"),
        ({}, ["--step", "1", "--row", "9"], "no row 9"),
        ({}, ["--step", "1", "--stage", "post.sft"], "has not begun to train"),
        ({"factory": "puna.tokens.loader:nothing"}, ["--step", "1"], "cannot open the batches"),
        ({"kwargs": {"seed": 1}}, ["--step", "1"], "cannot open the batches"),
        ({"factory": "os:system", "kwargs": {"command": "exit 0"}}, ["--step", "1"], "not marked"),
    ],
)
def test_bad_lineage_questions_are_answered(
    run: Path, spec: dict[str, Any], arguments: list[str], words: str
) -> None:
    loader_json(run, "train.pretrain", **spec)
    result = CliRunner().invoke(lineage, [str(run), *arguments])
    assert isinstance(result.exception, PunaError)
    assert words in str(result.exception)


def test_show_prints_ids_and_pieces(run: Path) -> None:
    arguments = ["--tokenizer", str(run / "tokens.train")]
    result = CliRunner().invoke(tokens, ["show", "alpha <|eot_id|>é", *arguments, "--bos"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == ["308", "'<|begin_of_text|>'", "special"]
    assert sum("special" in line for line in lines) == 1
    assert lines[-1].endswith("bytes per token")
    special = CliRunner().invoke(
        tokens, ["show", "-", *arguments, "--special"], input="a<|eot_id|>"
    )
    assert [line.split()[-1] for line in special.output.splitlines()[:2]] == ["'a'", "special"]
