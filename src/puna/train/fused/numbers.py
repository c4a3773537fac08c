"""Stored numbers of either precision inside a compiled loop: read as float32, rounded when written.

A bfloat16 tensor is given to a loop as int16 with the same bits, for numpy has no such type.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from puna.lm.cpu.intrinsics import F32, I16, I32, emit_fma, instruction


@instruction
def widen(typing_context, value):  # noqa: ANN001, ANN201
    """Read a float32, or the bits of a bfloat16, as float32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        bits = builder.shl(builder.zext(args[0], I32), ir.Constant(I32, 16))
        return builder.bitcast(bits, F32)

    return types.float32(value), codegen


@instruction
def narrow(typing_context, value, like):  # noqa: ANN001, ANN201
    """Return a float32 as a number of the second argument's type: float32, or bfloat16's bits.

    Rounds to the nearest, to even on a tie. A NaN stays one: its quiet bit is set.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        value = args[0]
        if signature.return_type == types.float32:
            return value
        bits = builder.bitcast(value, I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(I32, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        quiet = builder.or_(bits, ir.Constant(I32, 0x00400000))
        kept = builder.select(is_nan, quiet, rounded)
        return builder.trunc(builder.lshr(kept, ir.Constant(I32, 16)), I16)

    return like(types.float32, like), codegen


@instruction
def exp(typing_context, value):  # noqa: ANN001, ANN201
    """Return e**x in float32, within 2 ulp; outside of [-87, 88] the value at the end; NaN stays.

    As :func:`puna.lm.cpu.elementwise.exp`, with each product and sum rounded once, which takes half
    of the time.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        x = args[0]
        for bound, beyond in ((-87.0, "<"), (88.0, ">")):
            end = ir.Constant(F32, bound)
            x = builder.select(builder.fcmp_ordered(beyond, x, end), end, x)
        # 1.5 * 2**23: adding it rounds to an integer, in the last bits.
        shift = ir.Constant(F32, 12582912.0)
        shifted = emit_fma(builder, x, ir.Constant(F32, 1.4426950216293335), shift)
        n = builder.fsub(shifted, shift)
        rest = emit_fma(builder, n, ir.Constant(F32, -0.693359375), x)
        rest = emit_fma(builder, n, ir.Constant(F32, 2.1219444170128554e-4), rest)
        sum_ = ir.Constant(F32, 1 / 5040)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            sum_ = emit_fma(builder, sum_, rest, ir.Constant(F32, coefficient))
        exponent = builder.shl(builder.bitcast(shifted, I32), ir.Constant(I32, 23))
        power = builder.bitcast(builder.add(exponent, ir.Constant(I32, 127 << 23)), F32)
        return builder.fmul(sum_, power)

    return types.float32(types.float32), codegen
