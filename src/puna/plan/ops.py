"""Arithmetic that works on one job (floats) and on many at once (numpy arrays) alike.

The formulas of the cost model are written once. On floats they cost microseconds, on arrays a
search prices thousands of layouts in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Num = Any
"""A float, or a float64 array of shape (N,): one value per job."""


@dataclass(frozen=True, slots=True)
class Ops:
    """The few functions that floats and arrays write differently."""

    maximum: Callable[[Num, Num], Num]
    minimum: Callable[[Num, Num], Num]
    where: Callable[[Any, Num, Num], Num]
    """The second value where the condition holds, else the third; both are computed."""
    ceil: Callable[[Num], Num]
    log2: Callable[[Num], Num]
    sqrt: Callable[[Num], Num]


def _choose(condition: Any, a: Num, b: Num) -> Num:
    return a if condition else b


SCALAR = Ops(max, min, _choose, math.ceil, math.log2, math.sqrt)
ARRAY = Ops(np.maximum, np.minimum, np.where, np.ceil, np.log2, np.sqrt)


def ops_of(value: Num) -> Ops:
    """Return the functions that fit a value."""
    return ARRAY if isinstance(value, np.ndarray) else SCALAR
