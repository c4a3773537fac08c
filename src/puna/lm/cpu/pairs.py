"""Bfloat16 weight rows times many tokens, which lie as :mod:`puna.lm.cpu.lanes` says.

Compiles for a processor that multiplies pairs of bfloat16, and so must only be imported where
:data:`puna.lm.cpu.vectors.MULTIPLIES_PAIRS` says that there is one.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from puna.data.kernels.buffers import Int, native
from puna.lm.cpu.intrinsics import (
    FLOAT32,
    LANES,
    LINE_BYTES,
    VECTOR,
    emit_load,
    emit_prefetch,
    emit_store,
)
from puna.lm.cpu.lanes import (
    PAIRS,
    VECTOR_BYTES,
    address_instruction,
    emit_after,
    emit_at,
    emit_one_pair,
    emit_pairs,
    floats,
)
from puna.lm.cpu.vectors import constant, emit_loop

_VECTOR_BYTES = VECTOR_BYTES
_UNROLLED = 8  # pairs: half a cache line of a weight row
_MULTIPLY_PAIRS = "llvm.x86.avx512bf16.dpbf16ps.512"


def make_pair_tile(n_vectors: int, n_rows: int) -> Any:
    """Return an intrinsic that multiplies a few bfloat16 rows with a few vectors of tokens.

    ``tile(weights, row_bytes, inputs, input_bytes, n_pairs, out, out_bytes, adds)``: addresses,
    strides from row to row and from vector to vector; columns of the rows, in pairs; where the
    first vector's results begin, one float32 vector per row; whether to add to them.

    Args:
        n_vectors: Vectors of tokens.
        n_rows: Rows; the product is at least 16 where the instruction is to have no wait, and at
            most 24, the registers.
    """

    @address_instruction
    def tile(
        builder: ir.IRBuilder, weights: Any, row_bytes: Any, inputs: Any, input_bytes: Any,
        n_pairs: Any, out: Any, out_bytes: Any, adds: Any,
    ) -> None:  # fmt: skip
        rows = [builder.add(weights, builder.mul(row_bytes, constant(r))) for r in range(n_rows)]
        vectors = [
            builder.add(inputs, builder.mul(input_bytes, constant(v))) for v in range(n_vectors)
        ]
        sums = _emit_pair_sums(builder, rows, row_bytes, vectors, n_pairs)
        is_sum = builder.icmp_signed("!=", adds, constant(0))
        for v in range(n_vectors):
            start = builder.add(out, builder.mul(out_bytes, constant(v)))
            for r in range(n_rows):
                place, new = emit_after(builder, start, r), sums[r * n_vectors + v]
                old = emit_load(builder, place, FLOAT32, LANES)
                emit_store(builder, builder.select(is_sum, builder.fadd(old, new), new), place)

    return tile


def _emit_pair_sums(
    builder: ir.IRBuilder, rows: list[Any], row_bytes: Any, vectors: list[Any], n_pairs: Any
) -> list[Any]:
    """Emit the dot products of every row with every vector of tokens, in this order."""
    multiply = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [VECTOR, PAIRS, PAIRS]), _MULTIPLY_PAIRS
    )
    n_rows = len(rows)
    following = builder.add(rows[0], builder.mul(row_bytes, constant(n_rows)))

    def step(at: Any, sums: list[Any], n: int) -> list[Any]:
        if n > 1:
            ahead = emit_at(builder, following, at, 4 * n_rows)
            for line in range(0, 4 * n * n_rows, LINE_BYTES):
                emit_prefetch(builder, builder.add(ahead, constant(line)))
        here = [emit_at(builder, row, at, 4) for row in rows]
        there = [emit_at(builder, vector, at, VECTOR_BYTES) for vector in vectors]
        for pair in range(n):
            given = [emit_pairs(builder, emit_after(builder, a, pair)) for a in there]
            new: list[Any] = []
            for a in here:
                weight = emit_one_pair(builder, builder.add(a, constant(4 * pair)))
                for values in given:
                    new.append(builder.call(multiply, [sums[len(new)], values, weight]))
            sums = new
        return sums

    sums = [floats(0.0)] * (n_rows * len(vectors))
    many = builder.and_(n_pairs, constant(-_UNROLLED))
    sums = emit_loop(
        builder, constant(0), many, _UNROLLED, sums, lambda i, s: step(i, s, _UNROLLED)
    )
    return emit_loop(builder, many, n_pairs, 1, sums, lambda i, s: step(i, s, 1))


# As many sums as the registers hold: every load is used several times, and no sum is waited for.
_tile_4_6, _tile_4_4, _tile_4_1 = make_pair_tile(4, 6), make_pair_tile(4, 4), make_pair_tile(4, 1)
_tile_2_12, _tile_2_8, _tile_2_1 = (make_pair_tile(2, rows) for rows in (12, 8, 1))
_tile_1_16, _tile_1_1 = make_pair_tile(1, 16), make_pair_tile(1, 1)

_SIGNATURE = types.void(*[types.int64] * 10)


@native(_SIGNATURE)
def _multiply_pairs(
    weights: Int, row_bytes: Int, n_rows: Int, inputs: Int, input_bytes: Int, n_vectors: Int,
    n_pairs: Int, out: Int, out_bytes: Int, adds: Int,
) -> None:  # fmt: skip
    vector = 0
    while vector < n_vectors:
        x, y, row = inputs + vector * input_bytes, out + vector * out_bytes, 0
        if n_vectors - vector >= 4:
            while row < n_rows:
                w, to = weights + row * row_bytes, y + row * _VECTOR_BYTES
                if n_rows - row >= 6:
                    _tile_4_6(w, row_bytes, x, input_bytes, n_pairs, to, out_bytes, adds)
                    row += 6
                elif n_rows - row >= 4:
                    _tile_4_4(w, row_bytes, x, input_bytes, n_pairs, to, out_bytes, adds)
                    row += 4
                else:
                    _tile_4_1(w, row_bytes, x, input_bytes, n_pairs, to, out_bytes, adds)
                    row += 1
            vector += 4
        elif n_vectors - vector >= 2:
            while row < n_rows:
                w, to = weights + row * row_bytes, y + row * _VECTOR_BYTES
                if n_rows - row >= 12 and n_rows - row != 16:
                    _tile_2_12(w, row_bytes, x, input_bytes, n_pairs, to, out_bytes, adds)
                    row += 12
                elif n_rows - row >= 8:
                    _tile_2_8(w, row_bytes, x, input_bytes, n_pairs, to, out_bytes, adds)
                    row += 8
                else:
                    _tile_2_1(w, row_bytes, x, input_bytes, n_pairs, to, out_bytes, adds)
                    row += 1
            vector += 2
        else:
            while row < n_rows:
                w, to = weights + row * row_bytes, y + row * _VECTOR_BYTES
                if n_rows - row >= 16:
                    _tile_1_16(w, row_bytes, x, input_bytes, n_pairs, to, out_bytes, adds)
                    row += 16
                else:
                    _tile_1_1(w, row_bytes, x, input_bytes, n_pairs, to, out_bytes, adds)
                    row += 1
            vector += 1


# By name, as in :mod:`puna.lm.cpu.matmul`.
llvm.add_symbol("puna_multiply_pairs", _multiply_pairs.address)
multiply_pairs = types.ExternalFunction("puna_multiply_pairs", _SIGNATURE)
"""Compute ``out[v, row] = weights[row] . inputs[v]`` for rows and vectors of 16 tokens.

``multiply_pairs(weights, row_bytes, n_rows, inputs, input_bytes, n_vectors, n_pairs, out,
out_bytes, adds)``:

- weights: Address of the first row, bfloat16.
- row_bytes: From row to row.
- n_rows: Rows.
- inputs: Address of the first vector's first pair of features.
- input_bytes: From vector to vector.
- n_vectors: Vectors of 16 tokens.
- n_pairs: Columns of the rows, in pairs.
- out: Address of the first vector's results, float32, one vector per row.
- out_bytes: From vector to vector.
- adds: Whether to add to what stands in ``out`` instead of replacing it.
"""
