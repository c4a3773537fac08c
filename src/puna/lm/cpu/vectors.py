"""Products of weight rows with tokens, and sums of value rows, in vectors of a fixed width.

The order of every addition is stated: a dot product has 16 partial sums, element ``i`` goes to sum
``i % 16`` by a fused multiply-add, and the sums are added as a tree, ``i`` to ``i + 8`` first. With
int8 weights the partial sums are exact integers (:mod:`puna.lm.cpu.products`), then comes the same
tree. That order is the same for any number of rows and tokens in a *tile*, and on any processor: a
narrower one splits the 16 sums over several registers. So a token's result has the same bits
whatever shares the call.

Memory is the limit with few tokens. One token is multiplied with one row after the other, which the
processor's own prefetching follows best. It loses track of rows that are read side by side: tiles
prefetch the lines some kilobytes ahead, in the order of their addresses, into the second-level
cache. Into the first level would halve the speed: fewer lines can be on their way there.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from puna.lm.cpu.intrinsics import (
    BFLOAT16,
    F32,
    FLOAT32,
    I32,
    I64,
    INT8,
    LANES,
    LINE_BYTES,
    STORED,
    WIDTHS,
    emit_by_kind,
    emit_fma,
    emit_load,
    emit_prefetch,
    emit_store,
    instruction,
    processor_has,
)
from puna.lm.cpu.products import products_of

_UNROLLED = 4 * LANES  # columns: 64 int8 weights are one cache line

IS_WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
"""Whether one register holds 16 floats, and there are 32 of them: tiles may be larger."""

MULTIPLIES_PAIRS = processor_has("avx512bf16")
"""Whether the processor multiplies pairs of bfloat16."""

MULTIPLIES_TILES = bool(llvm.get_host_cpu_features().get("amx-bf16"))
"""Whether it has a unit for whole tiles (AMX): PyTorch uses it, several times faster than pairs."""


def constant(value: int) -> Any:
    """Return an int64 constant."""
    return ir.Constant(I64, value)


def make_tile(n_rows: int, n_tokens: int) -> Any:
    """Return an intrinsic that multiplies a few weight rows with a few tokens.

    ``tile(kind, weights, row_bytes, scales, ahead, inputs, input_bytes, size, out, out_bytes,
    adds)``: kind of the weights; addresses and strides in bytes; the address of the rows' scales
    (int8 only); how many bytes ahead to prefetch; columns; whether to add to ``out``. Inputs of
    int8 weights begin with their scale, as :data:`puna.lm.cpu.products.BLOCK_BYTES` says.
    Writes ``out[token, row]``, the rows contiguous, as float32.

    Args:
        n_rows: Weight rows of the tile, a power of two.
        n_tokens: Tokens of the tile, a power of two; the product at most 16.
    """

    @instruction
    def tile(  # noqa: ANN202
        typing_context, kind, weights, row_bytes, scales, ahead, inputs, input_bytes, size, out,  # noqa: ANN001
        out_bytes, adds,  # noqa: ANN001
    ):  # fmt: skip
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            emit_by_kind(
                builder, args[0], len(WIDTHS),
                lambda known: _emit_tile(builder, known, n_rows, n_tokens, args[1:]),
            )  # fmt: skip
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    return tile


def _emit_tile(builder: ir.IRBuilder, kind: int, n_rows: int, n_tokens: int, args: Any) -> None:
    weights, row_bytes, scales, ahead, inputs, input_bytes, size, out, out_bytes, adds = args
    rows = [builder.add(weights, builder.mul(row_bytes, constant(r))) for r in range(n_rows)]
    tokens = [builder.add(inputs, builder.mul(input_bytes, constant(t))) for t in range(n_tokens)]
    values = tokens
    if kind == INT8:  # the scale comes first
        values = [builder.add(token, constant(LINE_BYTES)) for token in tokens]
    if n_tokens == 1:
        sums = [s for row in rows for s in _emit_sums(builder, kind, [row], values, size, ahead)]
    else:
        sums = _emit_sums(builder, kind, rows, values, size, ahead)
    totals = _tree_sums(builder, sums)
    for t, token in enumerate(tokens):
        result = _part(builder, totals, t * n_rows, n_rows)
        if kind == INT8:
            scale = emit_load(builder, token, FLOAT32)
            factors = scale if n_rows == 1 else emit_splat(builder, scale, n_rows)
            result = builder.fmul(
                builder.fmul(result, factors), emit_load(builder, scales, FLOAT32, n_rows)
            )
        place = builder.add(out, builder.mul(out_bytes, constant(t)))
        old = emit_load(builder, place, FLOAT32, n_rows)
        is_sum = builder.icmp_signed("!=", adds, constant(0))
        emit_store(builder, builder.select(is_sum, builder.fadd(old, result), result), place)


def _emit_sums(
    builder: ir.IRBuilder, kind: int, rows: list[Any], tokens: list[Any], size: Any, ahead: Any
) -> list[Any]:
    """Emit the partial sums of every token with every row, in this order."""
    products, n_rows = products_of(kind), len(rows)
    columns, width, given_width = products.columns, WIDTHS[kind], _width(products.given)
    far = builder.add(rows[0], ahead)

    def add(sums: list[Any], here: list[Any], there: list[Any]) -> list[Any]:
        values = [products.emit_weights(builder, address) for address in here]
        given = [products.emit_given(builder, address) for address in there]
        pairs = [(v, g) for g in given for v in values]
        return [
            products.emit_add(builder, v, g, total)
            for (v, g), total in zip(pairs, sums, strict=True)
        ]

    def step(position: Any, sums: list[Any], n_columns: int) -> list[Any]:
        at_weight = builder.mul(position, constant(width))
        at_input = builder.mul(position, constant(given_width))
        if n_columns == _UNROLLED:
            first = builder.add(far, builder.mul(at_weight, constant(n_rows)))
            for line in range(0, n_rows * n_columns * width, LINE_BYTES):
                emit_prefetch(builder, builder.add(first, constant(line)))
        here = [builder.add(row, at_weight) for row in rows]
        there = [builder.add(token, at_input) for token in tokens]
        for column in range(0, n_columns, columns):
            sums = add(
                sums,
                [builder.add(address, constant(column * width)) for address in here],
                [builder.add(address, constant(column * given_width)) for address in there],
            )
        return sums

    sums = [products.zero] * (n_rows * len(tokens))
    many = builder.and_(size, constant(-_UNROLLED))
    whole = builder.and_(size, constant(-columns))
    sums = emit_loop(
        builder, constant(0), many, _UNROLLED, sums, lambda i, s: step(i, s, _UNROLLED)
    )
    sums = emit_loop(builder, many, whole, columns, sums, lambda i, s: step(i, s, columns))
    copies = [
        cgutils.alloca_once(builder, ir.VectorType(element, columns))
        for element in [products.weight] * n_rows + [products.given] * len(tokens)
    ]

    def tail(position: Any, sums: list[Any]) -> list[Any]:
        for address, copy in zip([*rows, *tokens], copies, strict=True):
            _copy_tail(builder, address, position, size, copy)
        places = [builder.ptrtoint(copy, I64) for copy in copies]
        return add(sums, places[:n_rows], places[n_rows:])

    sums = emit_loop(builder, whole, size, columns, sums, tail)
    return [products.emit_floats(builder, total) for total in sums]


def _width(element: ir.Type) -> int:
    """Return the bytes of one value."""
    return WIDTHS[STORED.index(element)]


def _copy_tail(builder: ir.IRBuilder, address: Any, start: Any, size: Any, place: Any) -> None:
    """Put the elements after the last whole vector, then zeros, into a vector in memory."""
    vector = place.type.pointee
    builder.store(ir.Constant(vector, None), place)
    base, width = builder.ptrtoint(place, I64), constant(_width(vector.element))
    pointer = vector.element.as_pointer()

    def copy(i: Any, carried: list[Any]) -> list[Any]:
        value = builder.load(builder.inttoptr(builder.add(address, builder.mul(i, width)), pointer))
        value.align = _width(vector.element)
        to = builder.add(base, builder.mul(builder.sub(i, start), width))
        builder.store(value, builder.inttoptr(to, pointer))
        return carried

    emit_loop(builder, start, size, 1, [], copy)


def _tree_sums(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """Sum the elements of each vector; return a vector of the sums.

    Each level adds the upper half of every vector to the lower half, two vectors at once: it costs
    half of what a tree for each vector would, and is the same additions.
    """
    width = LANES  # of what is left of one vector
    while width > 1:
        starts = range(0, _lanes(vectors[0]), width)
        width //= 2
        merged = []
        for i in range(0, len(vectors), 2):
            a, *others = vectors[i : i + 2]
            b = others[0] if others else ir.Constant(a.type, ir.Undefined)
            of_b = [_lanes(a) + start for start in starts] if others else []
            low = [start + lane for start in (*starts, *of_b) for lane in range(width)]
            high = [lane + width for lane in low]
            merged.append(builder.fadd(_shuffle(builder, a, b, low), _shuffle(builder, a, b, high)))
        vectors = merged
    return vectors[0]


def _lanes(vector: Any) -> int:
    return vector.type.count


def _shuffle(builder: ir.IRBuilder, a: Any, b: Any, lanes: list[int]) -> Any:
    index = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return builder.shuffle_vector(a, b, index)


def _part(builder: ir.IRBuilder, vector: Any, first: int, n: int) -> Any:
    if n == 1:
        return builder.extract_element(vector, ir.Constant(I32, first))
    undefined = ir.Constant(vector.type, ir.Undefined)
    return _shuffle(builder, vector, undefined, list(range(first, first + n)))


def emit_splat(builder: ir.IRBuilder, value: Any, n: int = LANES) -> Any:
    """Emit a vector of one float32."""
    undefined = ir.Constant(ir.VectorType(F32, n), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return _shuffle(builder, first, undefined, [0] * n)


def emit_loop(
    builder: ir.IRBuilder, start: Any, stop: Any, step: int, carried: list[Any], body: Any
) -> list[Any]:
    """Emit ``for i in range(start, stop, step)`` that carries values; return the last ones."""
    entry = builder.block
    head = builder.append_basic_block("head")
    inner = builder.append_basic_block("inner")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    values = [builder.phi(value.type) for value in carried]
    index.add_incoming(start, entry)
    for phi, value in zip(values, carried, strict=True):
        phi.add_incoming(value, entry)
    builder.cbranch(builder.icmp_signed("<", index, stop), inner, after)
    builder.position_at_end(inner)
    new = body(index, values)
    following = builder.add(index, constant(step))
    index.add_incoming(following, builder.block)
    for phi, value in zip(values, new, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def make_mixer(n_heads: int) -> Any:
    """Return an intrinsic that adds weighted rows for a few heads at once.

    ``mixer(kind, rows, row_bytes, weights, weight_bytes, n_rows, size, out, out_bytes)``:
    ``out[head] += weights[head, i] * rows[i]`` for every row in order; addresses, strides in bytes
    and counts; rows are float32 or bfloat16, the rest float32.

    Args:
        n_heads: How many heads.
    """

    @instruction
    def mixer(  # noqa: ANN202
        typing_context, kind, rows, row_bytes, weights, weight_bytes, n_rows, size, out, out_bytes,  # noqa: ANN001
    ):  # fmt: skip
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            emit_by_kind(
                builder, args[0], BFLOAT16 + 1,
                lambda known: _emit_mixer(builder, known, n_heads, args[1:]),
            )  # fmt: skip
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return mixer


def _emit_mixer(builder: ir.IRBuilder, kind: int, n_heads: int, args: Any) -> None:
    rows, row_bytes, weights, weight_bytes, n_rows, size, out, out_bytes = args

    def offset(base: Any, stride: Any, i: int) -> Any:
        return builder.add(base, builder.mul(stride, constant(i)))

    def columns(at: Any, n_vectors: int, lanes: int) -> None:
        first = builder.add(rows, builder.mul(at, constant(WIDTHS[kind])))
        to = builder.add(out, builder.mul(at, constant(4)))
        places = [
            builder.add(offset(to, out_bytes, head), constant(4 * lanes * vector))
            for head in range(n_heads)
            for vector in range(n_vectors)
        ]

        def add_row(row: Any, sums: list[Any]) -> list[Any]:
            address = builder.add(first, builder.mul(row, row_bytes))
            values = [
                emit_load(
                    builder, builder.add(address, constant(v * lanes * WIDTHS[kind])), kind, lanes
                )
                for v in range(n_vectors)
            ]
            new: list[Any] = []
            for head in range(n_heads):
                place = builder.add(weights, builder.mul(row, constant(4)))
                weight = emit_load(builder, offset(place, weight_bytes, head), FLOAT32)
                factor = weight if lanes == 1 else emit_splat(builder, weight)
                for value in values:
                    new.append(emit_fma(builder, factor, value, sums[len(new)]))
            return new

        start = [emit_load(builder, place, FLOAT32, lanes) for place in places]
        sums = emit_loop(builder, constant(0), n_rows, 1, start, add_row)
        for total, place in zip(sums, places, strict=True):
            emit_store(builder, total, place)

    def body(n_vectors: int, lanes: int) -> Any:
        def run(at: Any, carried: list[Any]) -> list[Any]:
            columns(at, n_vectors, lanes)
            return carried

        return run

    many = builder.and_(size, constant(-_UNROLLED))
    whole = builder.and_(size, constant(-LANES))
    emit_loop(builder, constant(0), many, _UNROLLED, [], body(_UNROLLED // LANES, LANES))
    emit_loop(builder, many, whole, LANES, [], body(1, LANES))
    emit_loop(builder, whole, size, 1, [], body(1, 1))
