"""Megatron-LM's token files: bit by bit there and back, and a clear word about every bad one."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.cli.tokens import tokens as tokens_group
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.tokens import bpe
from puna.tokens.export import export_megatron
from puna.tokens.import_stage import ImportConfig, import_tokens
from puna.tokens.loader import PackedLoader
from puna.tokens.megatron import megatron_dtype, read_megatron, write_megatron
from puna.tokens.shards import TokenShards
from puna.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.unit.token_shards import SIZES, seal, write_shards

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_by_the_book(prefix: Path, documents: list[list[list[int]]], dtype: str) -> None:
    """Write the files from the specification alone, value by value."""
    sequences = [sequence for document in documents for sequence in document]
    width = np.dtype(dtype).itemsize
    kind = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint16": "H"}
    with Path(f"{prefix}.bin").open("wb") as file:
        for sequence in sequences:
            file.write(struct.pack(f"<{len(sequence)}{kind[dtype]}", *sequence))
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", CODES[dtype]))
        file.write(struct.pack("<Q", len(sequences)))
        file.write(struct.pack("<Q", len(documents) + 1))
        for sequence in sequences:
            file.write(struct.pack("<i", len(sequence)))
        at = 0
        for sequence in sequences:
            file.write(struct.pack("<q", at))
            at += len(sequence) * width
        at = 0
        file.write(struct.pack("<q", at))
        for document in documents:
            at += len(document)
            file.write(struct.pack("<q", at))


def read_by_the_book(prefix: Path) -> tuple[str, list[list[list[int]]]]:
    data, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert data[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<Q", data, 9) == (1,)
    dtype = {code: name for name, code in CODES.items()}[data[17]]
    n, n_documents = struct.unpack_from("<QQ", data, 18)
    lengths = struct.unpack_from(f"<{n}i", data, 34)
    pointers = struct.unpack_from(f"<{n}q", data, 34 + 4 * n)
    indices = struct.unpack_from(f"<{n_documents}q", data, 34 + 12 * n)
    assert len(data) == 34 + 12 * n + 8 * n_documents
    sequences = [
        np.frombuffer(tokens, dtype, length, pointer).tolist()
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    return dtype, [sequences[a:b] for a, b in itertools.pairwise(indices)]


def flat(document: list[list[int]]) -> list[int]:
    return [id_ for sequence in document for id_ in sequence]


documents_of_ids = st.lists(
    st.lists(st.lists(st.integers(0, 120), min_size=1, max_size=9), max_size=3), max_size=9
)


@settings(max_examples=50, deadline=None)
@given(documents_of_ids, st.sampled_from(sorted(CODES)))
def test_files_are_read_and_written_as_the_specification_says(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("m")
    write_by_the_book(folder / "a", documents, dtype)
    found = read_megatron(folder / "a")
    assert found.document_lengths.tolist() == [sum(map(len, one)) for one in documents]
    every = [id_ for one in documents for id_ in flat(one)]
    assert [id_ for block in found.blocks() for id_ in block.tolist()] == every
    write_megatron(folder / "b", found.dtype, found.blocks(), found.lengths, found.documents)
    for suffix in ("bin", "idx"):
        assert (folder / f"a.{suffix}").read_bytes() == (folder / f"b.{suffix}").read_bytes()
    assert read_by_the_book(folder / "b") == (dtype, documents)


def test_sequences_may_lie_in_any_order(tmp_path: Path) -> None:
    write_by_the_book(tmp_path / "a", [[[1, 2]], [[3, 4, 5]]], "uint16")
    data = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into("<2i2q", data, 34, 3, 2, 4, 0)
    (tmp_path / "a.idx").write_bytes(data)
    found = read_megatron(tmp_path / "a")
    assert [block.tolist() for block in found.blocks()] == [[3, 4, 5], [1, 2]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["the llama eats grass in the high Andes, naïve and calm " * 20]
    ranks = bpe.train_ranks([texts], 288, 2)
    Tokenizer(bpe.definition(ranks, 12), bpe.tokenizer_config()).save(folder)
    return folder


def run_import(out: Path, tokenizer: Path, sources: list[dict[str, Any]]) -> dict[str, Any]:
    out.mkdir(parents=True)
    cfg = ImportConfig(tokenizer=str(tokenizer), sources=sources)
    return import_tokens(cfg, {}, out, Ledger(None))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_import_and_export_give_the_files_back(tmp_path: Path, tokenizer: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    documents = [
        [rng.integers(0, 300, n).tolist() for n in rng.integers(1, 40, rng.integers(1, 4))]
        for _ in range(50)
    ]
    plain = [[one[0]] for one in documents]
    for name, given_documents in (("many", documents), ("one", plain)):
        write_by_the_book(tmp_path / name, given_documents, dtype)
    sources = [
        {"name": "many", "path": str(tmp_path / "many")},
        {"name": "one", "path": str(tmp_path / "one"), "split": "heldout"},
    ]
    metrics = run_import(tmp_path / "shards", tokenizer, sources)
    assert metrics["docs"] == 100
    shards = TokenShards(tmp_path / "shards")
    shard = shards.open("train", "many")
    assert [shard.document(i).tolist() for i in range(50)] == [flat(one) for one in documents]
    assert shard.ids.tolist() == sorted(shard.ids.tolist())
    assert {x.prefix.name for x in export_megatron(tmp_path / "shards", tmp_path / "back")} == {
        "many-train", "one-heldout",
    }  # fmt: skip
    for name, split in (("many", "train"), ("one", "heldout")):
        for suffix in ("bin", "idx"):
            back = (tmp_path / "back" / f"{name}-{split}.{suffix}").read_bytes()
            assert back == (tmp_path / f"{name}.{suffix}").read_bytes()
    batch = PackedLoader(tmp_path / "shards", "train", None, 16, 4, 0).batch(0, 0, 1)
    assert batch.tokens_BT.shape == (4, 16)


def test_bytes_of_texts_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    found = load_tokenizer(tokenizer)
    texts = ["the llama eats grass", "naïve and calm", "Ανδεις", "x" * 5000]
    ids = [found.encode(text, True, True) for text in texts]
    write_by_the_book(tmp_path / "a", [[one] for one in ids], "int32")
    run_import(tmp_path / "shards", tokenizer, [{"name": "web", "path": str(tmp_path / "a")}])
    shard = TokenShards(tmp_path / "shards").open("train", "web")
    assert shard.n_bytes.tolist() == [len(text.encode()) for text in texts]
    assert (tmp_path / "shards" / "tokenizer.json").is_file()


def test_our_shards_become_files(tmp_path: Path) -> None:
    folder = seal(write_shards(tmp_path / "x", {"train": SIZES, "heldout": {"web": [5]}}))
    result = CliRunner().invoke(tokens_group, ["export", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "web-train.bin, .idx: 8 documents, 135 tokens, uint16" in result.output
    shard = TokenShards(folder).open("train", "web")
    dtype, documents = read_by_the_book(tmp_path / "out" / "web-train")
    assert dtype == "uint16"
    assert documents == [[shard.document(i).tolist()] for i in range(shard.n_docs)]
    wide = list(export_megatron(folder, tmp_path / "wide", ["heldout"], "int32"))
    assert [one.dtype for one in wide] == ["int32"]
    assert megatron_dtype(65_499) == np.uint16
    assert megatron_dtype(65_500) == np.int32


def test_repeated_documents_are_exported_as_often(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "x", {"train": {"code": [3, 2]}})
    np.save(folder / "train/code/repeats.npy", np.array([2, 1], np.int32))
    index = json.loads((folder / "index.json").read_text())
    index["splits"]["train"]["code"]["n_tokens_read"] = 14
    (folder / "index.json").write_text(json.dumps(index))
    (one,) = export_megatron(seal(folder), tmp_path / "out")
    _, documents = read_by_the_book(one.prefix)
    assert [len(document[0]) for document in documents] == [5, 5, 4]


def patch(at: int, kind: str, *values: Any) -> Any:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        struct.pack_into(kind, data, at, *values)
        path.write_bytes(data)

    return change


BAD = {
    "magic": (patch(0, "<9s", b"TNTIDX\0\0\0"), r"begins with b'TNTIDX"),
    "version": (patch(9, "<Q", 2), "version is 2, not 1"),
    "code": (patch(17, "<B", 9), "type has the code 9; known are 1 to 8"),
    "float": (patch(17, "<B", 7), "float32, which are no ids"),
    "counts": (patch(18, "<Q", 10**12), "sequences and 4 document indices take"),
    "negative length": (patch(34, "<i", -1), "sequence 0 has -1 tokens"),
    "outside": (patch(46, "<q", 100), "sequence 0 lies at bytes 100 to 104 of a.bin"),
    "odd place": (patch(46, "<q", 1), "sequence 0 lies at bytes 1 to 5"),
    "first document": (patch(70, "<q", 1), "do not lead from 0 to 3"),
    "last document": (patch(94, "<q", 2), "do not lead from 0 to 3"),
    "backwards": (patch(78, "<q", 3), "document 1 ends before it begins"),
    "short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it has 101 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "a header alone has 34"),
    "modes": (lambda path: path.write_bytes(path.read_bytes() + b"\0\0\0"), "multimodal"),
    "gone": (Path.unlink, "a.idx does not exist"),
    "more tokens": (
        lambda path: path.with_suffix(".bin").write_bytes(bytes(16)), "have 12 bytes, a.bin has 16"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_malformed_files_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    write_by_the_book(tmp_path / "a", [[[1, 2]], [[3]], [[4, 5, 6]]], "uint16")
    change(tmp_path / "a.idx")
    with pytest.raises(PunaError, match=words) as raised:
        read_megatron(tmp_path / "a")
    assert raised.value.fix


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    write_by_the_book(tmp_path / "a", [[[1, 2]], [[3, 300]]], "int32")
    with pytest.raises(PunaError, match="document 1 has the id 300, the tokenizer has 0 to 299"):
        run_import(tmp_path / "s", tokenizer, [{"name": "web", "path": str(tmp_path / "a")}])
    write_by_the_book(tmp_path / "a", [[[1, 2]], [[3, -1]]], "int32")
    with pytest.raises(PunaError, match="document 1 has the id -1"):
        run_import(tmp_path / "t", tokenizer, [{"name": "web", "path": str(tmp_path / "a")}])
    two = [{"name": "web", "path": str(tmp_path / "a")}] * 2
    with pytest.raises(PunaError, match="two sources of the split train have the name 'web'"):
        run_import(tmp_path / "u", tokenizer, two)
    with pytest.raises(PunaError, match="id 70000 does not fit uint16"):
        write_megatron(tmp_path / "b", np.dtype(np.uint16), [np.array([70_000])], np.array([1]))
