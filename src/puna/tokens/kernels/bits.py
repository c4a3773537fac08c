"""Reading several bytes at once, which numba has no words for: a few lines of LLVM."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj

BLOCK = 64
"""Bytes that :func:`range_mask` looks at."""
PADDING = 2 * BLOCK
"""Bytes that must be readable behind the text."""

_machine: Any = intrinsic
"""Numba's decorator: the function it makes has one argument less than checkers see."""

_VECTOR = ir.VectorType(ir.IntType(8), BLOCK)
_FIRST_LANES = ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), [0] * BLOCK)


def _load(context: Any, builder: Any, array_type: Any, args: Any, kind: Any) -> Any:
    array = arrayobj.make_array(array_type)(context, builder, args[0])
    place = builder.gep(array.data, [args[1]])
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


@_machine
def load64(typing_context: Any, data: Any, at: Any) -> Any:
    """Return 8 bytes of a byte array as one integer, the first byte lowest."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(context, builder, signature.args[0], args, ir.IntType(64))

    return types.uint64(data, types.int64), generate


@_machine
def range_mask(typing_context: Any, data: Any, at: Any, fold: Any, low: Any, span: Any) -> Any:
    """Tell which of 64 bytes lie in a range: bit i is set when ``(byte | fold) - low < span``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        text = _load(context, builder, signature.args[0], args, _VECTOR)

        def everywhere(value: Any) -> Any:
            empty = ir.Constant(_VECTOR, ir.Undefined)
            lane = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(lane, empty, _FIRST_LANES)

        moved = builder.sub(builder.or_(text, everywhere(args[2])), everywhere(args[3]))
        inside = builder.icmp_unsigned("<", moved, everywhere(args[4]))
        return builder.bitcast(inside, ir.IntType(BLOCK))

    return types.uint64(data, types.int64, types.uint8, types.uint8, types.uint8), generate


@_machine
def first_bit(typing_context: Any, word: Any) -> Any:
    """Return the place of the lowest bit that is set; the word must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@_machine
def word_at(typing_context: Any, words: Any, at: Any) -> Any:
    """Return an element of a contiguous array of uint64, counted over all its dimensions."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        return builder.load(builder.gep(array.data, [args[1]]))

    return types.uint64(words, types.int64), generate


@_machine
def put(typing_context: Any, ids: Any, at: Any, value: Any) -> Any:
    """Write the lower half of a word to an array of uint32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        builder.store(builder.trunc(args[2], ir.IntType(32)), builder.gep(array.data, [args[1]]))
        return context.get_dummy_value()

    return types.void(ids, types.int64, types.uint64), generate


def padded(data: np.ndarray) -> np.ndarray:
    """Return a copy of bytes with :data:`PADDING` zeros behind them."""
    out = np.empty(len(data) + PADDING, np.uint8)
    out[: len(data)] = data
    out[len(data) :] = 0
    return out
