"""What 16 tokens side by side need between matrices: norms, rotation, gates, softmax.

See :mod:`puna.lm.cpu.lanes`. All arguments are int64: addresses and counts.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from puna.lm.cpu.intrinsics import (
    BFLOAT16,
    F32,
    FLOAT32,
    I32,
    LANES,
    VECTOR,
    emit_fma,
    emit_load,
    emit_store,
)
from puna.lm.cpu.lanes import (
    VECTOR_BYTES,
    address_instruction,
    emit_after,
    emit_at,
    emit_exp,
    emit_splat_word,
    emit_store_pair,
    emit_vector,
    emit_words,
    floats,
)
from puna.lm.cpu.vectors import constant, emit_loop, emit_splat

_HIDDEN = -1e30  # score of a key that a token does not see


@address_instruction
def normalise_pairs(
    builder: ir.IRBuilder, x: Any, n_pairs: Any, weight: Any, eps: Any, out: Any
) -> None:
    """Write RMSNorm of 16 tokens, rounded to pairs.

    ``weight`` is the address of the norm's bfloat16 weight, ``eps`` of a float32.
    """

    def features(i: Any) -> list[Any]:
        place = emit_at(builder, x, i, 2 * VECTOR_BYTES)
        return [emit_vector(builder, emit_after(builder, place, k)) for k in range(2)]

    def square(i: Any, sums: list[Any]) -> list[Any]:
        return [emit_fma(builder, v, v, s) for v, s in zip(features(i), sums, strict=True)]

    sums = emit_loop(builder, constant(0), n_pairs, 1, [floats(0.0)] * 2, square)
    size = emit_splat(builder, builder.sitofp(builder.shl(n_pairs, constant(1)), F32))
    mean = builder.fdiv(builder.fadd(*sums), size)
    root = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [VECTOR]), f"llvm.sqrt.v{LANES}f32"
    )
    shift = emit_splat(builder, emit_load(builder, eps, FLOAT32))
    factor = builder.fdiv(floats(1.0), builder.call(root, [builder.fadd(mean, shift)]))

    def write(i: Any, carried: list[Any]) -> list[Any]:
        results = []
        for k, value in enumerate(features(i)):
            place = builder.add(emit_at(builder, weight, i, 4), constant(2 * k))
            gain = emit_splat(builder, emit_load(builder, place, BFLOAT16))
            results.append(builder.fmul(builder.fmul(value, factor), gain))
        emit_store_pair(builder, results, emit_at(builder, out, i, VECTOR_BYTES))
        return carried

    emit_loop(builder, constant(0), n_pairs, 1, [], write)


@address_instruction
def pack_pairs(builder: ir.IRBuilder, x: Any, n_pairs: Any, factors: Any, out: Any) -> None:
    """Multiply the features of 16 tokens by the factor of each token and round them to pairs.

    ``factors`` is the address of one vector; ``out`` takes ``n_pairs`` vectors.
    """
    factor = emit_vector(builder, factors)

    def step(i: Any, carried: list[Any]) -> list[Any]:
        place = emit_at(builder, x, i, 2 * VECTOR_BYTES)
        first, second = (emit_vector(builder, emit_after(builder, place, k)) for k in range(2))
        to = emit_at(builder, out, i, VECTOR_BYTES)
        emit_store_pair(builder, [builder.fmul(first, factor), builder.fmul(second, factor)], to)
        return carried

    emit_loop(builder, constant(0), n_pairs, 1, [], step)


@address_instruction
def gate_pairs(builder: ir.IRBuilder, gate: Any, up: Any, n_pairs: Any, out: Any) -> None:
    """Write silu(gate) * up of 16 tokens, rounded to pairs."""

    def step(i: Any, carried: list[Any]) -> list[Any]:
        at = builder.mul(i, constant(2 * VECTOR_BYTES))
        results = []
        for k in range(2):
            x = emit_vector(builder, emit_after(builder, builder.add(gate, at), k))
            factor = emit_vector(builder, emit_after(builder, builder.add(up, at), k))
            e = emit_exp(builder, builder.fsub(floats(-0.0), x))
            sigmoid = builder.fdiv(x, builder.fadd(floats(1.0), e))
            results.append(builder.fmul(sigmoid, factor))
        emit_store_pair(builder, results, emit_at(builder, out, i, VECTOR_BYTES))
        return carried

    emit_loop(builder, constant(0), n_pairs, 1, [], step)


@address_instruction
def rotate_pairs(
    builder: ir.IRBuilder, x: Any, cos: Any, sin: Any, half: Any, scales: Any, out: Any
) -> None:
    """Rotate one head of 16 tokens, rotate-half, multiply it and round it to pairs.

    ``cos`` and ``sin`` are the addresses of ``half`` vectors, ``scales`` of one; ``half`` is even.
    """
    scale = emit_vector(builder, scales)
    half_bytes = builder.mul(half, constant(VECTOR_BYTES))
    upper = builder.add(x, half_bytes)
    upper_out = builder.add(out, builder.lshr(half_bytes, constant(1)))

    def step(i: Any, carried: list[Any]) -> list[Any]:
        at, to = builder.mul(i, constant(VECTOR_BYTES)), builder.mul(i, constant(VECTOR_BYTES // 2))
        low, high = [], []
        for k in range(2):
            a, b, c, s = (
                emit_vector(builder, emit_after(builder, builder.add(base, at), k))
                for base in (x, upper, cos, sin)
            )
            turned = builder.fsub(builder.fmul(a, c), builder.fmul(b, s))
            low.append(builder.fmul(turned, scale))
            turned = builder.fadd(builder.fmul(b, c), builder.fmul(a, s))
            high.append(builder.fmul(turned, scale))
        emit_store_pair(builder, low, builder.add(out, to))
        emit_store_pair(builder, high, builder.add(upper_out, to))
        return carried

    emit_loop(builder, constant(0), half, 2, [], step)


@address_instruction
def soften(
    builder: ir.IRBuilder, scores: Any, n_keys: Any, visible: Any, state: Any, out: Any
) -> None:
    """Turn the scores of some keys into weights: one step of a softmax that goes on.

    ``scores`` and ``out`` are addresses of ``n_keys`` vectors and of half as many pairs, an even
    number; ``visible`` of a vector of int32: how many of the keys each of the 16 tokens sees;
    ``state`` of three vectors: the highest score so far, the sum of weights so far, and what the
    weights before these keys have to be multiplied by.
    """
    limit = emit_words(builder, visible)
    before, total = emit_vector(builder, state), emit_vector(builder, emit_after(builder, state, 1))

    def is_seen(key: Any, k: int) -> Any:
        number = builder.trunc(builder.add(key, constant(k)), I32)
        return builder.icmp_signed("<", emit_splat_word(builder, number), limit)

    def find(key: Any, tops: list[Any]) -> list[Any]:
        place, new = emit_at(builder, scores, key, VECTOR_BYTES), []
        for k, top in enumerate(tops):
            score = emit_vector(builder, emit_after(builder, place, k))
            score = builder.select(is_seen(key, k), score, floats(_HIDDEN))
            new.append(builder.select(builder.fcmp_ordered(">", score, top), score, top))
        return new

    first, second = emit_loop(builder, constant(0), n_keys, 2, [before, before], find)
    top = builder.select(builder.fcmp_ordered(">", second, first), second, first)
    factor = emit_exp(builder, builder.fsub(before, top))

    def weigh(key: Any, sums: list[Any]) -> list[Any]:
        place, weights = emit_at(builder, scores, key, VECTOR_BYTES), []
        for k in range(2):
            score = emit_vector(builder, emit_after(builder, place, k))
            weight = emit_exp(builder, builder.fsub(score, top))
            weights.append(builder.select(is_seen(key, k), weight, floats(0.0)))
        emit_store_pair(builder, weights, emit_at(builder, out, key, VECTOR_BYTES // 2))
        return [builder.fadd(s, w) for s, w in zip(sums, weights, strict=True)]

    sums = emit_loop(builder, constant(0), n_keys, 2, [floats(0.0)] * 2, weigh)
    total = builder.fadd(builder.fmul(total, factor), builder.fadd(*sums))
    for k, value in enumerate((top, total, factor)):
        emit_store(builder, value, emit_after(builder, state, k))


@address_instruction
def scale_vectors(builder: ir.IRBuilder, x: Any, n_vectors: Any, factors: Any) -> None:
    """Multiply vectors by one, in place."""
    factor = emit_vector(builder, factors)

    def step(i: Any, carried: list[Any]) -> list[Any]:
        place = emit_at(builder, x, i, VECTOR_BYTES)
        emit_store(builder, builder.fmul(emit_vector(builder, place), factor), place)
        return carried

    emit_loop(builder, constant(0), n_vectors, 1, [], step)


@address_instruction
def invert(builder: ir.IRBuilder, x: Any) -> None:
    """Replace a vector by its reciprocals."""
    emit_store(builder, builder.fdiv(floats(1.0), emit_vector(builder, x)), x)


@address_instruction
def copy_word(builder: ir.IRBuilder, source: Any, target: Any) -> None:
    """Copy 4 bytes."""
    _copy(builder, source, target, I32)


@address_instruction
def copy_short(builder: ir.IRBuilder, source: Any, target: Any) -> None:
    """Copy 2 bytes."""
    _copy(builder, source, target, ir.IntType(16))


def _copy(builder: ir.IRBuilder, source: Any, target: Any, kind: Any) -> None:
    value = builder.load(builder.inttoptr(source, kind.as_pointer()))
    value.align = 2
    builder.store(value, builder.inttoptr(target, kind.as_pointer())).align = 2
