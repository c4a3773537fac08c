"""Small tensors in parts that one thread works on; torch is not imported.

torch gives an operation on more than 32,768 values to several threads, which then wait for each
other. On a busy machine that takes far longer than the work: a checkpoint of hundreds of small
tensors loaded four times as slowly. Large operations are worth the wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SERIAL_VALUES = 1 << 15
"""As many values are worked on by one thread."""
_LARGE_VALUES = 1 << 22


def parts_of(tensor: Tensor) -> Sequence[Tensor]:
    """Cut a small tensor along its first dimension; a large one stays whole."""
    if tensor.ndim == 0 or tensor.numel() >= _LARGE_VALUES:
        return (tensor,)
    row_values = max(tensor.numel() // max(len(tensor), 1), 1)
    return tensor.split(max(SERIAL_VALUES // row_values, 1))
