"""Bitwise digests of tensors, fast enough for every step.

On a CPU a digest is XXH3-64 of the raw bytes, which one core computes as fast as it reads memory.
A single flipped bit changes XXH3's accumulator for certain (each lane of it is a sum of words and
a bijective scramble); that the last fold to 64 bits hides it has a chance of 2^-64
(https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md). On a GPU, where bytes must not travel,
it is a sum of 32-bit words, each times an odd number of its place: a flipped bit changes the sum by
an odd number times a power of two below 2^64, which is never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import xxhash
from torch import Tensor

_WORDS_PER_PIECE = 1 << 22
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed number, which torch wants


def digest_tensor(x: Tensor) -> int:
    """Return the digest of a tensor's bytes, below 2^64; equal bits have equal digests.

    Args:
        x: Any dtype and layout, maybe a part of a DTensor (``to_local`` first).
    """
    x = x.detach()
    if not x.is_contiguous():
        x = x.contiguous()
    if x.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest_words(x)


def digest_words(x: Tensor) -> int:
    """Return the digest by sums of words; on the tensor's own device."""
    bytes_N = x.detach().contiguous().reshape(-1).view(torch.uint8)
    n_whole = bytes_N.numel() // 4 * 4
    words_N = bytes_N[:n_whole].view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(words_N), _WORDS_PER_PIECE):
        total += _piece(words_N[start : start + _WORDS_PER_PIECE].long() & 0xFFFFFFFF, start)
    if n_whole < bytes_N.numel():
        total += _piece(bytes_N[n_whole:].long(), len(words_N))
    return int(total.item()) % (1 << 64)


def _piece(words_N: Tensor, start: int) -> Tensor:
    """Sum words times odd numbers; int64 products wrap around."""
    mixed_N = torch.arange(start + 1, start + 1 + len(words_N), device=words_N.device) * _GOLDEN
    mixed_N ^= mixed_N >> 29
    mixed_N *= _GOLDEN
    return (words_N * (mixed_N | 1)).sum()


def digest_all(tensors: Iterable[Tensor]) -> np.ndarray:
    """Return the digest of each tensor (uint64)."""
    return np.array([digest_tensor(x) for x in tensors], np.uint64)


def fold(digests: np.ndarray | list[int]) -> int:
    """Return one digest of many."""
    return xxhash.xxh3_64_intdigest(np.asarray(digests, np.uint64).tobytes())


def digest_named(tensors: Mapping[str, Tensor]) -> int:
    """Return one digest of named tensors, whatever their order."""
    return fold(digest_all(tensors[name] for name in sorted(tensors)))
