"""Unpacking the block formats of GGUF to float32, a pass over the bytes each.

A block holds small integers and the float16 scales (and offsets) that belong to them. Results are
those of the ``gguf`` library, bit for bit: a product is rounded before the next step.

Every kernel takes ``blocks_NS``, the bytes of N blocks of S bytes; ``half``, the float32 of every
float16 by its 16 bits; and ``out_NV``, the V values of each block to fill.

Source: ggml-org/ggml ``src/ggml-common.h`` and ``src/ggml-quants.c``.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Float, Int, kernel


@kernel
def _number(block: Array, at: Int, half: Array) -> Float:
    return half[np.int64(block[at]) | (np.int64(block[at + 1]) << 8)]


@kernel
def q8_0(blocks_NS: Array, half: Array, out_NV: Array) -> None:
    """Unpack a scale and 32 signed bytes."""
    for n in range(len(blocks_NS)):
        block, out = blocks_NS[n], out_NV[n]
        scale = _number(block, 0, half)
        for i in range(32):
            out[i] = np.float32(np.int8(block[2 + i])) * scale


@kernel
def q4_0(blocks_NS: Array, half: Array, out_NV: Array) -> None:
    """Unpack a scale and 32 half bytes: first all low ones, then the high ones, less 8."""
    for n in range(len(blocks_NS)):
        block, out = blocks_NS[n], out_NV[n]
        scale = _number(block, 0, half)
        for i in range(16):
            byte = np.int32(block[2 + i])
            out[i] = np.float32((byte & 15) - 8) * scale
            out[16 + i] = np.float32((byte >> 4) - 8) * scale


@kernel
def q4_1(blocks_NS: Array, half: Array, out_NV: Array) -> None:
    """Unpack a scale, an offset and 32 half bytes."""
    for n in range(len(blocks_NS)):
        block, out = blocks_NS[n], out_NV[n]
        scale, offset = _number(block, 0, half), _number(block, 2, half)
        for i in range(16):
            byte = np.int32(block[4 + i])
            out[i] = np.float32(byte & 15) * scale + offset
            out[16 + i] = np.float32(byte >> 4) * scale + offset


@kernel
def _fifth_bit(block: Array, at: Int, i: Int) -> Int:
    """Return the fifth bit of value ``i`` of 32; the four bytes from ``at`` on hold them."""
    return (np.int32(block[at + i // 8]) >> (i % 8)) & 1


@kernel
def q5_0(blocks_NS: Array, half: Array, out_NV: Array) -> None:
    """Unpack a scale, the 32 fifth bits and 32 half bytes, less 16."""
    for n in range(len(blocks_NS)):
        block, out = blocks_NS[n], out_NV[n]
        scale = _number(block, 0, half)
        for i in range(16):
            byte = np.int32(block[6 + i])
            low, high = _fifth_bit(block, 2, i), _fifth_bit(block, 2, 16 + i)
            out[i] = np.float32(((byte & 15) | (low << 4)) - 16) * scale
            out[16 + i] = np.float32(((byte >> 4) | (high << 4)) - 16) * scale


@kernel
def q5_1(blocks_NS: Array, half: Array, out_NV: Array) -> None:
    """Unpack a scale, an offset, the 32 fifth bits and 32 half bytes."""
    for n in range(len(blocks_NS)):
        block, out = blocks_NS[n], out_NV[n]
        scale, offset = _number(block, 0, half), _number(block, 2, half)
        for i in range(16):
            byte = np.int32(block[8 + i])
            low, high = _fifth_bit(block, 4, i), _fifth_bit(block, 4, 16 + i)
            out[i] = np.float32((byte & 15) | (low << 4)) * scale + offset
            out[16 + i] = np.float32((byte >> 4) | (high << 4)) * scale + offset


@kernel
def _group_scale(block: Array, group: Int) -> Int:
    """Return the six-bit scale of one of 8 groups; 12 bytes from 4 on hold 8 and 8 offsets."""
    if group < 4:
        return np.int32(block[4 + group]) & 63
    high = np.int32(block[group]) >> 6
    return (np.int32(block[8 + group]) & 15) | (high << 4)


@kernel
def _group_offset(block: Array, group: Int) -> Int:
    """Return the six-bit offset of one of 8 groups."""
    if group < 4:
        return np.int32(block[8 + group]) & 63
    high = np.int32(block[4 + group]) >> 6
    return (np.int32(block[8 + group]) >> 4) | (high << 4)


@kernel
def q4_k(blocks_NS: Array, half: Array, out_NV: Array) -> None:
    """Unpack 8 groups of 32; groups 2j and 2j + 1 are the low and high halves of 32 bytes."""
    for n in range(len(blocks_NS)):
        block, out = blocks_NS[n], out_NV[n]
        unit, step = _number(block, 0, half), _number(block, 2, half)
        for group in range(8):
            scale = np.float32(_group_scale(block, group)) * unit
            offset = np.float32(_group_offset(block, group)) * step
            start, shift = 16 + group // 2 * 32, group % 2 * 4
            for i in range(32):
                number = (np.int32(block[start + i]) >> shift) & 15
                out[group * 32 + i] = np.float32(number) * scale - offset


@kernel
def q5_k(blocks_NS: Array, half: Array, out_NV: Array) -> None:
    """Unpack as in ``q4_k``, with a fifth bit: bit g of the 32 bytes from 16 on is group g's."""
    for n in range(len(blocks_NS)):
        block, out = blocks_NS[n], out_NV[n]
        unit, step = _number(block, 0, half), _number(block, 2, half)
        for group in range(8):
            scale = np.float32(_group_scale(block, group)) * unit
            offset = np.float32(_group_offset(block, group)) * step
            start, shift = 48 + group // 2 * 32, group % 2 * 4
            for i in range(32):
                fifth = (np.int32(block[16 + i]) >> group) & 1
                number = (np.int32(block[start + i]) >> shift) & 15
                out[group * 32 + i] = np.float32(number | (fifth << 4)) * scale - offset


@kernel
def q6_k(blocks_NS: Array, half: Array, out_NV: Array) -> None:
    """Unpack 16 groups of 16 with signed scales, less 32.

    Each half of the values has 64 bytes of lower four bits (the low halves of all, then the high
    ones) and 32 bytes of upper two bits (two at a time).
    """
    for n in range(len(blocks_NS)):
        block, out = blocks_NS[n], out_NV[n]
        unit = _number(block, 208, half)
        for group in range(16):
            scale = np.float32(np.int8(block[192 + group])) * unit
            side, place = group // 8, group % 8 * 16  # place of the first value in its half
            low, low_shift = side * 64 + place % 64, place // 64 * 4
            high, high_shift = 128 + side * 32 + place % 32, place // 32 * 2
            for i in range(16):
                lower = (np.int32(block[low + i]) >> low_shift) & 15
                upper = (np.int32(block[high + i]) >> high_shift) & 3
                out[group * 16 + i] = np.float32((lower | (upper << 4)) - 32) * scale
