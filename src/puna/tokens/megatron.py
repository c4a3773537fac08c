"""Megatron-LM's token files: ``NAME.bin`` holds tokens and nothing else, ``NAME.idx`` the rest.

The index, little-endian, without padding (``IndexedDataset`` of Megatron-Core,
``megatron/core/datasets/indexed_dataset.py``)::

    9 bytes    "MMIDIDX" and two zero bytes
    uint64     version, 1
    uint8      type of the tokens, see TYPES
    uint64     S, number of sequences
    uint64     D, number of document indices: documents + 1
    int32[S]   tokens of each sequence
    int64[S]   first byte of each sequence in the .bin file
    int64[D]   first sequence of each document, and S
    int8[S]    mode of each sequence; only in multimodal files, which are refused here
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32",
    8: "uint16",
}  # fmt: skip
"""Code in the header -> numpy's name."""
_HEADER = struct.Struct("<9sQBQQ")
_INT32_MAX = 2**31 - 1
_BLOCK_TOKENS = 1 << 22


def megatron_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type that Megatron gives tokens: uint16 below 65500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


@dataclass(frozen=True)
class MegatronFiles:
    """Token files, opened and checked.

    Attributes:
        prefix: Path without ``.bin`` and ``.idx``.
        dtype: Of the tokens.
        lengths: Tokens of each sequence.
        pointers: First byte of each sequence.
        documents: First sequence of each document, and the number of sequences.
    """

    prefix: Path
    dtype: np.dtype[Any]
    lengths: Int32[np.ndarray, " S"]
    pointers: Int64[np.ndarray, " S"]
    documents: Int64[np.ndarray, " D"]

    @property
    def bin_path(self) -> Path:
        """The file of tokens."""
        return _path(self.prefix, ".bin")

    @property
    def n_docs(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def document_lengths(self) -> Int64[np.ndarray, " docs"]:
        """Tokens of each document, all its sequences together."""
        sums = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(sums[self.documents])

    @property
    def is_plain(self) -> bool:
        """Whether every document is one sequence and no document is empty."""
        return bool((np.diff(self.documents) == 1).all())

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all tokens, document after document, in blocks of bounded size."""
        if not self.n_tokens:
            return
        tokens = np.memmap(self.bin_path, self.dtype, "r").view(np.ndarray)
        starts = self.pointers // self.dtype.itemsize
        follows = starts[1:] == starts[:-1] + self.lengths[:-1]
        firsts = np.concatenate([[0], np.flatnonzero(~follows) + 1])
        lasts = np.concatenate([firsts[1:] - 1, [len(starts) - 1]])
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            end = int(starts[last] + self.lengths[last])
            for at in range(int(starts[first]), end, _BLOCK_TOKENS):
                yield tokens[at : min(end, at + _BLOCK_TOKENS)]


def read_megatron(prefix: Path) -> MegatronFiles:
    """Open ``prefix.bin`` and ``prefix.idx``.

    Raises:
        PunaError: A file is missing, or the index is damaged, of another version, of a type that
            holds no ids, multimodal, or does not fit the file of tokens.
    """
    path, bin_path = _path(prefix, ".idx"), _path(prefix, ".bin")
    for one in (path, bin_path):
        if not one.is_file():
            raise PunaError(f"{one} does not exist",
                            "give the path without .bin and .idx; both must be there")  # fmt: skip
    try:
        found = _read_index(prefix, path.read_bytes())
        _check_tables(found, bin_path)
    except ValueError as error:
        raise PunaError(f"{path} is no index of Megatron token files: {error}",
                        "copy it again, or make it with Megatron's preprocess_data.py",
                        ) from error  # fmt: skip
    return found


def _read_index(prefix: Path, data: bytes) -> MegatronFiles:
    if len(data) < _HEADER.size:
        raise ValueError(f"it has {len(data)} bytes, a header alone has {_HEADER.size}")
    magic, version, code, n_sequences, n_indices = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ValueError(f"it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise ValueError(f"its version is {version}, not {VERSION}")
    if code not in TYPES:
        raise ValueError(f"its type has the code {code}; known are {min(TYPES)} to {max(TYPES)}")
    dtype = np.dtype(TYPES[code]).newbyteorder("<")
    if dtype.kind == "f":
        raise ValueError(f"its tokens are {TYPES[code]}, which are no ids")
    size = _HEADER.size + 12 * n_sequences + 8 * n_indices
    if len(data) == size + n_sequences and n_sequences:
        raise ValueError("it is multimodal (a mode per sequence)")
    if len(data) != size:
        raise ValueError(
            f"it has {len(data)} bytes; {n_sequences} sequences and {n_indices} document indices "
            f"take {size}"
        )
    at = _HEADER.size
    return MegatronFiles(
        prefix,
        dtype,
        np.frombuffer(data, "<i4", n_sequences, at),
        np.frombuffer(data, "<i8", n_sequences, at + 4 * n_sequences),
        np.frombuffer(data, "<i8", n_indices, at + 12 * n_sequences),
    )


def _check_tables(found: MegatronFiles, bin_path: Path) -> None:
    lengths, pointers, documents = found.lengths, found.pointers, found.documents
    n_sequences, width = len(lengths), found.dtype.itemsize
    if not len(documents) or documents[0] != 0 or documents[-1] != n_sequences:
        raise ValueError(f"its document indices do not lead from 0 to {n_sequences}")
    if (np.diff(documents) < 0).any():
        which = int(np.argmax(np.diff(documents) < 0))
        raise ValueError(f"document {which} ends before it begins")
    if n_sequences and lengths.min() < 0:
        raise ValueError(f"sequence {int(np.argmin(lengths))} has {int(lengths.min())} tokens")
    n_bytes, ends = bin_path.stat().st_size, pointers + lengths * np.int64(width)
    outside = (pointers < 0) | (ends > n_bytes) | (pointers % width != 0)
    if outside.any():
        one = int(np.argmax(outside))
        raise ValueError(
            f"sequence {one} lies at bytes {pointers[one]} to {ends[one]} of {bin_path.name}, "
            f"which has {n_bytes} bytes"
        )
    total = found.n_tokens * width
    if total != n_bytes:
        raise ValueError(f"its sequences have {total} bytes, {bin_path.name} has {n_bytes}")


def write_megatron(
    prefix: Path,
    dtype: np.dtype[Any],
    blocks: Iterable[np.ndarray],
    lengths: np.ndarray,
    documents: Int64[np.ndarray, " D"] | None = None,
) -> None:
    """Write ``prefix.bin`` and ``prefix.idx``, the index last.

    Args:
        prefix: Path without the suffixes; what stands there is replaced.
        dtype: One of :data:`TYPES` that holds all ids.
        blocks: The tokens, one sequence after the other.
        lengths: Tokens of each sequence.
        documents: First sequence of each document, and the number of sequences; None makes every
            sequence a document.

    Raises:
        PunaError: A sequence is too long, or an id does not fit the type.
    """
    if len(lengths) and int(lengths.max()) > _INT32_MAX:
        raise PunaError(f"a document has {int(lengths.max())} tokens, Megatron counts to "
                        f"{_INT32_MAX}", "leave it out or cut it")  # fmt: skip
    if documents is None:
        documents = np.arange(len(lengths) + 1)
    most = np.iinfo(dtype).max
    with atomic_path(_path(prefix, ".bin")) as aside, aside.open("wb") as file:
        for block in blocks:
            if len(block) and int(block.max()) > most:
                raise PunaError(f"the id {int(block.max())} does not fit {dtype}",
                                "give a wider type: --dtype int32")  # fmt: skip
            file.write(np.ascontiguousarray(block, dtype.newbyteorder("<")).tobytes())
    code = next(code for code, name in TYPES.items() if name == dtype.name)
    ends = np.cumsum(lengths, dtype=np.int64)
    pointers = (ends - lengths) * dtype.itemsize
    with atomic_path(_path(prefix, ".idx")) as aside, aside.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents)))
        for column, kind in ((lengths, "<i4"), (pointers, "<i8"), (documents, "<i8")):
            file.write(np.ascontiguousarray(column, kind).tobytes())


def _path(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
