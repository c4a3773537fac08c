"""Instructions that numba's Python has no words for: fixed-width dot products, atomics, pointers.

The dot products state the order of every addition: 16 partial sums, element ``i`` goes to sum
``i % 16`` by a fused multiply-add, the sums are added as a tree, then the elements beyond the last
whole group of 16. That order is the same for any number of weight rows and tokens in a *tile*, and
on any processor: a narrower one splits the 16 sums over several registers. So a token's result has
the same bits whatever shares the call.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
FLOAT32, BFLOAT16, INT8 = 0, 1, 2
"""Kinds of stored weights; int8 ones are multiplied by the scale of their row afterwards."""
WIDTHS = (4, 2, 1)
"""Bytes of one weight, by kind."""

_I64 = ir.IntType(64)
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_STORED = (_F32, ir.IntType(16), ir.IntType(8))


def _fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    suffix = "f32" if a.type == _F32 else f"v{LANES}f32"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.{suffix}"
    )
    return builder.call(function, [a, b, c])


def _widened(builder: ir.IRBuilder, address: Any, kind: int, is_vector: bool) -> Any:
    """Load stored weights (a vector of them or one) as float32."""
    stored = _load(builder, address, _STORED[kind], is_vector)
    integer, single = ir.IntType(32), _F32
    as_int = ir.VectorType(integer, LANES) if is_vector else integer
    as_float = _VECTOR if is_vector else single
    if kind == FLOAT32:
        return stored
    if kind == BFLOAT16:
        shift = ir.Constant(as_int, [16] * LANES if is_vector else 16)
        return builder.bitcast(builder.shl(builder.zext(stored, as_int), shift), as_float)
    return builder.sitofp(builder.sext(stored, as_int), as_float)


def _load(builder: ir.IRBuilder, address: Any, element: Any, is_vector: bool) -> Any:
    loaded = ir.VectorType(element, LANES) if is_vector else element
    instruction = builder.load(builder.inttoptr(address, loaded.as_pointer()))
    instruction.align = element.width // 8 if isinstance(element, ir.IntType) else 4
    return instruction


def _tree_sum(builder: ir.IRBuilder, vector: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        index = ir.VectorType(ir.IntType(32), width)
        undefined = ir.Constant(vector.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                vector, undefined, ir.Constant(index, list(range(start, start + width)))
            )
            for start in (0, width)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def make_tile(n_rows: int, n_tokens: int) -> Any:
    """Return an intrinsic that multiplies a few weight rows with a few tokens.

    ``tile(kind, weights, row_bytes, inputs, input_bytes, size, out)``: kind of the weights,
    addresses, strides in bytes; writes ``out[token, row]`` as float32, contiguous.

    Args:
        n_rows: Weight rows of the tile.
        n_tokens: Tokens of the tile.
    """

    @intrinsic
    def tile(typing_context, kind, weights, row_bytes, inputs, input_bytes, size, out):  # noqa: ANN001, ANN202
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            _by_kind(
                builder,
                args[0],
                lambda known: _emit_tile(builder, known, n_rows, n_tokens, args[1:]),
            )
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile


def _by_kind(builder: ir.IRBuilder, kind: Any, emit: Callable[[int], None]) -> None:
    """Emit the same code for every kind of weights and jump to the one that is asked for."""
    after = builder.append_basic_block("kinds_end")
    blocks = [builder.append_basic_block(f"kind_{known}") for known in range(len(_STORED))]
    switch = builder.switch(kind, blocks[0])
    for known, block in enumerate(blocks):
        switch.add_case(ir.Constant(_I64, known), block)
        builder.position_at_end(block)
        emit(known)
        builder.branch(after)
    builder.position_at_end(after)


def _emit_tile(builder: ir.IRBuilder, kind: int, n_rows: int, n_tokens: int, args: Any) -> None:
    weights, row_bytes, inputs, input_bytes, size, out = args

    def constant(value: int) -> Any:
        return ir.Constant(_I64, value)

    rows = [builder.add(weights, builder.mul(row_bytes, constant(r))) for r in range(n_rows)]
    tokens = [builder.add(inputs, builder.mul(input_bytes, constant(t))) for t in range(n_tokens)]
    pairs = [(r, t) for r in range(n_rows) for t in range(n_tokens)]

    def step(position: Any, sums: list[Any], is_vector: bool) -> list[Any]:
        at_weight = builder.mul(position, constant(WIDTHS[kind]))
        at_input = builder.mul(position, constant(4))
        values = [_widened(builder, builder.add(row, at_weight), kind, is_vector) for row in rows]
        given = [_load(builder, builder.add(token, at_input), _F32, is_vector) for token in tokens]
        return [
            _fma(builder, values[r], given[t], total)
            for (r, t), total in zip(pairs, sums, strict=True)
        ]

    whole = builder.and_(size, constant(~(LANES - 1)))
    zeros = [ir.Constant(_VECTOR, [0.0] * LANES) for _ in pairs]
    sums = _loop(builder, constant(0), whole, LANES, zeros, lambda i, s: step(i, s, True))
    totals = [_tree_sum(builder, vector) for vector in sums]
    totals = _loop(builder, whole, size, 1, totals, lambda i, s: step(i, s, False))
    for (r, t), total in zip(pairs, totals, strict=True):
        place = builder.add(out, constant(4 * (t * n_rows + r)))
        builder.store(total, builder.inttoptr(place, _F32.as_pointer()))


def _loop(
    builder: ir.IRBuilder, start: Any, stop: Any, step: int, carried: list[Any], body: Any
) -> list[Any]:
    """Emit ``for i in range(start, stop, step)`` that carries values; return the last ones."""
    entry = builder.block
    head = builder.append_basic_block("head")
    inner = builder.append_basic_block("inner")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_I64)
    values = [builder.phi(value.type) for value in carried]
    index.add_incoming(start, entry)
    for phi, value in zip(values, carried, strict=True):
        phi.add_incoming(value, entry)
    builder.cbranch(builder.icmp_signed("<", index, stop), inner, after)
    builder.position_at_end(inner)
    new = body(index, values)
    following = builder.add(index, ir.Constant(_I64, step))
    index.add_incoming(following, builder.block)
    for phi, value in zip(values, new, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


@intrinsic
def add_weighted(typing_context, kind, rows, row_bytes, weights, n_rows, size, out):  # noqa: ANN001, ANN201
    """Add ``weights[i] * rows[i, :]`` to the float32 vector at ``out``, row after row.

    Addresses, a stride in bytes and counts; ``rows`` are stored as ``kind``, ``weights`` float32.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _by_kind(builder, args[0], lambda known: _emit_weighted(builder, known, args[1:]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _emit_weighted(builder: ir.IRBuilder, kind: int, args: Any) -> None:
    rows, row_bytes, weights, n_rows, size, out = args

    def constant(value: int) -> Any:
        return ir.Constant(_I64, value)

    def columns(at: Any, is_vector: bool) -> None:
        to = _VECTOR if is_vector else _F32
        place = builder.add(out, builder.mul(at, constant(4)))
        first = builder.add(rows, builder.mul(at, constant(WIDTHS[kind])))

        def add_row(row: Any, sums: list[Any]) -> list[Any]:
            address = builder.add(first, builder.mul(row, row_bytes))
            value = _widened(builder, address, kind, is_vector)
            at_weight = builder.add(weights, builder.mul(row, constant(4)))
            weight = _load(builder, at_weight, _F32, False)
            if is_vector:
                weight = _splat(builder, weight)
            return [_fma(builder, weight, value, sums[0])]

        start = _load(builder, place, _F32, is_vector)
        (total,) = _loop(builder, constant(0), n_rows, 1, [start], add_row)
        stored = builder.store(total, builder.inttoptr(place, to.as_pointer()))
        stored.align = 4

    def vector(at: Any, carried: list[Any]) -> list[Any]:
        columns(at, True)
        return carried

    def single(at: Any, carried: list[Any]) -> list[Any]:
        columns(at, False)
        return carried

    whole = builder.and_(size, constant(~(LANES - 1)))
    _loop(builder, constant(0), whole, LANES, [], vector)
    _loop(builder, whole, size, 1, [], single)


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    index = ir.Constant(ir.IntType(32), 0)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(undefined, value, index), undefined, zeros)


@intrinsic
def atomic_add(typing_context, address, value):  # noqa: ANN001, ANN201
    """Add to the int64 at an address and return what it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typing_context, address):  # noqa: ANN001, ANN201
    """Read the int64 at an address; what other threads wrote before it is visible after."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def bits_to_float(typing_context, bits):  # noqa: ANN001, ANN201
    """Read an int32 as the float32 with the same bits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), codegen


@intrinsic
def float_to_bits(typing_context, value):  # noqa: ANN001, ANN201
    """Return the bits of a float32 as an int32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def load_float(typing_context, kind, address):  # noqa: ANN001, ANN201
    """Read one stored value at an address as float32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        result = cgutils.alloca_once(builder, _F32)
        _by_kind(
            builder, args[0],
            lambda known: builder.store(_widened(builder, args[1], known, False), result),
        )  # fmt: skip
        return builder.load(result)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def store_float(typing_context, kind, address, value):  # noqa: ANN001, ANN201
    """Write a float32 to an address as float32 or, rounded to the nearest even, as bfloat16."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind, address, value = args
        narrow, i32 = ir.IntType(16), ir.IntType(32)
        is_wide = builder.icmp_signed("==", kind, ir.Constant(_I64, FLOAT32))
        with builder.if_else(is_wide) as (then, otherwise):
            with then:
                builder.store(value, builder.inttoptr(address, _F32.as_pointer()))
            with otherwise:
                bits = builder.bitcast(value, i32)
                odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
                rounded = builder.add(bits, builder.add(odd, ir.Constant(i32, 0x7FFF)))
                short = builder.trunc(builder.lshr(rounded, ir.Constant(i32, 16)), narrow)
                builder.store(short, builder.inttoptr(address, narrow.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def pause(typing_context):  # noqa: ANN001, ANN201
    """Tell the processor that this thread is waiting in a loop."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        nothing = ir.VoidType()
        if platform.machine() == "x86_64":
            function = ir.FunctionType(nothing, [])
            name, arguments = "llvm.x86.sse2.pause", []
        elif platform.machine() == "aarch64":
            function = ir.FunctionType(nothing, [ir.IntType(32)])
            name, arguments = "llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]  # yield
        else:
            return context.get_dummy_value()
        builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)
        return context.get_dummy_value()

    return types.void(), codegen
