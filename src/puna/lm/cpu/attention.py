"""Attention over the blocks of the cache, for the query heads that share a key/value head.

A token's keys are cut into spans, the same ones whatever shares the call. Spans are computed apart,
so that several threads can share a long context of one request, and joined in their order.

Shapes: G query heads per key/value head, D head_dim, S keys of a span, E head_dim + 2.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, kernel
from puna.lm.cpu.elementwise import exp
from puna.lm.cpu.intrinsics import LINE_BYTES, WIDTHS, divide, prefetch
from puna.lm.cpu.matmul import multiply
from puna.lm.cpu.vectors import IS_WIDE, make_mixer

SPAN_KEYS = 512
"""Keys of a span, or the smallest multiple of it that makes :data:`MOST_SPANS`."""
MOST_SPANS = 8
_LANES = 16
_WIDE = IS_WIDE
_LINE_BYTES, _WIDTHS = LINE_BYTES, WIDTHS
_SPAN_KEYS, _MOST_SPANS = SPAN_KEYS, MOST_SPANS

_mix_1, _mix_2 = make_mixer(1), make_mixer(2)


@kernel
def span_keys(n_keys: Int) -> Int:
    """Return how many keys each span of a token has (the last one may have fewer)."""
    return _SPAN_KEYS * ((n_keys + _SPAN_KEYS * _MOST_SPANS - 1) // (_SPAN_KEYS * _MOST_SPANS))


@kernel
def _prefetch_rows(rows: Int, row_bytes: Int, n_rows: Int, used_bytes: Int) -> None:
    for row in range(n_rows):
        for line in range(0, used_bytes, _LINE_BYTES):
            prefetch(rows + row * row_bytes + line)


@kernel
def attend(
    q_GD: Array, kind: Int, keys: Int, values: Int, slot_bytes: Int, blocks: Array,
    block_tokens: Int, first: Int, last: Int, scores_GS: Array, out_GE: Array, lanes: Array,
) -> None:  # fmt: skip
    """Attend to the keys ``first`` to ``last`` of a request.

    Args:
        q_GD: Rotated queries, already divided by sqrt(head_dim).
        kind: Of the cache.
        keys: Address of this head in slot 0 of block 0 of the layer's keys.
        values: The same of the values.
        slot_bytes: From slot to slot.
        blocks: Block numbers of the request.
        block_tokens: Slots of a block.
        first: First key.
        last: Key after the last one.
        scores_GS: float32 scratch, at least as many columns as keys.
        out_GE: float32: per head the sum of values weighted by exp(score - highest), then the sum
            of the weights, then the highest score.
        lanes: float32 scratch of 16.
    """
    n_heads, size = q_GD.shape
    heads, queries = q_GD.strides[0], q_GD.ctypes.data
    width, weights = scores_GS.strides[0], scores_GS.ctypes.data
    at = first
    while at < last:
        slot = at % block_tokens
        n = min(block_tokens - slot, last - at)
        place = (np.int64(blocks[at // block_tokens]) * block_tokens + slot) * slot_bytes
        _prefetch_rows(values + place, slot_bytes, n, size * _WIDTHS[kind])
        if at + n < last:
            ahead = np.int64(blocks[(at + n) // block_tokens]) * block_tokens * slot_bytes
            _prefetch_rows(
                keys + ahead, slot_bytes, min(block_tokens, last - at - n), size * _WIDTHS[kind]
            )
        multiply(
            kind, keys + place, slot_bytes, 0, n, 0, queries, heads, n_heads, size,
            weights + 4 * (at - first), width, 0,
        )  # fmt: skip
        at += n
    for head in range(n_heads):
        out_E = out_GE[head]
        out_E[:size] = 0
        _exponentiate(scores_GS[head, : last - first], lanes, out_E[size:])
    out, row = out_GE.ctypes.data, out_GE.strides[0]
    at = first
    while at < last:
        slot = at % block_tokens
        n = min(block_tokens - slot, last - at)
        place = values + (np.int64(blocks[at // block_tokens]) * block_tokens + slot) * slot_bytes
        head = 0
        while head < n_heads:
            w, to = weights + head * width + 4 * (at - first), out + head * row
            if n_heads - head >= 2 and _WIDE:
                _mix_2(kind, place, slot_bytes, w, width, n, size, to, row)
                head += 2
            else:
                _mix_1(kind, place, slot_bytes, w, width, n, size, to, row)
                head += 1
        at += n


@kernel
def _exponentiate(scores_S: Array, lanes: Array, sum_and_highest: Array) -> None:
    """Replace scores by exp(score - highest); as many partial sums as a vector has elements."""
    size = len(scores_S)
    whole = size - size % _LANES
    lanes[:] = scores_S[0]
    for s in range(0, whole, _LANES):
        for i in range(_LANES):
            lanes[i] = max(lanes[i], scores_S[s + i])
    highest = lanes[0]
    for i in range(1, _LANES):
        highest = max(highest, lanes[i])
    for s in range(whole, size):
        highest = max(highest, scores_S[s])
    for s in range(size):
        scores_S[s] = exp(scores_S[s] - highest)
    lanes[:] = 0
    for s in range(0, whole, _LANES):
        for i in range(_LANES):
            lanes[i] += scores_S[s + i]
    total = np.float32(0)
    for i in range(_LANES):
        total += lanes[i]
    for s in range(whole, size):
        total += scores_S[s]
    sum_and_highest[0], sum_and_highest[1] = total, highest


@kernel
def join(parts_PGE: Array, out_GD: Array) -> None:
    """Join the spans of a token: the weighted mean of all its values.

    Args:
        parts_PGE: What :func:`attend` wrote, per span.
        out_GD: Result.
    """
    n_spans, n_heads, size = parts_PGE.shape[0], parts_PGE.shape[1], out_GD.shape[1]
    for head in range(n_heads):
        out_D = out_GD[head]
        highest = parts_PGE[0, head, size + 1]
        for span in range(1, n_spans):
            highest = max(highest, parts_PGE[span, head, size + 1])
        total = np.float32(0)
        out_D[:] = 0
        for span in range(n_spans):
            part_E = parts_PGE[span, head]
            factor = exp(part_E[size + 1] - highest)
            total += factor * part_E[size]
            for c in range(size):
                out_D[c] += factor * part_E[c]
        for c in range(size):
            out_D[c] = divide(out_D[c], total)
