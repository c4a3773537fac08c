"""Instructions that numba's Python has no words for: stored values at addresses, atomics, pauses.

The functions whose names begin with ``emit`` build LLVM code and are shared with
:mod:`puna.lm.cpu.vectors`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Partial sums of a dot product, and elements that are read at once."""
FLOAT32, BFLOAT16, INT8 = 0, 1, 2
"""Kinds of stored values; int8 ones are multiplied by the scale of their row afterwards."""
WIDTHS = (4, 2, 1)
"""Bytes of one value, by kind."""

LINE_BYTES = 64
"""Of a processor's caches."""

_SETTINGS = [getattr(config, name) for name in ("ENABLE_AVX", "CPU_NAME", "CPU_FEATURES")]


def processor_has(feature: str) -> bool:
    """Tell whether there is an instruction (LLVM's name) and numba compiles for all there are."""
    return _SETTINGS == [1, None, None] and bool(llvm.get_host_cpu_features().get(feature))


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)
STORED = (F32, I16, I8)
"""Types of stored values, by kind."""


def instruction(emit: Any) -> Any:
    """Make an instruction of a function that states its types and emits it (numba.extending)."""
    return intrinsic(emit)


def emit_load(builder: ir.IRBuilder, address: Any, kind: int, n: int = 1) -> Any:
    """Load one stored value, or a vector of ``n``, as float32."""
    element = STORED[kind]
    if n > 1:
        stored_type, as_int = ir.VectorType(element, n), ir.VectorType(I32, n)
        as_float, sixteen = ir.VectorType(F32, n), ir.Constant(as_int, [16] * n)
    else:
        stored_type, as_int, as_float, sixteen = element, I32, F32, ir.Constant(I32, 16)
    stored = builder.load(builder.inttoptr(address, stored_type.as_pointer()))
    stored.align = WIDTHS[kind]
    if kind == FLOAT32:
        return stored
    if kind == BFLOAT16:
        return builder.bitcast(builder.shl(builder.zext(stored, as_int), sixteen), as_float)
    return builder.sitofp(builder.sext(stored, as_int), as_float)


def emit_store(builder: ir.IRBuilder, value: Any, address: Any) -> None:
    """Store a float32, or a vector of them."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def emit_fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """Emit a * b + c, rounded once, of float32 numbers or vectors."""
    suffix = "f32" if a.type == F32 else f"v{LANES}f32"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.{suffix}"
    )
    return builder.call(function, [a, b, c])


def emit_prefetch(builder: ir.IRBuilder, address: Any) -> None:
    """Ask for a line in the second-level cache; an address outside of the memory does no harm."""
    pointer = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32]), "llvm.prefetch.p0"
    )
    reads, second_level, is_data = (ir.Constant(I32, value) for value in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, pointer), reads, second_level, is_data])


def emit_by_kind(
    builder: ir.IRBuilder, kind: Any, n_kinds: int, emit: Callable[[int], None]
) -> None:
    """Emit the same code for every kind of values and jump to the one that is asked for."""
    after = builder.append_basic_block("kinds_end")
    blocks = [builder.append_basic_block(f"kind_{known}") for known in range(n_kinds)]
    switch = builder.switch(kind, blocks[0])
    for known, block in enumerate(blocks):
        switch.add_case(ir.Constant(I64, known), block)
        builder.position_at_end(block)
        emit(known)
        builder.branch(after)
    builder.position_at_end(after)


@instruction
def load_float(typing_context, kind, address):  # noqa: ANN001, ANN201
    """Read one stored value at an address as float32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        result = cgutils.alloca_once(builder, F32)
        emit_by_kind(
            builder, args[0], len(WIDTHS),
            lambda known: builder.store(emit_load(builder, args[1], known), result),
        )  # fmt: skip
        return builder.load(result)

    return types.float32(types.int64, types.int64), codegen


@instruction
def store_float(typing_context, kind, address, value):  # noqa: ANN001, ANN201
    """Write a float32 to an address as float32 or, rounded to the nearest even, as bfloat16.

    A NaN stays one: its payload is cut and the quiet bit set.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind, address, value = args
        narrow = ir.IntType(16)
        is_wide = builder.icmp_signed("==", kind, ir.Constant(I64, FLOAT32))
        with builder.if_else(is_wide) as (then, otherwise):
            with then:
                emit_store(builder, value, address)
            with otherwise:
                bits = builder.bitcast(value, I32)
                odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
                rounded = builder.add(bits, builder.add(odd, ir.Constant(I32, 0x7FFF)))
                is_nan = builder.fcmp_unordered("uno", value, value)
                quiet = builder.or_(bits, ir.Constant(I32, 0x00400000))
                kept = builder.select(is_nan, quiet, rounded)
                short = builder.trunc(builder.lshr(kept, ir.Constant(I32, 16)), narrow)
                builder.store(short, builder.inttoptr(address, narrow.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@instruction
def prefetch(typing_context, address):  # noqa: ANN001, ANN201
    """Ask for the cache line at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        emit_prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@instruction
def bits_to_float(typing_context, bits):  # noqa: ANN001, ANN201
    """Read an int32 as the float32 with the same bits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), codegen


@instruction
def float_to_bits(typing_context, value):  # noqa: ANN001, ANN201
    """Read a float32 as the int32 with the same bits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], I32)

    return types.int32(types.float32), codegen


@instruction
def divide(typing_context, a, b):  # noqa: ANN001, ANN201
    """Divide float32 numbers without Python's check for zero, so that loops become vectors."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return types.float32(types.float32, types.float32), codegen


@instruction
def atomic_add(typing_context, address, value):  # noqa: ANN001, ANN201
    """Add to the int64 at an address and return what it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@instruction
def atomic_load(typing_context, address):  # noqa: ANN001, ANN201
    """Read the int64 at an address; what other threads wrote before it is visible after."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@instruction
def pause(typing_context):  # noqa: ANN001, ANN201
    """Tell the processor that this thread is waiting in a loop."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        nothing = ir.VoidType()
        if platform.machine().lower() in ("x86_64", "amd64"):
            function = ir.FunctionType(nothing, [])
            name, arguments = "llvm.x86.sse2.pause", []
        elif platform.machine().lower() in ("aarch64", "arm64"):
            function = ir.FunctionType(nothing, [I32])
            name, arguments = "llvm.aarch64.hint", [ir.Constant(I32, 1)]  # yield
        else:
            return context.get_dummy_value()
        builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)
        return context.get_dummy_value()

    return types.void(), codegen
