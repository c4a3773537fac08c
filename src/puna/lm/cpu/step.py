"""A whole forward of few tokens, run by every thread of a crew at once.

Per layer there are five stages, which threads share piece by piece (:mod:`puna.lm.cpu.schedule`):
queries, keys and values of a head, rotated, keys and values stored; attention; its output; the
gate; the feed-forward's output.

Activations are float32, rounded to 16 bits where they are multiplied by int8 weights; weights and
cache may be bfloat16.

Shapes: see :mod:`puna.lm.cpu.structures`.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, kernel
from puna.lm.cpu.attention import attend, join, span_keys
from puna.lm.cpu.elementwise import copy_head, embed, gate, narrow, normalise, rotate
from puna.lm.cpu.intrinsics import INT8, WIDTHS, atomic_add
from puna.lm.cpu.matmul import AHEAD_BYTES, multiply
from puna.lm.cpu.schedule import finish, rows_per_piece, take, wait
from puna.lm.cpu.structures import (
    STAGES_PER_LAYER,
    W1,
    W2,
    W3,
    WK,
    WO,
    WQ,
    WV,
    Buffers,
    Cache,
    Call,
    Shape,
    Weights,
)

_WIDTHS, _AHEAD_BYTES, _STAGES_PER_LAYER = WIDTHS, AHEAD_BYTES, STAGES_PER_LAYER
_ONE = np.float32(1.0)


@kernel
def forward(
    thread: Int, n_threads: Int, weights: Weights, shape: Shape, cache: Cache, call: Call,
    buffers: Buffers,
) -> None:  # fmt: skip
    """Do one thread's part of a forward."""
    n_tokens = len(call.tokens_N)
    progress = buffers.progress_T.ctypes.data
    piece = take(progress, 0, n_tokens)
    while piece < n_tokens:
        token = call.tokens_N[piece]
        row = weights.embedding + token * shape.dim * _WIDTHS[weights.kind]
        embed(weights.kind, row, weights.embedding_scales + 4 * token, buffers.x_NC[piece])
        finish(progress, 0)
        piece = take(progress, 0, n_tokens)
    wait(progress, 0, n_tokens)
    stage = 1
    for layer in range(len(weights.addresses_L7)):
        _project(thread, stage, layer, weights, shape, cache, call, buffers)
        _mix(thread, stage + 1, layer, shape, cache, call, buffers)
        _add(thread, n_threads, stage + 2, layer, WO, weights, shape, call, buffers)
        _gate(thread, n_threads, stage + 3, layer, weights, shape, call, buffers)
        _add(thread, n_threads, stage + 4, layer, W2, weights, shape, call, buffers)
        stage += _STAGES_PER_LAYER
    if len(call.rows_R):
        head(thread, n_threads, stage, weights, shape, call.rows_R, call.logits_RV, buffers)


@kernel
def _given(
    thread: Int, weights: Weights, x_NI: Array, n_tokens: Int, buffers: Buffers
) -> tuple[Int, Int]:
    """Return where products find some tokens, and the bytes from token to token."""
    if weights.kind != INT8:
        return x_NI.ctypes.data, x_NI.strides[0]
    narrow_NB = buffers.narrow_PNB[thread]
    narrow(x_NI, n_tokens, narrow_NB)
    return narrow_NB.ctypes.data, narrow_NB.strides[0]


@kernel
def _project(
    thread: Int, stage: Int, layer: Int, weights: Weights, shape: Shape, cache: Cache, call: Call,
    buffers: Buffers,
) -> None:  # fmt: skip
    """Compute queries, keys and values; a piece is one head of all tokens."""
    n_heads, n_kv, size, dim = shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.dim
    n_pieces, n_tokens = n_heads + 2 * n_kv, len(call.tokens_N)
    progress = buffers.progress_T.ctypes.data
    normed_NC, qkv_NQ = buffers.normed_PNC[thread], buffers.qkv_NQ
    row_bytes, cached = dim * _WIDTHS[weights.kind], _WIDTHS[cache.kind]
    scale = np.float32(1.0 / np.sqrt(size))
    given, given_bytes = 0, 0
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        if not given:
            normalise(
                buffers.x_NC, weights.norm_kind, weights.norms_L2[layer, 0], weights.eps, 0,
                n_tokens, normed_NC,
            )  # fmt: skip
            given, given_bytes = _given(thread, weights, normed_NC, n_tokens, buffers)
        if piece < n_heads:
            which, head = WQ, piece
        elif piece < n_heads + n_kv:
            which, head = WK, piece - n_heads
        else:
            which, head = WV, piece - n_heads - n_kv
        row, column = head * size, piece * size
        multiply(
            weights.kind, weights.addresses_L7[layer, which] + row * row_bytes, row_bytes,
            weights.scales_L7[layer, which] + 4 * row, size, _AHEAD_BYTES, given,
            given_bytes, n_tokens, dim, qkv_NQ.ctypes.data + 4 * column, qkv_NQ.strides[0], 0,
        )  # fmt: skip
        for t in range(n_tokens):
            x_D = qkv_NQ[t, column : column + size]
            if which == WQ:
                rotate(x_D, call.cos_NH[t], call.sin_NH[t], scale)
                continue
            if which == WK:
                rotate(x_D, call.cos_NH[t], call.sin_NH[t], _ONE)
            position, in_block = call.positions_N[t], cache.block_tokens
            block = np.int64(call.tables_NM[t, position // in_block])
            slot = (block * in_block + position % in_block) * n_kv + head
            base = cache.keys_L[layer] if which == WK else cache.values_L[layer]
            copy_head(x_D, cache.kind, base + slot * size * cached)
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def _mix(
    thread: Int, stage: Int, layer: Int, shape: Shape, cache: Cache, call: Call, buffers: Buffers
) -> None:
    """Attend; a piece is a span of the keys of one token and key/value head.

    Whoever finishes the last span of a head joins them.
    """
    n_kv, size = shape.n_kv_heads, shape.head_dim
    group, n_tokens = shape.n_heads // n_kv, len(call.tokens_N)
    most = 0
    for t in range(n_tokens):
        n_keys = call.positions_N[t] + 1
        most = max(most, (n_keys - 1) // span_keys(n_keys) + 1)
    n_pieces = n_tokens * n_kv * most
    progress, joined = buffers.progress_T.ctypes.data, buffers.joined_NK
    head_bytes = size * _WIDTHS[cache.kind]
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        span, head, t = piece % most, piece // most % n_kv, piece // most // n_kv
        n_keys = call.positions_N[t] + 1
        keys_per_span = span_keys(n_keys)
        n_spans = (n_keys - 1) // keys_per_span + 1
        if span < n_spans:
            first, last = head * group * size, (head + 1) * group * size
            parts_ZGE = buffers.parts_NKZGE[t, head]
            attend(
                buffers.qkv_NQ[t, first:last].reshape(group, size), cache.kind,
                cache.keys_L[layer] + head * head_bytes, cache.values_L[layer] + head * head_bytes,
                n_kv * head_bytes, call.tables_NM[t], cache.block_tokens, span * keys_per_span,
                min(n_keys, (span + 1) * keys_per_span), buffers.scores_PGS[thread],
                parts_ZGE[span], buffers.lanes_P16[thread],
            )  # fmt: skip
            count = joined.ctypes.data + 8 * (t * n_kv + head)
            if atomic_add(count, 1) + 1 == (layer + 1) * n_spans:
                join(parts_ZGE[:n_spans], buffers.mixed_NC[t, first:last].reshape(group, size))
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def _add(
    thread: Int, n_threads: Int, stage: Int, layer: Int, which: Int, weights: Weights, shape: Shape,
    call: Call, buffers: Buffers,
) -> None:  # fmt: skip
    """Add the output of attention (wo) or of the feed-forward (w2) to the residual stream."""
    inputs = buffers.mixed_NC if which == WO else buffers.gate_NF
    size = shape.dim if which == WO else shape.ffn_dim
    n_tokens, given, given_bytes = len(call.tokens_N), 0, 0
    row_bytes, progress = size * _WIDTHS[weights.kind], buffers.progress_T.ctypes.data
    rows = rows_per_piece(shape.dim, row_bytes, n_threads)
    n_pieces = (shape.dim + rows - 1) // rows
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        if not given:
            given, given_bytes = _given(thread, weights, inputs, n_tokens, buffers)
        row = piece * rows
        multiply(
            weights.kind, weights.addresses_L7[layer, which] + row * row_bytes, row_bytes,
            weights.scales_L7[layer, which] + 4 * row, min(rows, shape.dim - row), _AHEAD_BYTES,
            given, given_bytes, n_tokens, size,
            buffers.x_NC.ctypes.data + 4 * row, buffers.x_NC.strides[0], 1,
        )  # fmt: skip
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def _gate(
    thread: Int, n_threads: Int, stage: Int, layer: Int, weights: Weights, shape: Shape,
    call: Call, buffers: Buffers,
) -> None:  # fmt: skip
    """Compute silu(w1 x) * w3 x."""
    dim, ffn_dim, n_tokens = shape.dim, shape.ffn_dim, len(call.tokens_N)
    row_bytes, progress = dim * _WIDTHS[weights.kind], buffers.progress_T.ctypes.data
    rows = rows_per_piece(ffn_dim, 2 * row_bytes, n_threads)
    n_pieces = (ffn_dim + rows - 1) // rows
    normed_NC = buffers.normed_PNC[thread]
    given, given_bytes = 0, 0
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        if not given:
            normalise(
                buffers.x_NC, weights.norm_kind, weights.norms_L2[layer, 1], weights.eps, 0,
                n_tokens, normed_NC,
            )  # fmt: skip
            given, given_bytes = _given(thread, weights, normed_NC, n_tokens, buffers)
        first = piece * rows
        last = min(ffn_dim, first + rows)
        for which in (W1, W3):
            out = buffers.gate_NF if which == W1 else buffers.up_NF
            multiply(
                weights.kind, weights.addresses_L7[layer, which] + first * row_bytes, row_bytes,
                weights.scales_L7[layer, which] + 4 * first, last - first, _AHEAD_BYTES,
                given, given_bytes, n_tokens, dim, out.ctypes.data + 4 * first, out.strides[0], 0,
            )  # fmt: skip
        gate(buffers.gate_NF, buffers.up_NF, n_tokens, first, last)
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def head(
    thread: Int, n_threads: Int, stage: Int, weights: Weights, shape: Shape, rows_R: Array,
    logits_RV: Array, buffers: Buffers,
) -> None:  # fmt: skip
    """Compute the logits of some tokens of the residual stream."""
    dim, n_rows = shape.dim, len(rows_R)
    row_bytes, progress = dim * _WIDTHS[weights.kind], buffers.progress_T.ctypes.data
    rows = rows_per_piece(shape.vocab_size, row_bytes, n_threads)
    n_pieces = (shape.vocab_size + rows - 1) // rows
    normed_NC, out = buffers.normed_PNC[thread], logits_RV
    given, given_bytes = 0, 0
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        if not given:
            for i in range(n_rows):
                normalise(
                    buffers.x_NC, weights.norm_kind, weights.norm, weights.eps, rows_R[i], 1,
                    normed_NC[i:],
                )  # fmt: skip
            given, given_bytes = _given(thread, weights, normed_NC, n_rows, buffers)
        row = piece * rows
        multiply(
            weights.kind, weights.head + row * row_bytes, row_bytes,
            weights.head_scales + 4 * row, min(rows, shape.vocab_size - row), _AHEAD_BYTES,
            given, given_bytes, n_rows, dim, out.ctypes.data + 4 * row, out.strides[0], 0,
        )  # fmt: skip
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)
