"""The safetensors container: a table of tensors read without torch, and a writer that streams.

Layout: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape,
data_offsets), the values. Specification: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from puna.core.errors import PunaError
from puna.model.formats.mapped import ITEM_BYTES, RELOAD

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {name: code for code, name in DTYPE_NAMES.items()}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        code: Type as the file spells it (``BF16``).
        shape: Outermost dimension first.
        offset_bytes: Of the first value, from the start of the file.
        n_bytes: Of all values.
    """

    code: str
    shape: tuple[int, ...]
    offset_bytes: int
    n_bytes: int


def read_table(path: Path) -> dict[str, Entry]:
    """Read the header of a file and check it against the file's size.

    Raises:
        PunaError: The file is no safetensors file, is cut short, or its header is larger than the
            format allows, no valid table, or describes overlapping values.
    """
    n_file_bytes = path.stat().st_size
    with path.open("rb") as file:
        n_header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if n_file_bytes <= _LENGTH_BYTES or n_header_bytes > n_file_bytes - _LENGTH_BYTES:
            raise _damaged(path, f"its {n_file_bytes} bytes end inside the header")
        if n_header_bytes > MAX_HEADER_BYTES:
            raise _damaged(path, f"a header of {n_header_bytes} bytes, more than the format allows")
        raw = file.read(n_header_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is no valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is no table of tensors")
    header.pop("__metadata__", None)
    start = _LENGTH_BYTES + n_header_bytes
    table = {name: _entry(path, name, value, start) for name, value in header.items()}
    end = start
    for name, entry in sorted(table.items(), key=lambda item: item[1].offset_bytes):
        if entry.offset_bytes != end:
            raise _damaged(path, f"the values of tensor {name} do not follow those before it")
        end += entry.n_bytes
    if end != n_file_bytes:
        raise _damaged(path, f"its values should end at byte {end}, the file at {n_file_bytes}")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is there twice")
    return values


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    if not isinstance(value, dict):
        raise _damaged(path, f"the header's entry of tensor {name} is no table")
    code = value.get("dtype")
    shape, offsets = _sizes(value.get("shape")), _sizes(value.get("data_offsets"))
    if not isinstance(code, str) or shape is None or offsets is None or len(offsets) != 2:
        raise _damaged(path, f"the header lacks dtype, shape or data_offsets of tensor {name}")
    n_bytes = offsets[1] - offsets[0]
    dtype = DTYPE_NAMES.get(code)  # of types that hold no weights only the name matters
    if n_bytes < 0 or (dtype and n_bytes != math.prod(shape) * ITEM_BYTES[dtype]):
        raise _damaged(path, f"tensor {name} of shape {list(shape)} cannot have {n_bytes} bytes")
    return Entry(code, shape, start + offsets[0], n_bytes)


def _sizes(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(size) is int and size >= 0 for size in value):
        return tuple(value)
    return None


def _damaged(path: Path, why: str) -> PunaError:
    return PunaError(f"{path} is damaged: {why}", RELOAD)


class SafetensorsWriter:
    """Writes tensors of one dtype in any order at their final places; one at a time is in memory.

    Byte-deterministic, whatever the order: the values are sorted by name, as the format's own
    library sorts them.

    Args:
        path: Created or overwritten, at its full size: a full disk shows at once.
        shapes: Name and shape of every tensor.
        dtype: Of the written values.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        self._dtype = dtype
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in sorted(shapes):
            end = position + math.prod(shapes[name]) * ITEM_BYTES[dtype]
            header[name] = {
                "dtype": _CODES[dtype], "shape": list(shapes[name]), "data_offsets": [position, end]
            }  # fmt: skip
            self._starts[name], position = position, end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._data_start = _LENGTH_BYTES + len(raw)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(raw).to_bytes(_LENGTH_BYTES, "little") + raw)
        reserve(self._file, self._data_start + position)

    def put(self, name: str, tensor: Float[Tensor, "*shape"]) -> None:
        """Write one tensor, converted to the file's dtype."""
        self._file.seek(self._data_start + self._starts[name])
        self._file.write(tensor_bytes(tensor, self._dtype))

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def reserve(file: BinaryIO, n_bytes: int) -> None:
    """Claim the space of a file before it is written.

    Raises:
        OSError: The disk has not that much room.
    """
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, max(n_bytes, 1))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without it
            raise


def tensor_bytes(tensor: Float[Tensor, "*shape"], dtype: str) -> memoryview:
    """Return the values of a tensor in a dtype as contiguous little-endian bytes."""
    import torch

    plain = tensor.detach().to(device="cpu", dtype=getattr(torch, dtype)).contiguous()
    return plain.view(-1).view(torch.uint8).numpy().data
