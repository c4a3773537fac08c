"""The GGUF container, against the gguf library and against damage."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest

from puna.core.errors import PunaError
from puna.core.gguf import GGUFWriter, Skipped, read_gguf

METADATA = {
    "general.architecture": "llama",
    "a.uint": 7,
    "a.int": -7,
    "a.large": 2**40,
    "a.float": 0.5,
    "a.bool": True,
    "a.text": "grüße",
    "a.numbers": [1, 2, 3],
    "a.floats": [0.5, -1.0],
    "a.texts": ["a", "", "ß"],
}
TENSORS = {
    "one": np.arange(6, dtype=np.float32).reshape(2, 3),
    "two": np.arange(5, dtype=np.float32),
}


def write(path: Path, metadata: dict | None = None, tensors: dict | None = None) -> Path:
    tensors = TENSORS if tensors is None else tensors
    table = [(name, array.shape, "F32") for name, array in tensors.items()]
    with path.open("wb") as file:
        writer = GGUFWriter(file, METADATA if metadata is None else metadata, table)
        for array in tensors.values():
            writer.write(array)
    return path


def header(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path / "a.gguf")
    file = read_gguf(path)
    assert file.version == 3
    assert file.metadata == METADATA
    assert {name: t.shape for name, t in file.tensors.items()} == {"one": (2, 3), "two": (5,)}
    data = path.read_bytes()
    for name, array in TENSORS.items():
        tensor = file.tensors[name]
        assert tensor.offset_bytes % 32 == 0
        assert data[tensor.offset_bytes :][: tensor.n_bytes] == array.tobytes()


def test_the_gguf_library_reads_it(tmp_path):
    from gguf import GGUFReader

    reader = GGUFReader(write(tmp_path / "a.gguf"))
    for key, value in METADATA.items():
        assert reader.fields[key].contents() == value
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, TENSORS[tensor.name])


def test_files_of_the_gguf_library_are_read(tmp_path):
    from gguf import GGUFWriter as Peer

    path = tmp_path / "peer.gguf"
    peer = Peer(path, "llama")
    peer.add_uint8("k.u8", 200)
    peer.add_int8("k.i8", -100)
    peer.add_uint16("k.u16", 60_000)
    peer.add_int16("k.i16", -30_000)
    peer.add_uint64("k.u64", 2**63)
    peer.add_int64("k.i64", -(2**62))
    peer.add_float64("k.f64", 0.1)
    peer.add_array("k.list", [[1, 2], [3]])
    for name, array in TENSORS.items():
        peer.add_tensor(name, array)
    peer.write_header_to_file()
    peer.write_kv_data_to_file()
    peer.write_tensors_to_file()
    peer.close()
    file = read_gguf(path)
    wanted = {"k.u8": 200, "k.i8": -100, "k.u16": 60_000, "k.i16": -30_000, "k.u64": 2**63,
              "k.i64": -(2**62), "k.f64": 0.1, "k.list": [[1, 2], [3]]}  # fmt: skip
    assert {key: file.metadata[key] for key in wanted} == wanted
    assert file.tensors["one"].shape == (2, 3)


def test_long_arrays_can_be_skipped(tmp_path):
    file = read_gguf(write(tmp_path / "a.gguf"), skip_arrays=True)
    assert file.metadata["a.texts"] == Skipped(3)
    assert file.metadata["a.numbers"] == Skipped(3)
    assert len(file.metadata["a.texts"]) == 3
    assert file.metadata["a.text"] == "grüße"
    assert set(file.tensors) == {"one", "two"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"GGML" + bytes(40), "is not a GGUF file"),
        (b"GGUF\x00\x00\x00\x03" + bytes(40), "big-endian"),
        (header(version=1) + bytes(40), "of version 1"),
        (header(n_tensors=2**60), "do not fit"),
        (header(n_keys=2**60), "do not fit"),
        (header(0, 1) + text("k") + struct.pack("<II", 99, 0), "value of type 99"),
        (header(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**61), "ends inside"),
        (header(0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 2**61), "ends inside"),
        (header(0, 1) + struct.pack("<Q", 2**50) + bytes(40), "a name in it has"),
        (header(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1), "UTF-8"),
        (header(0, 2) + (text("k") + struct.pack("<II", 4, 1)) * 2, "there twice"),
        (header(1, 0) + entry("t", (2**40, 2**40), 0, 0) + bytes(64), "does not fit"),
        (header(1, 0) + entry("t", (4,) * 9, 0, 0) + bytes(64), "has 9 dimensions"),
        (header(1, 0) + entry("t", (4,), 77, 0) + bytes(64), "of type 77"),
        (header(1, 0) + entry("t", (4,), 0, 8) + bytes(64), "not aligned"),
        (header(1, 0) + entry("t", (4,), 0, 64) + bytes(64), "the file at"),
        (header(1, 0) + entry("t", (33,), 8, 0) + bytes(64), "whole blocks"),
        (header(2, 0) + entry("t", (4,), 0, 0) * 2 + bytes(64), "there twice"),
        (header(2, 0) + entry("t", (4,), 0, 0) + entry("u", (4,), 0, 0) + bytes(64), "overlap"),
        (header(0, 1) + text("general.alignment") + struct.pack("<II", 4, 3), "power of two"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, content, what):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(PunaError) as caught:
        read_gguf(path)
    assert what in caught.value.message
    assert str(path) in caught.value.message


def test_arrays_in_arrays_end(tmp_path):
    nested = struct.pack("<IQ", 9, 1) * 50
    path = tmp_path / "deep.gguf"
    path.write_bytes(header(0, 1) + text("k") + struct.pack("<I", 9) + nested + bytes(64))
    with pytest.raises(PunaError, match="value of type 9"):
        read_gguf(path)


def test_every_cut_file_is_damaged(tmp_path):
    whole = write(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    end = whole.rindex(TENSORS["two"].tobytes()) + TENSORS["two"].nbytes
    for size in range(end):
        path.write_bytes(whole[:size])
        with pytest.raises(PunaError):
            read_gguf(path)
    path.write_bytes(whole[:end])
    read_gguf(path)


def test_a_large_vocabulary_is_stepped_over_at_once(tmp_path):
    tokens = [f"token{i}" for i in range(400_000)]
    path = write(tmp_path / "v.gguf", {"tokens": tokens}, {})
    start_s = time.process_time()
    assert read_gguf(path, skip_arrays=True).metadata["tokens"] == Skipped(400_000)
    print(f"{time.process_time() - start_s:.2f} s of CPU time")
    assert read_gguf(path).metadata["tokens"] == tokens


def test_wrong_use_of_the_writer(tmp_path):
    with (tmp_path / "a.gguf").open("wb") as file:
        with pytest.raises(ValueError, match="no form"):
            GGUFWriter(file, {"k": {}}, [])
        with pytest.raises(ValueError, match="one type"):
            GGUFWriter(file, {"k": [1, "a"]}, [])
        writer = GGUFWriter(file, {}, [("t", (2,), "F32")])
        with pytest.raises(ValueError, match="the table says 8"):
            writer.write(np.zeros(3, np.float32))
