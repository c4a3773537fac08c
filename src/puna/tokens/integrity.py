"""Finding damage before it is trained on: the tokens of a shard in blocks with a hash each.

A block is hashed when its first token is asked for, and not again. That costs about 4 microseconds
per block and the reading of up to 64 KiB around a document: nothing beside a training step, while
one hash over a whole shard would cost minutes before the first step.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import xxhash
from jaxtyping import UInt64

BLOCK_BYTES = 64 << 10
"""Bytes under one hash; a multiple of the size of a token."""


class DamagedBlocksError(Exception):
    """Tokens are not those that were written.

    Args:
        first: First token of the damaged blocks.
        end: One past the last.
        why: What is wrong with them.
    """

    def __init__(self, first: int, end: int, why: str) -> None:
        super().__init__(why)
        self.first, self.end, self.why = first, end, why

    def __reduce__(self) -> tuple[type[DamagedBlocksError], tuple[int, int, str]]:
        """Survive the trip from another process."""
        return type(self), (self.first, self.end, self.why)


class TokenArray(Protocol):
    """The ids of all documents of a shard: a mapped file, checked or not, here or far away."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> np.ndarray:
        """Return some ids; a :class:`DamagedBlocksError` when they are not those written."""
        ...


class BlockHasher:
    """Collects the hashes of the blocks of a file while it is written."""

    def __init__(self) -> None:
        self._hashes: list[int] = []
        self._open, self._n_bytes = xxhash.xxh3_64(), 0

    def update(self, data: bytes) -> None:
        """Take the next bytes of the file."""
        view = memoryview(data)
        while len(view):
            n_taken = min(len(view), BLOCK_BYTES - self._n_bytes)
            self._open.update(view[:n_taken])
            self._n_bytes += n_taken
            view = view[n_taken:]
            if self._n_bytes == BLOCK_BYTES:
                self._close()

    def finish(self) -> UInt64[np.ndarray, " blocks"]:
        """Return the hashes; the last block may be short."""
        if self._n_bytes:
            self._close()
        return np.array(self._hashes, np.uint64)

    def _close(self) -> None:
        self._hashes.append(self._open.intdigest())
        self._open, self._n_bytes = xxhash.xxh3_64(), 0


def damaged_blocks(data: Any, hashes: UInt64[np.ndarray, " blocks"]) -> list[int]:
    """Return which blocks of some bytes do not have their hash.

    Args:
        data: Bytes that begin with a block; the last block may be short.
        hashes: One per block.
    """
    view = memoryview(data).cast("B")
    return [
        number
        for number, expected in enumerate(hashes.tolist())
        if xxhash.xxh3_64_intdigest(view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
        != expected
    ]


class CheckedTokens:
    """The tokens of a file, each block compared with its hash before it is first given out.

    Args:
        tokens: The mapped file.
        hashes: xxh3-64 of each block of :data:`BLOCK_BYTES`.
        n_tokens: Tokens that were written, where the file was cut short: then the blocks that are
            missing are damaged.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        hashes: UInt64[np.ndarray, " blocks"],
        n_tokens: int | None = None,
    ) -> None:
        # a plain view: slicing a memmap costs microseconds
        self._tokens = np.asarray(tokens).view(np.ndarray)
        self._hashes = hashes
        self._n_tokens = len(tokens) if n_tokens is None else n_tokens
        self._per_block = BLOCK_BYTES // tokens.dtype.itemsize
        self._good = np.zeros(len(hashes), bool)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids."""
        return self._tokens.dtype

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, key: slice) -> np.ndarray:
        """Return some tokens.

        Raises:
            DamagedBlocksError: A block in which they lie is not as it was written.
        """
        start, end, _ = key.indices(len(self))
        if end > start:
            first, last = start // self._per_block, (end - 1) // self._per_block + 1
            if not self._good[first:last].all():
                self._check(first, last)
        return self._tokens[key]

    def _check(self, first: int, last: int) -> None:
        window = self._tokens[first * self._per_block : last * self._per_block]
        bad = damaged_blocks(window, self._hashes[first:last])
        good = np.ones(last - first, bool)
        good[bad] = False
        self._good[first:last] |= good
        if bad:
            raise damage(first, bad, self._per_block, len(self))


def damage(first: int, bad: list[int], per_block: int, n_tokens: int) -> DamagedBlocksError:
    """Describe damaged blocks, numbered from block ``first`` on."""
    begin = (first + bad[0]) * per_block
    end = min((first + bad[-1] + 1) * per_block, n_tokens)
    return DamagedBlocksError(begin, end, "its bytes do not have the hash they were written with")
