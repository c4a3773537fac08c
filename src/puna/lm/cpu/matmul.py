"""Weight rows times tokens, in tiles.

A token's results are computed by the same instructions in the same order whatever other tokens
there are (see :mod:`puna.lm.cpu.vectors`).
"""

from __future__ import annotations

import llvmlite.binding as llvm
from numba import njit, types

from puna.data.kernels.buffers import Int, native
from puna.lm.cpu.intrinsics import INT8
from puna.lm.cpu.products import BLOCK, BLOCK_BYTES
from puna.lm.cpu.vectors import IS_WIDE, make_tile

AHEAD_BYTES = 16_384
"""Prefetched ahead in rows that lie one after the other."""
_WIDE, _BLOCK, _BLOCK_BYTES = IS_WIDE, BLOCK, BLOCK_BYTES

# Two rows share each load of the tokens' values; their sums still fit into the registers.
_tile_2_8, _tile_2_2 = make_tile(2, 8), make_tile(2, 2)
_tile_4_1, _tile_1_1 = make_tile(4, 1), make_tile(1, 1)
_ROWS_OF_4 = 2 if _WIDE else 1
_tile_r_4 = make_tile(_ROWS_OF_4, 4)

_SIGNATURE = types.void(*[types.int64] * 13)


@njit(nogil=True, inline="always")
def _multiply_block(
    kind: Int, weights: Int, row_bytes: Int, scales: Int, n_rows: Int, ahead: Int, inputs: Int,
    input_bytes: Int, n_tokens: Int, size: Int, out: Int, out_bytes: Int, adds: Int,
) -> None:  # fmt: skip
    token = 0
    while token < n_tokens:
        left = n_tokens - token
        x, y, row = inputs + token * input_bytes, out + token * out_bytes, 0
        if left >= 8 and _WIDE:
            taken = 8
            while row + 2 <= n_rows:
                _tile_2_8(
                    kind, weights + row * row_bytes, row_bytes, scales + 4 * row, ahead, x,
                    input_bytes, size, y + 4 * row, out_bytes, adds,
                )  # fmt: skip
                row += 2
        elif left >= 4:
            taken = 4
            while row + _ROWS_OF_4 <= n_rows:
                _tile_r_4(
                    kind, weights + row * row_bytes, row_bytes, scales + 4 * row, ahead, x,
                    input_bytes, size, y + 4 * row, out_bytes, adds,
                )  # fmt: skip
                row += _ROWS_OF_4
        elif left >= 2:
            taken = 2
            while row + 2 <= n_rows:
                _tile_2_2(
                    kind, weights + row * row_bytes, row_bytes, scales + 4 * row, ahead, x,
                    input_bytes, size, y + 4 * row, out_bytes, adds,
                )  # fmt: skip
                row += 2
        else:
            taken = 1
            while row + 4 <= n_rows:
                _tile_4_1(
                    kind, weights + row * row_bytes, row_bytes, scales + 4 * row, ahead, x,
                    input_bytes, size, y + 4 * row, out_bytes, adds,
                )  # fmt: skip
                row += 4
        while row < n_rows:
            for t in range(taken):
                _tile_1_1(
                    kind, weights + row * row_bytes, row_bytes, scales + 4 * row, ahead,
                    x + t * input_bytes, input_bytes, size, y + t * out_bytes + 4 * row, out_bytes,
                    adds,
                )  # fmt: skip
            row += 1
        token += taken


@native(_SIGNATURE)
def _multiply(
    kind: Int, weights: Int, row_bytes: Int, scales: Int, n_rows: Int, ahead: Int, inputs: Int,
    input_bytes: Int, n_tokens: Int, size: Int, out: Int, out_bytes: Int, adds: Int,
) -> None:  # fmt: skip
    block = _BLOCK if kind == INT8 else size
    for first in range(0, size, block):
        _multiply_block(
            kind, weights + first, row_bytes, scales, n_rows, ahead,
            inputs + first // block * _BLOCK_BYTES, input_bytes, n_tokens,
            min(block, size - first), out, out_bytes, adds if first == 0 else 1,
        )  # fmt: skip


# Kernels call it by name: linked into each of them it would be compiled a dozen times.
llvm.add_symbol("puna_multiply", _multiply.address)
multiply = types.ExternalFunction("puna_multiply", _SIGNATURE)
"""Compute ``out[t, row] = weights[row] . inputs[t]`` for some rows and all tokens.

With more tokens than a tile has, the rows are read again for every tile of tokens: they should fit
into the second-level cache.

``multiply(kind, weights, row_bytes, scales, n_rows, ahead, inputs, input_bytes, n_tokens, size,
out, out_bytes, adds)``:

- kind: Of the weights.
- weights: Address of the first row.
- row_bytes: From row to row.
- scales: Address of the scale of the first row; int8 only.
- n_rows: Rows.
- ahead: Bytes that prefetching is ahead.
- inputs: Address of the first token's float32 vector; for int8 weights, of what
  :func:`puna.lm.cpu.elementwise.narrow` makes of it.
- input_bytes: From token to token.
- n_tokens: Tokens.
- size: Columns.
- out: Address of the first token's result of the first row, float32.
- out_bytes: From token to token.
- adds: Whether to add to what stands in ``out`` instead of replacing it.
"""
