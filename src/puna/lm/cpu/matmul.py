"""Weight rows times tokens, in tiles.

A token's results are computed by the same instructions in the same order whatever other tokens
there are (see :mod:`puna.lm.cpu.intrinsics`).
"""

from __future__ import annotations

from puna.data.kernels.buffers import Array, Int, kernel
from puna.lm.cpu.intrinsics import FLOAT32, INT8, load_float, make_tile

SCRATCH = 16
"""Floats of scratch that each thread needs: the sums of a tile, few enough to stay in registers."""

_tile_8_2, _tile_8_1 = make_tile(2, 8), make_tile(1, 8)
_tile_4_4, _tile_4_1 = make_tile(4, 4), make_tile(1, 4)
_tile_2_4, _tile_2_1 = make_tile(4, 2), make_tile(1, 2)
_tile_1_2, dot = make_tile(2, 1), make_tile(1, 1)


@kernel
def multiply(
    kind: Int, weights: Int, row_bytes: Int, scales: Int, first: Int, last: Int, inputs: Array,
    n_tokens: Int, size: Int, out: Array, adds: Int, scratch: Array,
) -> None:  # fmt: skip
    """Compute ``out[t, row] = weights[row] . inputs[t]`` for the rows ``first`` to ``last``.

    Args:
        kind: Of the weights.
        weights: Address of row 0.
        row_bytes: From row to row.
        scales: Address of one float32 per row; only for int8.
        first: First row.
        last: Row after the last one.
        inputs: float32 (tokens, at least ``size``), rows contiguous.
        n_tokens: Tokens of ``inputs`` and ``out``.
        size: Columns of the weights.
        out: float32 (tokens, at least ``last``).
        adds: Whether to add to what stands in ``out`` instead of replacing it.
        scratch: float32, :data:`SCRATCH`.
    """
    base, stride, to = inputs.ctypes.data, inputs.strides[0], scratch.ctypes.data
    token = 0
    while token < n_tokens:
        left = n_tokens - token
        given = base + token * stride
        row = first
        if left >= 8:
            taken, step = 8, 2
        elif left >= 4:
            taken, step = 4, 4
        elif left >= 2:
            taken, step = 2, 4
        else:
            taken, step = 1, 2
        while row < last:
            if last - row < step:
                step = 1
            at = weights + row * row_bytes
            if taken == 8:
                if step == 2:
                    _tile_8_2(kind, at, row_bytes, given, stride, size, to)
                else:
                    _tile_8_1(kind, at, row_bytes, given, stride, size, to)
            elif taken == 4:
                if step == 4:
                    _tile_4_4(kind, at, row_bytes, given, stride, size, to)
                else:
                    _tile_4_1(kind, at, row_bytes, given, stride, size, to)
            elif taken == 2:
                if step == 4:
                    _tile_2_4(kind, at, row_bytes, given, stride, size, to)
                else:
                    _tile_2_1(kind, at, row_bytes, given, stride, size, to)
            elif step == 2:
                _tile_1_2(kind, at, row_bytes, given, stride, size, to)
            else:
                dot(kind, at, row_bytes, given, stride, size, to)
            for t in range(taken):
                for r in range(step):
                    value = scratch[t * step + r]
                    if kind == INT8:
                        value *= load_float(FLOAT32, scales + 4 * (row + r))
                    if adds:
                        out[token + t, row + r] += value
                    else:
                        out[token + t, row + r] = value
            row += step
        token += taken
