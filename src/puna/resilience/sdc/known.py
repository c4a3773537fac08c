"""Tests with known answers: a machine computes what every machine must get.

Exact by construction, so no table of results per processor is needed: products of small whole
numbers are exact in float32 in any order of summation, and their modular checksum is known from
integer arithmetic. Attention over one-hot keys must return the very value rows. Memory is written
with patterns and read back by digest. Short enough for a start, repeated for a burn-in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from puna.resilience.sdc.digest import digest_tensor

_SIZE = 256
_PATTERN_BYTES = 4 << 20


def run_known(device: torch.device | str = "cpu", *, seconds: float = 0.0) -> list[str]:
    """Run all tests; return the names of those that failed, each once.

    Args:
        device: Where to compute.
        seconds: Repeat them with other numbers for so long (burn-in); 0 runs them once.
    """
    device, failed = torch.device(device), dict[str, None]()
    begin_s, turn = time.monotonic(), 0
    while turn == 0 or time.monotonic() - begin_s < seconds:
        for name, test in KNOWN.items():
            if not test(device, turn):
                failed[name] = None
        turn += 1
    return list(failed)


def _whole(shape: tuple[int, ...], turn: int, largest: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 + turn)
    return torch.randint(-largest, largest + 1, shape, generator=generator)


def _product(device: torch.device, turn: int, dtype: torch.dtype, largest: int) -> bool:
    """Whole numbers whose sums stay below 2^24 are exact in float32, whatever the order."""
    a_MK, b_KN = _whole((2, _SIZE, _SIZE), turn, largest)
    c_MN = a_MK.to(device, dtype) @ b_KN.to(device, dtype)
    return torch.equal(c_MN.cpu().to(torch.int64), a_MK @ b_KN)


def _single(device: torch.device, turn: int) -> bool:
    return _product(device, turn, torch.float32, 127)


def _half(device: torch.device, turn: int) -> bool:
    """Sums of 256 products of -1, 0 and 1 are at most 256, which bf16 holds exactly."""
    return _product(device, turn, torch.bfloat16, 1)


def _attention(device: torch.device, turn: int) -> bool:
    """A query that only one key answers gets that key's value, to the bit."""
    n = 64
    order_N = torch.randperm(n, generator=torch.Generator().manual_seed(turn))
    keys_ND = torch.eye(n, device=device)
    queries_ND = keys_ND[order_N.to(device)] * 2048.0 * math.sqrt(n)
    values_ND = _whole((n, n), turn, 1000).float().to(device)
    out_ND = torch.nn.functional.scaled_dot_product_attention(
        queries_ND[None, None], keys_ND[None, None], values_ND[None, None]
    )[0, 0]
    return torch.equal(out_ND, values_ND[order_N.to(device)])


def _elementwise(device: torch.device, turn: int) -> bool:
    """Logarithms and roots come back; scaling by powers of two is exact."""
    x_N = (1 + _whole((1 << 16,), turn, 1000).abs()).to(device, torch.float32)
    is_exact = torch.equal((x_N * x_N).sqrt(), x_N) and torch.equal(x_N * 0.125 * 8.0, x_N)
    return is_exact and bool(((x_N.log().exp() / x_N - 1).abs() < 1e-5).all())


def _memory(device: torch.device, turn: int) -> bool:
    """Patterns that toggle every bit, and their complements, are read back as they were written."""
    for pattern in (0x00, 0xFF, 0x55, 0xAA, turn % 256):
        one_N = torch.full((_PATTERN_BYTES,), pattern, dtype=torch.uint8, device=device)
        wanted = digest_tensor(one_N)
        two_N = one_N.clone()
        one_N.bitwise_not_().bitwise_not_()
        if digest_tensor(one_N) != wanted or digest_tensor(two_N) != wanted:
            return False
    return True


KNOWN: Mapping[str, Callable[[torch.device, int], bool]] = {
    "product in fp32": _single,
    "product in bf16": _half,
    "attention": _attention,
    "elementwise": _elementwise,
    "memory": _memory,
}
"""Name and test: returns whether the answer was right."""
