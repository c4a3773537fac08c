"""Reading several bytes at once, which numba has no words for: a few lines of LLVM."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

LINE_WORDS = 8
"""Words of 64 bits in a line of the cache."""
LANES = 16
"""Numbers that :func:`least` looks at."""
BLOCK = 64
"""Bytes that :func:`range_mask` looks at."""
PADDING = 2 * BLOCK
"""Bytes that must be readable behind the text."""

_machine: Any = intrinsic
"""Numba's decorator: the function it makes has one argument less than checkers see."""

_WORD = ir.IntType(64)
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
        return _load(context, builder, signature.args[0], args, _WORD)

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
def set_word(typing_context: Any, words: Any, at: Any, value: Any) -> Any:
    """Write an element of a contiguous array of uint64, counted over all its dimensions."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        builder.store(args[2], builder.gep(array.data, [args[1]]))
        return context.get_dummy_value()

    return types.void(words, types.int64, types.uint64), generate


@_machine
def put_pair(typing_context: Any, ids: Any, at: Any, value: Any) -> Any:
    """Write a word as two elements of an array of uint32, the lower half first."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        place = builder.gep(array.data, [args[1]])
        builder.store(args[2], builder.bitcast(place, _WORD.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(ids, types.int64, types.uint64), generate


@_machine
def fetch(typing_context: Any, words: Any, at: Any) -> Any:
    """Ask for an element of a contiguous array of uint64, which is wanted soon."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        reads, nearest, is_data = (ir.Constant(number, value) for value in (0, 3, 1))
        place = builder.bitcast(builder.gep(array.data, [args[1]]), byte)
        builder.call(function, [place, reads, nearest, is_data])
        return context.get_dummy_value()

    return types.void(words, types.int64), generate


@_machine
def least(typing_context: Any, numbers: Any, at: Any) -> Any:
    """Return the least of 16 elements of an array of uint32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(32), LANES)
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        place = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())
        kind = ir.FunctionType(ir.IntType(32), [vector])
        name = f"llvm.vector.reduce.umin.v{LANES}i32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.zext(builder.call(function, [builder.load(place, align=4)]), _WORD)

    return types.uint64(numbers, types.int64), generate


@_machine
def least_match(typing_context: Any, entries: Any, at: Any, key: Any, shift: Any) -> Any:
    """Look for a key among 8 entries of a contiguous array of uint64.

    Returns:
        What the entry has below the key, ``entry & ((1 << shift) - 1)``, or all bits set there when
        no entry has the key in its upper bits.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_WORD, LINE_WORDS)
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        place = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())

        def everywhere(value: Any) -> Any:
            empty = ir.Constant(vector, ir.Undefined)
            lane = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), LINE_WORDS), [0] * LINE_WORDS)
            return builder.shuffle_vector(lane, empty, lanes)

        found = builder.load(place, align=8)
        ones = builder.sub(builder.shl(ir.Constant(_WORD, 1), args[3]), ir.Constant(_WORD, 1))
        same = builder.icmp_unsigned(
            "==", builder.lshr(found, everywhere(args[3])), everywhere(args[2])
        )
        below = everywhere(ones)
        kept = builder.select(same, builder.and_(found, below), below)
        kind = ir.FunctionType(_WORD, [vector])
        name = f"llvm.vector.reduce.umin.v{LINE_WORDS}i64"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [kept])

    return types.uint64(entries, types.int64, types.uint64, types.uint64), generate


def lines_of(n_words: int, value: int) -> np.ndarray:
    """Return words of one value that begin where a line of the cache does."""
    room = np.empty(n_words + LINE_WORDS, np.uint64)
    first = -room.ctypes.data // room.itemsize % LINE_WORDS
    room[first : first + n_words] = value
    return room[first : first + n_words]


def padded(data: np.ndarray) -> np.ndarray:
    """Return a copy of bytes with :data:`PADDING` zeros behind them."""
    out = np.empty(len(data) + PADDING, np.uint8)
    out[: len(data)] = data
    out[len(data) :] = 0
    return out
