"""The block formats of GGUF in plain PyTorch: to float32, and to Q8_0.

A quantised row is a sequence of blocks; each holds small integers and the scale (and offset) they
are multiplied with. Results are those of the ``gguf`` library, bit for bit: products and sums are
rounded one after the other, never fused.

Source: ggml-org/ggml ``src/ggml-common.h`` and ``src/ggml-quants.c``.

Shapes: N blocks, S bytes of a block; values are (N, values of a block).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from puna.core.gguf import GGML_TYPES
from puna.model.formats.parts import SERIAL_VALUES

_Q8_BLOCK, _Q8_BYTES, _Q8_MAX = 32, 34, 127


def dequantize(
    raw_RB: UInt8[Tensor, "rows row_bytes"], type_name: str
) -> Float[Tensor, "rows columns"]:
    """Return a quantised matrix as float32.

    Args:
        raw_RB: Its bytes, row by row.
        type_name: A key of :data:`READABLE`.
    """
    _, block, size = GGML_TYPES[type_name]
    blocks_NS = raw_RB.view(-1, size)
    out_NV = torch.empty(len(blocks_NS), block)
    step = SERIAL_VALUES // block  # values that stay in the cache from one operation to the next
    for start in range(0, len(blocks_NS), step):
        READABLE[type_name](blocks_NS[start : start + step], out_NV[start : start + step])
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
    step = SERIAL_VALUES // _Q8_BLOCK
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


def _half(blocks_NS: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte of each block as float32, (N, 1)."""
    return blocks_NS[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(bytes_NB: Tensor) -> Tensor:
    """Return the low nibbles of all bytes, then the high ones."""
    return torch.cat((bytes_NB & 0x0F, bytes_NB >> 4), dim=1)


def _q8_0(blocks_NS: Tensor, out_NV: Tensor) -> None:
    out_NV.copy_(blocks_NS[:, 2:].view(torch.int8)).mul_(_half(blocks_NS, 0))


def _q4_0(blocks_NS: Tensor, out_NV: Tensor) -> None:
    out_NV.copy_(_nibbles(blocks_NS[:, 2:])).sub_(8).mul_(_half(blocks_NS, 0))


def _q4_1(blocks_NS: Tensor, out_NV: Tensor) -> None:
    out_NV.copy_(_nibbles(blocks_NS[:, 4:])).mul_(_half(blocks_NS, 0)).add_(_half(blocks_NS, 2))


def _fifth_bits(blocks_NS: Tensor, at: int) -> Tensor:
    """Return bit i of the four bytes at ``at`` as 16 or 0, (N, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits_N48 = (blocks_NS[:, at : at + 4].unsqueeze(-1) >> shifts) & 1
    return bits_N48.flatten(1) << 4


def _q5_0(blocks_NS: Tensor, out_NV: Tensor) -> None:
    values_NV = _nibbles(blocks_NS[:, 6:]) | _fifth_bits(blocks_NS, 2)
    out_NV.copy_(values_NV).sub_(16).mul_(_half(blocks_NS, 0))


def _q5_1(blocks_NS: Tensor, out_NV: Tensor) -> None:
    values_NV = _nibbles(blocks_NS[:, 8:]) | _fifth_bits(blocks_NS, 4)
    out_NV.copy_(values_NV).mul_(_half(blocks_NS, 0)).add_(_half(blocks_NS, 2))


def _k_scales(packed_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the six-bit scales and offsets of 8 groups from 12 bytes, each (N, 8, 1)."""
    a, b, c = packed_NB[:, 0:4], packed_NB[:, 4:8], packed_NB[:, 8:12]
    scales = torch.cat((a & 0x3F, (c & 0x0F) | ((a >> 6) << 4)), dim=1)
    offsets = torch.cat((b & 0x3F, (c >> 4) | ((b >> 6) << 4)), dim=1)
    return scales.float().unsqueeze(-1), offsets.float().unsqueeze(-1)


def _k_groups(bytes_NB: Tensor) -> Tensor:
    """Return the nibbles of 4 x 32 bytes: per 32 bytes the low ones, then the high, (N, 8, 32)."""
    parts_N432 = bytes_NB.view(-1, 4, 32)
    return torch.stack((parts_N432 & 0x0F, parts_N432 >> 4), dim=2).view(-1, 8, 32)


def _apply_k(blocks_NS: Tensor, values_N832: Tensor, out_NV: Tensor) -> None:
    scales_N81, offsets_N81 = _k_scales(blocks_NS[:, 4:16])
    scales_N81.mul_(_half(blocks_NS, 0).unsqueeze(-1))
    offsets_N81.mul_(_half(blocks_NS, 2).unsqueeze(-1))
    out_NV.view(-1, 8, 32).copy_(values_N832).mul_(scales_N81).sub_(offsets_N81)


def _q4_k(blocks_NS: Tensor, out_NV: Tensor) -> None:
    _apply_k(blocks_NS, _k_groups(blocks_NS[:, 16:].contiguous()), out_NV)


def _q5_k(blocks_NS: Tensor, out_NV: Tensor) -> None:
    shifts = torch.arange(8, dtype=torch.uint8).view(8, 1)
    fifth_N832 = ((blocks_NS[:, 16:48].unsqueeze(1) >> shifts) & 1) << 4
    _apply_k(blocks_NS, _k_groups(blocks_NS[:, 48:].contiguous()) | fifth_N832, out_NV)


def _q6_k(blocks_NS: Tensor, out_NV: Tensor) -> None:
    low_N2B = blocks_NS[:, :128].reshape(-1, 2, 64)
    high_N2B = blocks_NS[:, 128:192].reshape(-1, 2, 32)
    low_N2V = torch.cat((low_N2B & 0x0F, low_N2B >> 4), dim=2)
    high_N2V = torch.cat([((high_N2B >> shift) & 3) << 4 for shift in (0, 2, 4, 6)], dim=2)
    scales_NG1 = blocks_NS[:, 192:208].view(torch.int8).float().unsqueeze(-1)
    scales_NG1 = scales_NG1 * _half(blocks_NS, 208).unsqueeze(-1)
    values_NG16 = out_NV.view(-1, 16, 16)
    values_NG16.copy_((low_N2V | high_N2V).view(-1, 16, 16)).sub_(32).mul_(scales_NG1)


READABLE: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
"""Block formats that can be read: (blocks, values to fill)."""
