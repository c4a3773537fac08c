"""Sixteen tokens side by side in a vector: how prompts in bfloat16 are computed.

Activations lie feature by feature, a feature of 16 tokens in one vector: as float32, or two
features in pairs of bfloat16, which is what the processor's instruction for them takes
(``VDPBF16PS``). The other thing it takes is one pair of weights for all tokens, and that is how a
row of a matrix is stored anyway: no weight is packed. No sum crosses the elements of a vector, so a
token's results have the same bits whatever tokens lie beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from puna.lm.cpu.intrinsics import (
    FLOAT32,
    I32,
    LANES,
    VECTOR,
    emit_fma,
    emit_load,
    instruction,
)
from puna.lm.cpu.vectors import constant

VECTOR_BYTES = 4 * LANES
"""Of one feature of 16 tokens in float32, or of a pair of features in bfloat16."""


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


WORDS = ir.VectorType(I32, LANES)
PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def words(value: int) -> Any:
    """Return a constant vector of one int32."""
    return ir.Constant(WORDS, [value] * LANES)


def floats(value: float) -> Any:
    """Return a constant vector of one float32."""
    return ir.Constant(VECTOR, [value] * LANES)


def emit_at(builder: ir.IRBuilder, base: Any, index: Any, stride: int) -> Any:
    """Emit ``base + index * stride``."""
    return builder.add(base, builder.mul(index, constant(stride)))


def emit_after(builder: ir.IRBuilder, base: Any, n_vectors: int) -> Any:
    """Emit the address some vectors further."""
    return builder.add(base, constant(VECTOR_BYTES * n_vectors))


def emit_vector(builder: ir.IRBuilder, address: Any) -> Any:
    """Load one feature of 16 tokens."""
    return emit_load(builder, address, FLOAT32, LANES)


def emit_words(builder: ir.IRBuilder, address: Any) -> Any:
    """Load 16 int32."""
    loaded = builder.load(builder.inttoptr(address, WORDS.as_pointer()))
    loaded.align = 4
    return loaded


def emit_pairs(builder: ir.IRBuilder, address: Any) -> Any:
    """Load two features of 16 tokens."""
    return builder.bitcast(emit_words(builder, address), PAIRS)


def emit_one_pair(builder: ir.IRBuilder, address: Any) -> Any:
    """Load two weights for all tokens."""
    word = builder.load(builder.inttoptr(address, I32.as_pointer()))
    word.align = 2
    return builder.bitcast(emit_splat_word(builder, word), PAIRS)


def emit_splat_word(builder: ir.IRBuilder, word: Any) -> Any:
    """Emit a vector of one int32."""
    undefined = ir.Constant(WORDS, ir.Undefined)
    first = builder.insert_element(undefined, word, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, words(0))


def address_instruction(emit: Callable[..., None]) -> Any:
    """Make an instruction of a function that emits it, all its arguments int64."""
    first, *parameters = inspect.signature(emit).parameters.values()

    def typed(typing_context: Any, *arguments: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            emit(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * len(parameters)), codegen

    typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
    # Numba asks for the arguments' names.
    typed.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    return instruction(typed)


def _round(builder: ir.IRBuilder, value: Any) -> Any:
    """Return the bits with those of the nearest bfloat16 (even on a tie) on top; NaN stays."""
    bits = builder.bitcast(value, WORDS)
    odd = builder.and_(builder.lshr(bits, words(16)), words(1))
    rounded = builder.add(bits, builder.add(odd, words(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, builder.or_(bits, words(0x00400000)), rounded)


def emit_store_pair(builder: ir.IRBuilder, values: list[Any], address: Any) -> None:
    """Emit two features of 16 tokens, rounded."""
    first, second = values
    low = builder.lshr(_round(builder, first), words(16))
    high = builder.and_(_round(builder, second), words(-65536))
    pointer = builder.inttoptr(address, WORDS.as_pointer())
    builder.store(builder.or_(low, high), pointer).align = 4


def emit_exp(builder: ir.IRBuilder, x: Any) -> Any:
    """e**x as :func:`puna.lm.cpu.elementwise.exp` does it; NaN stays."""
    low, high = floats(-87.0), floats(88.0)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    shift = floats(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, in the last bits
    shifted = emit_fma(builder, x, floats(1.4426950216293335), shift)
    n = builder.fsub(shifted, shift)
    r = emit_fma(builder, n, floats(-0.693359375), x)
    r = emit_fma(builder, n, floats(2.1219444170128554e-4), r)
    p = floats(1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = emit_fma(builder, p, r, floats(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, WORDS), words(23))
    power = builder.bitcast(builder.add(exponent, words(127 << 23)), VECTOR)
    return builder.fmul(p, power)
