"""The block formats of GGUF: unpacked to float32, and packed as Q8_0.

Shapes: R rows, B bytes of a row, N blocks, S bytes of a block, V values of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from puna.core.gguf import GGML_TYPES
from puna.core.pool import usable_cores
from puna.model.formats.kernels import blocks as kernels
from puna.model.formats.parts import SERIAL_VALUES

READABLE: dict[str, Callable[[Any, Any, Any], None]] = {
    "Q4_0": kernels.q4_0, "Q4_1": kernels.q4_1, "Q5_0": kernels.q5_0, "Q5_1": kernels.q5_1,
    "Q8_0": kernels.q8_0, "Q4_K": kernels.q4_k, "Q5_K": kernels.q5_k, "Q6_K": kernels.q6_k,
}  # fmt: skip
"""Block formats that can be read: (blocks, float16 by their bits, values to fill)."""
_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
PIECE_VALUES = 1 << 20
"""What a thread takes at a time."""
_Q8_BLOCK, _Q8_BYTES, _Q8_MAX = 32, 34, 127


def dequantize(
    raw_RB: UInt8[Tensor, "rows row_bytes"], type_name: str
) -> Float[Tensor, "rows columns"]:
    """Return a quantised matrix as float32; a large one is unpacked by all cores.

    Args:
        raw_RB: Its bytes, row by row, contiguous.
        type_name: A key of :data:`READABLE`.
    """
    _, block, size = GGML_TYPES[type_name]
    blocks_NS = raw_RB.view(-1, size).numpy()
    blocks_NS.flags.writeable = False  # mapped or not: one signature, compiled once
    out_NV = torch.empty(len(blocks_NS), block)
    values_NV, unpack, step = out_NV.numpy(), READABLE[type_name], PIECE_VALUES // block

    def work(start: int) -> None:
        unpack(blocks_NS[start : start + step], _HALF, values_NV[start : start + step])

    starts = range(0, len(blocks_NS), step)
    if len(starts) > 1 and usable_cores() > 1:
        with ThreadPoolExecutor(min(usable_cores(), len(starts))) as pool:
            list(pool.map(work, starts))
    else:
        for start in starts:
            work(start)
    return out_NV.view(len(raw_RB), -1)


def quantize_q8_0(tensor: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "blocks 34"]:
    """Round to Q8_0: blocks of 32 signed bytes with a float16 scale.

    The scale maps the largest magnitude of a block to 127; halves round away from zero.

    Args:
        tensor: Its rows are whole blocks.

    Raises:
        ValueError: A value is not finite, or too large for a scale of float16.
    """
    values_NV = tensor.reshape(-1, _Q8_BLOCK)
    out_NS = torch.empty(len(values_NV), _Q8_BYTES, dtype=torch.uint8)
    step = SERIAL_VALUES // _Q8_BLOCK  # they stay in the cache from one operation to the next
    for start in range(0, len(values_NV), step):
        _to_q8_0(values_NV[start : start + step].float(), out_NS[start : start + step])
    return out_NS


def _to_q8_0(values_NV: Tensor, out_NS: Tensor) -> None:
    largest_N1 = values_NV.abs().amax(dim=1, keepdim=True)
    scale_N1 = largest_N1 / _Q8_MAX
    half_N1 = scale_N1.to(torch.float16)
    if not bool(half_N1.isfinite().all()):
        worst = float(largest_N1[~half_N1.isfinite()][0])
        raise ValueError(f"a value of magnitude {worst:g} does not fit into Q8_0")
    inverse_N1 = 1 / scale_N1
    inverse_N1[inverse_N1.isinf()] = 0.0  # of zeros, and of values so small that the scale is 0
    scaled_NV = values_NV * inverse_N1
    size_NV = scaled_NV.abs()
    floor_NV = size_NV.floor()
    rounded_NV = (floor_NV + (2 * (size_NV - floor_NV)).floor()) * scaled_NV.sign()
    out_NS[:, :2] = half_N1.view(torch.uint8)
    out_NS[:, 2:] = rounded_NV.to(torch.int8).view(torch.uint8)
