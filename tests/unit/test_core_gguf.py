"""The GGUF container: against the gguf library in both directions, and damaged on purpose."""

from __future__ import annotations

import io
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from puna.core.errors import PunaError
from puna.core.gguf import ALIGNMENT, GGML_TYPES, GGUFTensor, GGUFWriter, Skipped, read_gguf

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, body: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + body


def entry(
    name: str = "t", dims: tuple[int, ...] = (8, 2), number: int = 0, offset: int = 0
) -> bytes:
    out = text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return out + struct.pack("<IQ", number, offset)


def content(
    keys: tuple[bytes, ...] = (), entries: tuple[bytes, ...] = (), *, data: int = 64,
    magic: bytes = b"GGUF", version: int = 3, counts: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    """A file byte by byte, so that it may say what no writer would."""
    n_tensors, n_keys = counts or (len(entries), len(keys))
    out = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join((*keys, *entries))
    return out + bytes(-len(out) % ALIGNMENT) + bytes(data)


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def written(metadata: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> bytes:
    file = io.BytesIO()
    tensors = tensors or {}
    writer = GGUFWriter(
        file, metadata, [(name, value.shape, "F32") for name, value in tensors.items()]
    )
    for value in tensors.values():
        writer.write(value)
    return file.getvalue()


SCALARS = {
    "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000_000,
    "int32": -2_000_000_000, "uint64": 2**63 + 1, "int64": -(2**62), "float32": 0.5,
    "float64": 1e-300, "bool": True, "string": "Ünïcode\n\0 text",
}  # fmt: skip


def test_every_kind_of_value_that_the_library_writes_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(128)
    for kind, value in SCALARS.items():
        getattr(writer, f"add_{kind}")(f"one.{kind}", value)
        element = gguf.GGUFValueType[kind.upper()]
        writer.add_key_value(
            f"many.{kind}", [value] * 3, gguf.GGUFValueType.ARRAY, sub_type=element
        )
    matrix = np.arange(21, dtype=np.float32).reshape(3, 7)
    writer.add_tensor("m", matrix)
    writer.add_tensor("v", np.arange(5, dtype=np.float16))
    writer.add_tensor("q", np.arange(68, dtype=np.uint8).reshape(2, 34),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(tmp_path / "a.gguf")
    assert file.version == 3
    assert file.metadata["general.architecture"] == "llama"
    for kind, value in SCALARS.items():
        assert file.metadata[f"one.{kind}"] == value
        assert type(file.metadata[f"one.{kind}"]) is type(value)
        assert file.metadata[f"many.{kind}"] == [value] * 3
    raw = (tmp_path / "a.gguf").read_bytes()
    found = {
        name: (one.type_name, one.shape, raw[one.offset_bytes : one.offset_bytes + one.n_bytes])
        for name, one in file.tensors.items()
    }
    assert found == {
        "m": ("F32", (3, 7), matrix.tobytes()),
        "v": ("F16", (5,), np.arange(5, dtype=np.float16).tobytes()),
        "q": ("Q8_0", (2, 32), bytes(range(68))),
    }
    assert all(one.offset_bytes % 128 == 0 for one in file.tensors.values())


METADATA = {
    "a.text": "Ünïcode", "a.empty": "", "a.flag": False, "a.small": 7, "a.minus": -7,
    "a.large": 2**40, "a.low": -(2**40), "a.float": 1e-5, "a.texts": ["x", "", "ÿ"],
    "a.numbers": [1, -2, 3], "a.many": [0, 2**32 - 1], "a.more": [2**40, -1], "a.floats": [0.5],
    "a.flags": [True, False],
}  # fmt: skip


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_the_library_reads_what_is_written(tmp_path: Path, alignment: int | None) -> None:
    metadata = METADATA | ({} if alignment is None else {"general.alignment": alignment})
    tensors = {
        "first": np.arange(21, dtype=np.float32).reshape(3, 7),
        "second": np.arange(3, dtype=np.float32),
    }
    path = write(tmp_path / "a.gguf", written(metadata, tensors))
    reader = gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items()}
    narrow = metadata | {"a.float": float(np.float32(1e-5))}
    assert {name: theirs[name] for name in metadata} == narrow
    assert [one.name for one in reader.tensors] == list(tensors)
    for one in reader.tensors:
        assert np.array_equal(one.data, tensors[one.name])
        assert one.data_offset % (alignment or ALIGNMENT) == 0
    ours = read_gguf(path)
    assert ours.metadata == narrow
    assert [one.offset_bytes for one in ours.tensors.values()] == [
        one.data_offset for one in reader.tensors
    ]


def test_block_sizes_are_the_librarys() -> None:
    for name, (number, block, size) in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (number, (block, size)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])


def test_version_2_and_arrays_in_arrays_are_read(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", U32, 2) + struct.pack("<II", 5, 6)
    nested = struct.pack("<IQ", ARRAY, 2) + inner + inner
    raw = content((key("n", ARRAY, nested),), (entry(),), version=2)
    path = write(tmp_path / "a.gguf", raw)
    file = read_gguf(path)
    assert (file.version, file.metadata) == (2, {"n": [[5, 6], [5, 6]]})
    assert file.tensors == {"t": GGUFTensor("t", (2, 8), "F32", len(raw) - 64, 64)}
    assert len(read_gguf(path, skip_arrays=True).metadata["n"]) == 2


def test_skipped_arrays_cost_no_memory(tmp_path: Path) -> None:
    n = 50_000
    metadata = {"tokens": [f"token {i}" for i in range(n)], "types": [1] * n, "after": "here"}
    path = write(tmp_path / "a.gguf", written(metadata))
    assert read_gguf(path).metadata == metadata
    tracemalloc.start()
    skipped = read_gguf(path, skip_arrays=True).metadata
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert skipped == {"tokens": Skipped(n), "types": Skipped(n), "after": "here"}
    assert peak_bytes < 100_000


HUGE = 2**63
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "another format": (content(magic=b"PK\x03\x04"), "not a GGUF file"),
    "big endian": (content(version=3 << 24), "big-endian"),
    "version 1": (content(version=1), "version 1"),
    "version 4": (content(version=4), "version 4"),
    "only a magic": (b"GGUF", "ends inside the header"),
    "tensors without number": (content(counts=(HUGE, 0)), "do not fit"),
    "keys without number": (content(counts=(0, HUGE)), "do not fit"),
    "more keys than there are": (content(counts=(0, 5)), "is there twice"),
    "long name": (content((struct.pack("<Q", HUGE),)), "a name in it has"),
    "long text": (content((key("k", STRING, struct.pack("<Q", HUGE)),)), "ends inside"),
    "long array": (content((key("k", ARRAY, struct.pack("<IQ", U32, HUGE)),)), "ends inside"),
    "long array of texts": (
        content((key("k", ARRAY, struct.pack("<IQ", STRING, HUGE)),)), "ends inside",
    ),
    "text beyond the end in an array": (
        content((key("k", ARRAY, struct.pack("<IQQ", STRING, 1, HUGE)),)), "ends inside",
    ),
    "type of value": (content((key("k", 13, bytes(8)),)), "a value of type 13"),
    "type of elements": (
        content((key("k", ARRAY, struct.pack("<IQ", 99, 1) + bytes(8)),)), "value of type 99",
    ),
    "arrays without end": (
        content((key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9),)), "a value of type 9",
    ),
    "key twice": (content((key("k", U32, bytes(4)),) * 2), "the key k is there twice"),
    "key not UTF-8": (content((key(b"\xff\xfe", U32, bytes(4)),)), "not UTF-8"),
    "text not UTF-8": (content((key("k", STRING, text(b"ab\xff")),)), "not UTF-8"),
    "text in an array not UTF-8": (
        content((key("k", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xc3")),)), "not UTF-8",
    ),
    "alignment 0": (content((key("general.alignment", U32, bytes(4)),)), "not a power of two"),
    "alignment 48": (
        content((key("general.alignment", U32, struct.pack("<I", 48)),)), "is 48, not a power",
    ),
    "alignment a text": (
        content((key("general.alignment", STRING, text("32")),)), "is '32', not a power",
    ),
    "dimensions": (content((), (entry(dims=(1,) * 5),)), "tensor t has 5 dimensions"),
    "dimensions without number": (
        content((), (text("t") + struct.pack("<I", 2**32 - 1) + bytes(40),)), "dimensions",
    ),
    "type of tensor": (content((), (entry(number=99),)), "tensor t is of type 99"),
    "shape": (content((), (entry(dims=(2**40, 2**40)),)), "does not fit"),
    "half a block": (content((), (entry(dims=(33,), number=8),)), "tensor t: rows of 33"),
    "not aligned": (content((), (entry(dims=(2,), offset=4),)), "tensor t lies at 4"),
    "beyond the end": (content((), (entry(dims=(17,)),)), "tensor t ends at byte"),
    "far beyond the end": (content((), (entry(offset=2**64 - 32),)), "tensor t ends at byte"),
    "overlap": (
        content((), (entry("a", (16,)), entry("b", (8,), offset=32))), "a and b overlap",
    ),
    "tensor twice": (content((), (entry(), entry())), "tensor t is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    raw, message = DAMAGED[name]
    path = write(tmp_path / "model.gguf", raw)
    for skip in (False, True):
        if skip and name == "text in an array not UTF-8":
            continue  # it is not looked at
        tracemalloc.start()
        try:
            with pytest.raises(PunaError) as caught:
                read_gguf(path, skip_arrays=skip)
            assert tracemalloc.get_traced_memory()[1] < 200_000  # no count was believed
        finally:
            tracemalloc.stop()
        assert message in caught.value.message
        assert str(path) in caught.value.message
        assert caught.value.fix


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(PunaError, match="is no file"):
            read_gguf(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"k": None}, "no form for None"),
        ({"k": 1e300}, "no form for 1e"),
        ({"k": 2**64}, "no form for whole numbers"),
        ({"k": [2**64 - 1, -1]}, "no form for whole numbers"),
        ({"k": [1, "a"]}, "of one type"),
        ({"general.alignment": 12}, "not a power of two"),
    ],
)
def test_values_without_a_form_are_not_written(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        written(metadata)


def test_the_writer_keeps_to_its_table() -> None:
    with pytest.raises(ValueError, match="one tensor of a name"):
        GGUFWriter(io.BytesIO(), {}, [("t", (1,), "F32")] * 2)
    writer = GGUFWriter(io.BytesIO(), {}, [("t", (2,), "F32")])
    with pytest.raises(ValueError, match="4 bytes, the table says 8"):
        writer.write(bytes(4))
