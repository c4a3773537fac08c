"""GGUF files: the container of key-values and tensors, read and written without torch.

A file is a header (magic, version, counts), key-values with their types, a table of tensors, then
the tensors, each aligned. Everything is checked against the size of the file before it is used, so
that a damaged or hostile header neither allocates nor reads what is not there.

Source: ggml-org/ggml ``docs/gguf.md``, versions 2 and 3, little endian.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from puna.core.errors import PunaError

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
_RELOAD = "download or write the file again"
_MAX_NAME_BYTES = 65_535
_MAX_DIMENSIONS = 4
_MAX_DEPTH = 4  # of arrays in arrays

GGML_TYPES: Mapping[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210), "Q8_K": (15, 256, 292), "BF16": (30, 1, 2),
}  # fmt: skip
"""Name -> (number in the file, values of a block, bytes of a block)."""
_TYPE_NAMES = {number: name for name, (number, _, _) in GGML_TYPES.items()}

# Types of key-values: number -> struct format.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_WHOLE = {4: (0, 2**32), 5: (-(2**31), 2**31), 10: (0, 2**64), 11: (-(2**63), 2**63)}
"""Types of whole numbers that are written: number -> range, in the order of preference."""


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the table.

    Attributes:
        name: As in the file.
        shape: Outermost dimension first, (rows, columns).
        type_name: A key of :data:`GGML_TYPES`.
        offset_bytes: From the beginning of the file.
        n_bytes: Of its data.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset_bytes: int
    n_bytes: int


@dataclass(frozen=True, repr=False)
class Skipped:
    """Stands for an array that was not read.

    Attributes:
        length: Its number of elements.
    """

    length: int

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"<list of {self.length} values>"


@dataclass(frozen=True)
class GGUFFile:
    """The header of a file.

    Attributes:
        path: The file.
        version: 2 or 3.
        metadata: Key-values; arrays are lists, or :class:`Skipped`.
        tensors: By name, in the order of the file.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path | str, *, skip_arrays: bool = False) -> GGUFFile:
    """Read and check the header of a file.

    Args:
        path: The file.
        skip_arrays: Step over long arrays (a vocabulary) and keep only their lengths.

    Raises:
        PunaError: The file is no GGUF, of a version or byte order that is not read, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise PunaError(f"{path} is no file, or does not exist", "give a .gguf file")
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise PunaError(f"{path} is empty, not a GGUF file", _RELOAD)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data, skip_arrays).read()


def n_bytes_of(type_name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor.

    Raises:
        ValueError: Its rows are not whole blocks.
    """
    _, block, size = GGML_TYPES[type_name]
    if shape and shape[-1] % block:
        raise ValueError(
            f"rows of {shape[-1]} values are not whole blocks of {block} ({type_name})"
        )
    return math.prod(shape) // block * size


class _Header:
    """Reads a header from front to back."""

    def __init__(self, path: Path, data: mmap.mmap, skip_arrays: bool) -> None:
        self._path, self._data, self._skips = path, data, skip_arrays
        self._at, self._size = 0, len(data)

    def read(self) -> GGUFFile:
        if self._data[:4] != MAGIC:
            raise PunaError(
                f"{self._path} is not a GGUF file: it begins with {self._data[:4]!r}",
                "give a .gguf file",
            )
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian" if swapped in (1, 2, 3) else f"of version {version}"
            raise PunaError(
                f"{self._path} is {what}, only little-endian versions 2 and 3 are read",
                "convert it with a current llama.cpp",
            )
        n_tensors, n_keys = self._scalar("Q"), self._scalar("Q")
        # The smallest tensor entry has 24 bytes, the smallest key-value 13.
        if n_tensors * 24 + n_keys * 13 > self._size:
            raise self._damaged(f"{n_tensors} tensors and {n_keys} keys do not fit into it")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string(_MAX_NAME_BYTES)
            if key in metadata:
                raise self._damaged(f"the key {key} is there twice")
            metadata[key] = self._value(self._scalar("I"), key, 0)
        entries = [self._entry() for _ in range(n_tensors)]
        return GGUFFile(self._path, version, metadata, self._table(entries, metadata))

    def _table(
        self, entries: list[tuple[str, tuple[int, ...], str, int]], metadata: dict[str, Any]
    ) -> dict[str, GGUFTensor]:
        alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
        if not _is_alignment(alignment):
            raise self._damaged(f"{ALIGNMENT_KEY} is {alignment!r}, not a power of two")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_name, offset in entries:
            if name in tensors:
                raise self._damaged(f"tensor {name} is there twice")
            try:
                n_bytes = n_bytes_of(type_name, shape)
            except ValueError as error:
                raise self._damaged(f"tensor {name}: {error}") from error
            if offset % alignment:
                raise self._damaged(f"tensor {name} lies at {offset}, not aligned to {alignment}")
            if start + offset + n_bytes > self._size:
                raise self._damaged(
                    f"tensor {name} ends at byte {start + offset + n_bytes}, the file at "
                    f"{self._size}"
                )
            tensors[name] = GGUFTensor(name, shape, type_name, start + offset, n_bytes)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset_bytes)
        for before, after in itertools.pairwise(ordered):
            if before.offset_bytes + before.n_bytes > after.offset_bytes:
                raise self._damaged(f"tensors {before.name} and {after.name} overlap")
        return tensors

    def _entry(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self._string(_MAX_NAME_BYTES)
        n_dimensions = self._scalar("I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {n_dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(n_dimensions)]))
        number = self._scalar("I")
        if number not in _TYPE_NAMES:
            raise PunaError(
                f"{self._path}: tensor {name} is of type {number}, which is not read",
                f"use one of {', '.join(GGML_TYPES)}",
            )
        if math.prod(shape) > 8 * self._size:
            raise self._damaged(f"tensor {name} of shape {list(shape)} does not fit into it")
        return name, shape, _TYPE_NAMES[number], self._scalar("Q")

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise self._damaged(f"the key {key} has a value of type {kind}")
        element, length = self._scalar("I"), self._scalar("Q")
        if element in _SCALARS:
            form = struct.Struct(f"<{_SCALARS[element]}")
            self._need(length * form.size)
            start, self._at = self._at, self._at + length * form.size
            if self._skips:
                return Skipped(length)
            return list(struct.unpack_from(f"<{length}{_SCALARS[element]}", self._data, start))
        self._need(length * 8)  # a string and an array both begin with at least so much
        if element == _STRING:
            return self._strings(length)
        values = [self._value(element, key, depth + 1) for _ in range(length)]
        return Skipped(length) if self._skips else values

    def _strings(self, length: int) -> Any:
        """Read many strings; a vocabulary has a few hundred thousand, so without calls."""
        data, at, size = self._data, self._at, self._size
        unpack = struct.Struct("<Q").unpack_from
        values: list[bytes] = []
        append = None if self._skips else values.append
        for _ in range(length):
            if at + 8 > size:
                raise self._damaged("it ends inside the header")
            (n,) = unpack(data, at)
            at += 8 + n
            if at > size:
                raise self._damaged("it ends inside the header")
            if append is not None:
                append(data[at - n : at])
        self._at = at
        if self._skips:
            return Skipped(length)
        try:
            return [value.decode() for value in values]
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text in it is not UTF-8: {error.object[:40]!r}") from error

    def _string(self, limit: int | None = None) -> str:
        n = self._scalar("Q")
        if limit is not None and n > limit:
            raise self._damaged(f"a name in it has {n} bytes")
        self._need(n)
        raw = self._data[self._at : self._at + n]
        self._at += n
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text in it is not UTF-8: {raw[:40]!r}") from error

    def _scalar(self, form: str) -> Any:
        width = struct.calcsize(f"<{form}")
        self._need(width)
        (value,) = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += width
        return value

    def _need(self, n_bytes: int) -> None:
        if self._at + n_bytes > self._size:
            raise self._damaged("it ends inside the header")

    def _damaged(self, what: str) -> PunaError:
        return PunaError(f"{self._path} is damaged: {what}", _RELOAD)


class GGUFWriter:
    """Writes a file: the header at once, then the tensors one by one in the order of the table.

    Args:
        file: Open for writing, at its beginning.
        metadata: Key-values. Whole numbers are written as uint32 where they fit, else as int32,
            uint64 or int64, others as float32; lists by the type of their elements (of whole
            numbers int32 first). ``general.alignment`` is obeyed.
        tensors: (name, shape outermost first, type name).

    Raises:
        ValueError: A value that has no form in the file, or a name is there twice.
    """

    def __init__(
        self,
        file: BinaryIO,
        metadata: Mapping[str, Any],
        tensors: Iterable[tuple[str, tuple[int, ...], str]],
    ) -> None:
        self._file = file
        table = list(tensors)
        if len({name for name, _, _ in table}) != len(table):
            raise ValueError("a GGUF file holds one tensor of a name")
        self._alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
        if not _is_alignment(self._alignment):
            raise ValueError(f"{ALIGNMENT_KEY} is {self._alignment!r}, not a power of two")
        self._sizes = [n_bytes_of(type_name, shape) for _, shape, type_name in table]
        self._written = 0
        out = bytearray(MAGIC)
        out += struct.pack("<IQQ", VERSION, len(table), len(metadata))
        for key, value in metadata.items():
            out += _text(key) + _typed(value)
        offset = 0
        for (name, shape, type_name), n_bytes in zip(table, self._sizes, strict=True):
            out += _text(name) + struct.pack("<I", len(shape))
            out += struct.pack(f"<{len(shape)}Q", *reversed(shape))
            out += struct.pack("<IQ", GGML_TYPES[type_name][0], offset)
            offset += n_bytes + self._gap(n_bytes)
        file.write(out + bytes(self._gap(len(out))))

    def write(self, data: Any) -> None:
        """Write the bytes of the next tensor, any buffer.

        Raises:
            ValueError: It has another size than the table says.
        """
        view = memoryview(data).cast("B")
        n_bytes = self._sizes[self._written]
        if len(view) != n_bytes:
            raise ValueError(f"a tensor of {len(view)} bytes, the table says {n_bytes}")
        self._file.write(view)
        self._file.write(bytes(self._gap(n_bytes)))
        self._written += 1

    def _gap(self, n_bytes: int) -> int:
        return -n_bytes % self._alignment


def _is_alignment(value: Any) -> bool:
    return type(value) is int and value > 0 and value & (value - 1) == 0


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    if isinstance(value, (list, tuple)):
        kind = _kind_of_list(value)
        body = b"".join(_body(item, kind) for item in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + body
    kind = _kind(value)
    return struct.pack("<I", kind) + _body(value, kind)


def _body(value: Any, kind: int) -> bytes:
    try:
        return _text(value) if kind == _STRING else struct.pack(f"<{_SCALARS[kind]}", value)
    except OverflowError as error:
        raise ValueError(f"a GGUF file has no form for {value!r}") from error


def _kind(value: Any) -> int:
    if isinstance(value, str):
        return _STRING
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, float):
        return _FLOAT32
    if isinstance(value, int):
        return _kind_of_whole(value, value, _WHOLE)
    raise ValueError(f"a GGUF file has no form for {value!r}")


def _kind_of_whole(least: int, most: int, kinds: Iterable[int]) -> int:
    for kind in kinds:
        low, high = _WHOLE[kind]
        if low <= least and most < high:
            return kind
    raise ValueError(f"a GGUF file has no form for whole numbers from {least} to {most}")


def _kind_of_list(values: list[Any] | tuple[Any, ...]) -> int:
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        # Token types and the like are int32 in llama.cpp's files.
        return _kind_of_whole(min(values, default=0), max(values, default=0), (5, 4, 10, 11))
    kinds = {_kind(value) for value in values}
    if len(kinds) != 1:
        raise ValueError("the elements of a list in a GGUF file are of one type")
    return kinds.pop()
