"""Bit flips on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def flip_bit(x: Tensor, element: int, bit: int) -> float:
    """Flip one bit of one element in place; return how far its value moved (NaN where it is none).

    Args:
        x: Contiguous.
        element: In the order of memory.
        bit: From 0, the lowest.

    Raises:
        ValueError: The tensor is not contiguous, or has no such bit.
    """
    n_bits = 8 * x.element_size()
    if not x.is_contiguous() or not 0 <= bit < n_bits:
        raise ValueError(f"cannot flip bit {bit} of {n_bits} in a tensor of stride {x.stride()}")
    flat_N = x.detach().view(-1)
    before = float(flat_N[element])
    words_N = flat_N.view(_WORDS[x.element_size()])
    mask = 1 << bit
    if x.element_size() > 1 and bit == n_bits - 1:
        mask -= 1 << n_bits
    words_N[element] ^= mask
    return abs(float(flat_N[element]) - before)
