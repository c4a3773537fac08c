"""Stored numbers of either precision inside a compiled loop: read as float32, rounded when written.

A bfloat16 tensor is given to a loop as int16 with the same bits, for numpy has no such type.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from puna.lm.cpu.intrinsics import F32, I16, I32, instruction


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
