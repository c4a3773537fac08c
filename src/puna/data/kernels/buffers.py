"""From Arrow strings to the two arrays that the kernels read."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
from numba import cfunc, njit

if TYPE_CHECKING:  # 26 MiB, which the ranks of a training that only compile kernels do without
    import pyarrow as pa

Array = Any
"""A numpy array inside a compiled kernel (numba has no types that a checker could read)."""

Int = Any
"""An integer inside a kernel; its width (``int64``, ``uint64``, ...) follows from its use."""

Float = Any
"""A floating-point number inside a kernel."""

FNV_SEED = np.uint64(0xCBF29CE484222325)
FNV_PRIME = np.uint64(0x100000001B3)
"""Start and factor of the hash FNV-1a of 64 bits (draft-eastlake-fnv)."""

MIX = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio: an odd factor that spreads the bits of a hash."""


class Texts(NamedTuple):
    """The texts of a batch: text ``i`` is ``data[offsets[i]:offsets[i + 1]]``, UTF-8."""

    data: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def bytes_of(self, index: int) -> memoryview:
        """Return the UTF-8 of one text without a copy."""
        return self.data[self.offsets[index] : self.offsets[index + 1]].data


def texts_of(array: pa.Array | pa.ChunkedArray) -> Texts:
    """Look at an Arrow string array (no nulls) as bytes and offsets, without copying the text.

    Args:
        array: ``string`` or ``large_string``.
    """
    import pyarrow as pa

    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if not pa.types.is_large_string(array.type):
        array = array.cast(pa.large_string())
    _, offsets_buffer, data_buffer = array.buffers()
    n = len(array)
    if offsets_buffer is None or n == 0:
        return Texts(fixed(np.zeros(0, np.uint8)), fixed(np.zeros(1, np.int64)))
    offsets = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + n + 1]
    data = np.zeros(0, np.uint8) if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    return Texts(fixed(data), fixed(offsets))


def texts_from(strings: list[str]) -> Texts:
    """Make :class:`Texts` from Python strings."""
    import pyarrow as pa

    return texts_of(pa.array(strings, pa.large_string()))


def fixed(array: np.ndarray) -> np.ndarray:
    """Return a read-only view, so that every kernel is compiled for one signature only."""
    array = np.ascontiguousarray(array).view()
    array.flags.writeable = False
    return array


def kernel(function: Any) -> Any:
    """Compile a hot loop: no interpreter lock, cached on disk, compiled at the first call.

    Where neither the package's folder nor the user's cache folder can be written, each process
    compiles it anew.
    """
    stamped = _stamped(function)
    try:
        return njit(nogil=True, cache=True)(stamped)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return njit(nogil=True)(stamped)


def native(signature: Any) -> Any:
    """Compile a function with C's calling convention, for kernels that call it by its address.

    A kernel that calls another kernel contains it, compiled anew. Cached like those.

    Args:
        signature: Numba's, ``types.void(types.int64)``.

    Returns:
        A decorator; the result has an ``address``.
    """

    def decorate(function: Any) -> Any:
        stamped = _stamped(function)
        try:
            return cfunc(signature, cache=True)(stamped)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return cfunc(signature)(stamped)

    return decorate


@functools.cache
def _digest_of_sources(folder: Path) -> str:
    digest = xxhash.xxh3_64()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stamped(function: Any) -> Any:
    """Give a function a closure variable that holds the digest of the kernel sources.

    These are the files of this folder and of the function's own.

    Numba's cache on disk looks at the file of a function and at its closure, but not at functions
    of other files that were compiled into it: without the digest, a change to a helper would leave
    stale machine code behind.
    """
    code = function.__code__.replace(co_freevars=("_sources",))
    folders = (Path(__file__).parent, Path(function.__code__.co_filename).parent)
    cell = types.CellType("".join(map(_digest_of_sources, folders)))
    stamped = types.FunctionType(code, function.__globals__, function.__name__, None, (cell,))
    return functools.update_wrapper(stamped, function)


@kernel
def longest_text(offsets: Array) -> Int:
    """Return the bytes of the longest text of a batch."""
    longest = 0
    for d in range(len(offsets) - 1):
        longest = max(longest, offsets[d + 1] - offsets[d])
    return longest


@kernel
def power_of_two(n: Int) -> Int:
    """Return the smallest power of two that is at least ``n`` (and at least 8)."""
    size = 8
    while size < n:
        size *= 2
    return size


@kernel
def find_slot(keys: Array, used: Array, mask: Int, key: Int) -> Int:
    """Find the slot of a key in an open-addressing table: its own, or the free one to take.

    Args:
        keys: uint64 hashes.
        used: A positive number per used slot.
        mask: Size of the table - 1; the size is a power of two.
        key: Hash, well mixed.
    """
    slot = np.int64((key ^ (key >> np.uint64(29))) & np.uint64(mask))
    while used[slot] > 0 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot
