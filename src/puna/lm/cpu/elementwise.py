"""The loops between the matrices: exponentials, norms, rotation, attention of one head group.

Shapes: N tokens, C dim, D head_dim, H head_dim / 2, S key slots.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from puna.data.kernels.buffers import Array, Float, Int, kernel
from puna.lm.cpu.intrinsics import (
    FLOAT32,
    WIDTHS,
    add_weighted,
    bits_to_float,
    load_float,
    store_float,
)
from puna.lm.cpu.matmul import dot, multiply

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # few bits, so that its product with a small integer is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer
_SMALLEST = np.float32(-87.0)
_LARGEST = np.float32(88.0)
# Taylor coefficients of exp around 0: the argument is at most ln(2) / 2, the error below 2 ulp.
_C2, _C3, _C4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
_C5, _C6, _C7 = np.float32(1 / 120), np.float32(1 / 720), np.float32(1 / 5040)
_ONE = np.float32(1.0)
_WIDTHS = WIDTHS


@njit(nogil=True, inline="always")
def exp(x: Float) -> Float:
    """Return e**x in float32 without a call, so that loops over it become vectors."""
    x = min(max(x, _SMALLEST), _LARGEST)
    n = x * _LOG2_E + _ROUND - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _C6 + r * _C7
    p = _C5 + r * p
    p = _C4 + r * p
    p = _C3 + r * p
    p = _C2 + r * p
    p = r + r * r * p + _ONE
    return p * bits_to_float((np.int32(n) + np.int32(127)) << np.int32(23))


@kernel
def normalise(x_C: Array, weight_C: Array, eps: Float, out_C: Array, scratch: Array) -> None:
    """Write RMSNorm of one token."""
    at, dim = x_C.ctypes.data, len(x_C)
    dot(FLOAT32, at, 0, at, 0, dim, scratch.ctypes.data)
    factor = _ONE / np.sqrt(scratch[0] / np.float32(dim) + eps)
    for c in range(dim):
        out_C[c] = x_C[c] * factor * weight_C[c]


@kernel
def gate(gate_NF: Array, up_NF: Array, n_tokens: Int, first: Int, last: Int) -> None:
    """Replace the gate by silu(gate) * up, for some columns."""
    for t in range(n_tokens):
        gate_F, up_F = gate_NF[t, first:last], up_NF[t, first:last]
        for c in range(last - first):
            value = gate_F[c]
            gate_F[c] = value / (_ONE + exp(-value)) * up_F[c]


@kernel
def rotate(x_D: Array, cos_H: Array, sin_H: Array) -> None:
    """Rotate one head in place, rotate-half."""
    half = len(cos_H)
    for i in range(half):
        a, b = x_D[i], x_D[i + half]
        x_D[i] = a * cos_H[i] - b * sin_H[i]
        x_D[i + half] = b * cos_H[i] + a * sin_H[i]


@kernel
def copy_head(x_D: Array, kind: Int, address: Int) -> None:
    """Store one head in the cache."""
    for i in range(len(x_D)):
        store_float(kind, address + i * _WIDTHS[kind], x_D[i])


@kernel
def embed(kind: Int, row: Int, scale: Int, out_C: Array) -> None:
    """Read one row of the embedding; ``scale`` is the address of an int8 row's scale, else 0."""
    factor = load_float(FLOAT32, scale) if scale else _ONE
    for c in range(len(out_C)):
        out_C[c] = load_float(kind, row + c * _WIDTHS[kind]) * factor


@kernel
def softmax(scores_S: Array, lanes: Array) -> None:
    """Replace scores by their softmax.

    Args:
        scores_S: float32.
        lanes: float32 scratch; as many partial sums let the loops become vectors.
    """
    size, width = len(scores_S), len(lanes)
    whole = size - size % width
    lanes[:] = scores_S[0]
    for s in range(0, whole, width):
        for i in range(width):
            lanes[i] = max(lanes[i], scores_S[s + i])
    highest = lanes[0]
    for i in range(1, width):
        highest = max(highest, lanes[i])
    for s in range(whole, size):
        highest = max(highest, scores_S[s])
    for s in range(size):
        scores_S[s] = exp(scores_S[s] - highest)
    lanes[:] = 0
    for s in range(0, whole, width):
        for i in range(width):
            lanes[i] += scores_S[s + i]
    total = np.float32(0)
    for i in range(width):
        total += lanes[i]
    for s in range(whole, size):
        total += scores_S[s]
    factor = _ONE / total
    for s in range(size):
        scores_S[s] *= factor


@kernel
def attend(
    q_GD: Array, kind: Int, keys: Int, values: Int, slot_bytes: Int, blocks: Array,
    block_tokens: Int, n_keys: Int, scores_GS: Array, out_GD: Array, scratch: Array,
) -> None:  # fmt: skip
    """Attend with the query heads that share one key/value head, over the cache's blocks.

    Args:
        q_GD: Rotated queries, already divided by sqrt(head_dim).
        kind: Of the cache.
        keys: Address of this head in slot 0 of block 0 of the layer's keys.
        values: The same of the values.
        slot_bytes: From slot to slot.
        blocks: Block numbers of the request.
        block_tokens: Slots of a block.
        n_keys: Slots to see, from the request's first.
        scores_GS: float32 scratch, (heads, at least ``n_keys``).
        out_GD: Result.
        scratch: float32, of a tile.
    """
    n_heads, head_dim = q_GD.shape
    for index in range((n_keys + block_tokens - 1) // block_tokens):
        start = index * block_tokens
        n = min(block_tokens, n_keys - start)
        block = keys + np.int64(blocks[index]) * block_tokens * slot_bytes
        multiply(
            kind, block, slot_bytes, 0, 0, n, q_GD, n_heads, head_dim, scores_GS[:, start:], 0,
            scratch,
        )  # fmt: skip
    for head in range(n_heads):
        softmax(scores_GS[head, :n_keys], scratch)
        out_D = out_GD[head]
        out_D[:] = 0
        for index in range((n_keys + block_tokens - 1) // block_tokens):
            start = index * block_tokens
            add_weighted(
                kind, values + np.int64(blocks[index]) * block_tokens * slot_bytes, slot_bytes,
                scores_GS[head, start:].ctypes.data, min(block_tokens, n_keys - start), head_dim,
                out_D.ctypes.data,
            )  # fmt: skip
