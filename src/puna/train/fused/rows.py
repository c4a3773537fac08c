"""Runs a compiled loop over the rows of tensors, shared by PyTorch's number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.lm.cpu.crew import crew_of

_MIN_ELEMENTS = 1 << 15  # per thread; fewer are done before another thread has woken up


def as_array(x: Tensor) -> np.ndarray:
    """Look at a contiguous tensor as numpy does; bfloat16 as int16 with the same bits."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def over_rows(loop: Any, n_rows: int, *args: Any) -> None:
    """Call ``loop(first, last, *args)`` for parts of the rows.

    Args:
        loop: From :mod:`puna.train.fused.loops`.
        n_rows: How many rows there are.
        args: The first one is an array that tells by its size how much there is to do.
    """
    n_threads = min(torch.get_num_threads(), args[0].size // _MIN_ELEMENTS, n_rows)
    if n_threads <= 1:
        loop(0, n_rows, *args)
        return

    def part(number: int) -> None:
        loop(n_rows * number // n_threads, n_rows * (number + 1) // n_threads, *args)

    crew_of(n_threads).run(part)
