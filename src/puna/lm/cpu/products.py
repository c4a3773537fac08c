"""How a vector of weights is multiplied with a vector of a token's values, by kind of the weights.

float32 and bfloat16 weights are widened to float32 and multiplied by it, 16 at once. int8 weights
are multiplied by integers of 16 bits, to which :func:`puna.lm.cpu.elementwise.narrow` rounds a
token's values: twice as many products per instruction, and two neighbours share one of the 16
partial sums. Those are int32 and exact, so that every processor and every order of the products
gives the same bits.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from puna.lm.cpu.intrinsics import (
    F32,
    FLOAT32,
    I8,
    I16,
    I32,
    INT8,
    LANES,
    LINE_BYTES,
    STORED,
    VECTOR,
    emit_fma,
    emit_load,
    processor_has,
)

BLOCK = 8192
"""Columns that are rounded, and summed as int32, together: the most that never overflow."""
BLOCK_BYTES = LINE_BYTES + 2 * BLOCK
"""Of a block of rounded values: its scale, float32, in a cache line of its own, then the values,
int16."""
_ADDS_PAIRS = processor_has("avx512vnni")
if _ADDS_PAIRS:
    llvm.initialize_native_asmparser()


class Products:
    """Weights of one kind times values in float32.

    Args:
        kind: Of the weights.

    Attributes:
        columns: Of a vector.
        weight: Type of a stored weight.
        given: Type of a token's stored value.
        zero: Partial sums before the first product.
    """

    columns = LANES
    given: ir.Type = F32
    zero = ir.Constant(VECTOR, [0.0] * LANES)

    def __init__(self, kind: int) -> None:
        self.kind, self.weight = kind, STORED[kind]

    def emit_weights(self, builder: ir.IRBuilder, address: Any) -> Any:
        """Load a vector of weights."""
        return emit_load(builder, address, self.kind, LANES)

    def emit_given(self, builder: ir.IRBuilder, address: Any) -> Any:
        """Load a vector of a token's values."""
        return emit_load(builder, address, FLOAT32, LANES)

    def emit_add(self, builder: ir.IRBuilder, weights: Any, given: Any, sums: Any) -> Any:
        """Add the products to the partial sums."""
        return emit_fma(builder, weights, given, sums)

    def emit_floats(self, builder: ir.IRBuilder, sums: Any) -> Any:
        """Return the partial sums as float32."""
        return sums


class _IntegerProducts(Products):
    """int8 weights times values that are int16."""

    columns = 2 * LANES
    given = I16
    zero = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    _stored = ir.VectorType(I16, 2 * LANES)
    _multiplied = ir.VectorType(I32, 2 * LANES)

    def emit_weights(self, builder: ir.IRBuilder, address: Any) -> Any:
        vector = ir.VectorType(I8, self.columns)
        weights = builder.load(builder.inttoptr(address, vector.as_pointer()))
        weights.align = 1
        return builder.sext(weights, self._stored)

    def emit_given(self, builder: ir.IRBuilder, address: Any) -> Any:
        values = builder.load(builder.inttoptr(address, self._stored.as_pointer()))
        values.align = 2
        return values

    def emit_add(self, builder: ir.IRBuilder, weights: Any, given: Any, sums: Any) -> Any:
        if _ADDS_PAIRS:
            # Not by LLVM's name of it: it counts the wait of one sum for the next, which with 16
            # sums at once there is not, and takes twice as many instructions to avoid it.
            kind = ir.FunctionType(sums.type, [self._stored, self._stored, sums.type])
            asm = ir.InlineAsm(kind, "vpdpwssd $2, $1, $0", "=v,v,v,0")
            return builder.call(asm, [weights, given, sums])
        # LLVM recognises VPMADDWD in this.
        weights, given = (builder.sext(x, self._multiplied) for x in (weights, given))
        products = builder.mul(weights, given)
        undefined = ir.Constant(products.type, ir.Undefined)
        halves = [
            builder.shuffle_vector(
                products, undefined,
                ir.Constant(ir.VectorType(I32, LANES), list(range(first, self.columns, 2))),
            )
            for first in (0, 1)
        ]  # fmt: skip
        return builder.add(sums, builder.add(*halves))

    def emit_floats(self, builder: ir.IRBuilder, sums: Any) -> Any:
        return builder.sitofp(sums, VECTOR)


def words_of(size: int) -> int:
    """Return how many int16 the blocks of a token's values take, in whole cache lines."""
    line = LINE_BYTES // 2
    return -(-size // BLOCK) * line + -(-size // line) * line


def products_of(kind: int) -> Products:
    """Return how weights of a kind are multiplied."""
    return _IntegerProducts(kind) if kind == INT8 else Products(kind)
