"""The table of tensors in a torch ``.pth`` file, read without torch and without unpickling.

Such a file is a zip archive: ``data.pkl`` is a pickle of the dictionary, and each storage is an
entry of its own, uncompressed. The pickle is not executed: a small stack machine takes the few
instructions that a dictionary of tensors needs and refuses every other, so that a hostile file can
neither import nor call anything.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from puna.core.errors import PunaError
from puna.model.formats.mapped import ITEM_BYTES, RELOAD

MAX_TABLE_BYTES = 100_000_000
"""Larger than any table of a Llama by far: that of the 405B has a few hundred kilobytes."""
STORAGE_DTYPES = {
    "FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16",
}  # fmt: skip
_OTHER_STORAGES = {
    "DoubleStorage": 8, "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1,
    "ByteStorage": 1, "BoolStorage": 1, "Float8_e4m3fnStorage": 1, "Float8_e5m2Storage": 1,
}  # fmt: skip
_ZIP_MAGIC, _LOCAL_MAGIC, _LOCAL_BYTES = b"PK\x03\x04", b"PK\x03\x04", 30
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before torch 1.6


@dataclass(frozen=True)
class Piece:
    """One tensor of a file.

    Attributes:
        storage: Type of its storage as torch names it (``BFloat16Storage``).
        shape: Outermost dimension first.
        stride: In values.
        offset_bytes: Of its first value in the file.
        storage_bytes: From there to the end of its storage.
    """

    storage: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset_bytes: int
    storage_bytes: int

    @property
    def dtype(self) -> str | None:
        """Our name of the type; None when weights are not stored like that."""
        return STORAGE_DTYPES.get(self.storage)

    @property
    def n_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * _item_bytes(self.storage)

    @property
    def n_values(self) -> int:
        """Values from the first one to the end of the storage."""
        return self.storage_bytes // _item_bytes(self.storage)

    @property
    def is_contiguous(self) -> bool:
        """Whether the values lie one after the other."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def read_pth(path: Path) -> dict[str, Piece]:
    """Read the names, shapes and places of the tensors of a file.

    Raises:
        PunaError: The file is no torch archive, is damaged, holds anything but a dictionary of
            tensors, or was written before torch 1.6.
    """
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
    if start == _LEGACY_START:
        raise PunaError(
            f"{path} has the format of torch before 1.6, which cannot be read without running it",
            "write it again: torch.save(torch.load(path, weights_only=True), path)",
        )
    if not start.startswith(_ZIP_MAGIC):
        raise PunaError(
            f"{path} is damaged, or no file of torch.save: it is no zip archive", RELOAD
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(path, archive)
    except PunaError:
        raise
    except (
        zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError, EOFError, OSError,
        NotImplementedError, RuntimeError, OverflowError, struct.error, AttributeError,
    ) as error:  # fmt: skip
        raise PunaError(f"{path} is damaged: {error or type(error).__name__}", RELOAD) from error


def _read_archive(path: Path, archive: zipfile.ZipFile) -> dict[str, Piece]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in entries:
            raise ValueError(f"the entry {info.filename} is there twice")
        entries[info.filename] = info
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it holds no data.pkl, so it is no file of torch.save")
    byte_order = entries.get(f"{roots[0]}/byteorder")
    if byte_order is not None and archive.read(byte_order) != b"little":
        raise ValueError("its values are big-endian, which is not supported")
    table = entries[f"{roots[0]}/data.pkl"]
    if table.file_size > MAX_TABLE_BYTES or table.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its table of {table.file_size} bytes is too large, or compressed")
    values = _Machine(path, archive.read(table)).run()
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not a dictionary of tensors")
    with path.open("rb") as file:
        storages = _Storages(file, path.stat().st_size, entries, f"{roots[0]}/data/")
        return {name: _piece(name, value, storages) for name, value in values.items()}


class _Storages:
    """Where each storage lies in the file."""

    def __init__(
        self, file: BinaryIO, n_file_bytes: int, entries: dict[str, zipfile.ZipInfo], prefix: str
    ) -> None:
        self._file, self._n_file_bytes = file, n_file_bytes
        self._entries, self._prefix = entries, prefix

    def place(self, key: str) -> tuple[int, int]:
        """Return offset and size in bytes."""
        info = self._entries[f"{self._prefix}{key}"]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the storage {key} is compressed")
        self._file.seek(info.header_offset)
        local = self._file.read(_LOCAL_BYTES)
        if len(local) < _LOCAL_BYTES or not local.startswith(_LOCAL_MAGIC):
            raise ValueError(f"the storage {key} is not where the archive says")
        n_name, n_extra = struct.unpack_from("<HH", local, 26)
        offset = info.header_offset + _LOCAL_BYTES + n_name + n_extra
        if offset + info.file_size > self._n_file_bytes:
            raise ValueError(f"the file ends inside the storage {key}")
        return offset, info.file_size


@dataclass(frozen=True)
class _Tensor:
    """What ``_rebuild_tensor_v2`` is called with."""

    persistent_id: Any
    offset: Any
    shape: Any
    stride: Any


def _piece(name: str, value: Any, storages: _Storages) -> Piece:
    if not isinstance(value, _Tensor):
        raise ValueError(f"entry {name} is a {type(value).__name__}, not a tensor")
    kind, storage, key, _location, n_values = value.persistent_id
    if kind != "storage" or not isinstance(storage, _Symbol) or not isinstance(key, str):
        raise ValueError(f"tensor {name} has no storage")
    shape, stride = _sizes(name, value.shape), _sizes(name, value.stride)
    (offset,) = _sizes(name, (value.offset,))
    if len(shape) != len(stride):
        raise ValueError(f"tensor {name} has {len(shape)} sizes and {len(stride)} strides")
    item_bytes = _item_bytes(storage.name)
    start, n_bytes = storages.place(key)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if n_values * item_bytes != n_bytes or (math.prod(shape) and last >= n_values):
        raise ValueError(f"tensor {name} of shape {list(shape)} exceeds its storage")
    begin = offset * item_bytes
    return Piece(storage.name, shape, stride, start + begin, n_bytes - begin)


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"tensor {name} has sizes that are no whole numbers")
    return values


def _item_bytes(storage: str) -> int:
    dtype = STORAGE_DTYPES.get(storage)
    return ITEM_BYTES[dtype] if dtype else _OTHER_STORAGES[storage]


@dataclass(frozen=True)
class _Symbol:
    """A name that the pickle refers to; never imported."""

    module: str
    name: str


_REBUILD = _Symbol("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Symbol("torch._utils", "_rebuild_parameter")
_ORDERED = _Symbol("collections", "OrderedDict")
_MARK = object()
_STOP = ord(".")


class _Machine:
    """Runs the instructions that build a dictionary of tensors, and refuses all others."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        push = self._stack.append
        # By the letter of the instruction; those of protocol 2, which torch writes, and the few
        # that differ in 3 and 4.
        instructions: dict[bytes, Callable[[], Any]] = {
            b"\x80": lambda: self._number(1),  # PROTO
            b"\x95": lambda: self._number(8),  # FRAME
            b"(": lambda: push(_MARK),
            b"}": lambda: push({}),
            b"]": lambda: push([]),
            b")": lambda: push(()),
            b"N": lambda: push(None),
            b"\x88": lambda: push(True),
            b"\x89": lambda: push(False),
            b"t": lambda: push(tuple(self._to_mark())),
            b"\x85": lambda: push(tuple(self._take(1))),
            b"\x86": lambda: push(tuple(self._take(2))),
            b"\x87": lambda: push(tuple(self._take(3))),
            b"K": lambda: push(self._number(1)),
            b"M": lambda: push(self._number(2)),
            b"J": lambda: push(self._number(4, signed=True)),
            b"\x8a": lambda: push(self._number(self._number(1), signed=True)),  # LONG1
            b"X": lambda: push(self._text(self._number(4))),
            b"\x8c": lambda: push(self._text(self._number(1))),
            b"q": lambda: self._remember(self._number(1)),
            b"r": lambda: self._remember(self._number(4)),
            b"\x94": lambda: self._remember(len(self._memo)),  # MEMOIZE
            b"h": lambda: push(self._memo[self._number(1)]),
            b"j": lambda: push(self._memo[self._number(4)]),
            b"c": lambda: self._global(self._line(), self._line()),
            b"\x93": lambda: self._global(*map(str, self._take(2))),  # STACK_GLOBAL
            b"Q": lambda: push(_PersistentId(self._stack.pop())),
            b"R": self._reduce,
            b"b": self._build,
            b"s": lambda: self._set_items(self._take(2)),
            b"u": lambda: self._set_items(self._to_mark()),
        }
        self._do = {code[0]: action for code, action in instructions.items()}

    def run(self) -> Any:
        """Return what the pickle describes."""
        data, do = self._data, self._do
        while (code := data[self._at]) != _STOP:  # past the end: an IndexError, damage
            self._at += 1
            action = do.get(code)
            if action is None:
                raise self._refusal(f"the pickle instruction {_name_of(code)}")
            action()
        return self._stack.pop()

    def _refusal(self, what: str) -> PunaError:
        return PunaError(
            f"{self._path}: {what} does not belong into a file of weights; it was not run",
            "do not open this file with tools that unpickle; get the weights from their publisher",
        )

    def _number(self, n_bytes: int, *, signed: bool = False) -> int:
        start, self._at = self._at, self._at + n_bytes
        return int.from_bytes(self._data[start : self._at], "little", signed=signed)

    def _text(self, n_bytes: int) -> str:
        start, self._at = self._at, self._at + n_bytes
        return self._data[start : self._at].decode()

    def _line(self) -> str:
        start, end = self._at, self._data.index(b"\n", self._at)
        self._at = end + 1
        return self._data[start:end].decode()

    def _remember(self, at: int) -> None:
        self._memo[at] = self._stack[-1]

    def _to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("its table is no table")
        return self._take(len(self._stack) - at)[1:]

    def _take(self, n_items: int) -> list[Any]:
        items = self._stack[-n_items:]
        del self._stack[-n_items:]
        return items

    def _global(self, module: str, name: str) -> None:
        symbol = _Symbol(module, name)
        is_storage = module == "torch" and (name in STORAGE_DTYPES or name in _OTHER_STORAGES)
        if not is_storage and symbol not in (_REBUILD, _PARAMETER, _ORDERED):
            raise self._refusal(f"the name {module}.{name}")
        self._stack.append(symbol)

    def _reduce(self) -> None:
        function, arguments = self._take(2)
        if function == _ORDERED and arguments == ():
            self._stack.append({})
        elif function == _PARAMETER:
            self._stack.append(arguments[0])
        elif function == _REBUILD and isinstance(arguments[0], _PersistentId):
            self._stack.append(_Tensor(arguments[0].value, *arguments[1:4]))
        else:
            what = function.name if isinstance(function, _Symbol) else type(function).__name__
            raise self._refusal(f"a call of {what}")

    def _build(self) -> None:
        self._stack.pop()  # the versions of modules that a state_dict carries
        if not isinstance(self._stack[-1], dict):
            raise self._refusal("setting the state of an object")

    def _set_items(self, items: list[Any]) -> None:
        # Names only: hashing a tuple of tuples of tuples could take for ever, as could printing it.
        if not all(isinstance(key, str) for key in items[::2]):
            raise ValueError("a key of its table is no name")
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))


@dataclass(frozen=True)
class _PersistentId:
    value: Any


def _name_of(code: int) -> str:
    return next((op.name for op in pickletools.opcodes if op.code == chr(code)), f"{code:#04x}")
