"""A whole forward of few tokens, run by every thread of a crew at once.

Each matrix is split between the threads by rows; between two matrices the threads wait for each
other by spinning on a counter, for less than a microsecond when all of them run. Attention is split
by (token, key/value head). Sums never cross threads, so their number changes no bit.

Activations are float32; weights and cache may be bfloat16, weights also int8.

Shapes: N tokens, C dim, F ffn_dim, Q dim + 2 * kv_dim, L layers, H head_dim / 2, M blocks of a
request, R rows of logits, V vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types

from puna.data.kernels.buffers import Int, kernel
from puna.lm.cpu.elementwise import attend, copy_head, embed, gate, normalise, rotate
from puna.lm.cpu.intrinsics import WIDTHS, atomic_add, atomic_load, pause
from puna.lm.cpu.matmul import multiply

WQ, WK, WV, WO, W1, W2, W3 = range(7)
"""Columns of the tables of weights."""
_SPINS_BEFORE_YIELD = 4000
_WIDTHS = WIDTHS
_yield_processor = types.ExternalFunction("sched_yield", types.int32())


class Weights(NamedTuple):
    """Where the parameters lie; the objects that own the memory are kept by the decoder.

    Attributes:
        kind: Of all matrices.
        addresses_L7: Address of row 0 of each matrix, int64.
        scales_L7: Address of the scales of its rows, int8 only.
        norms_L2C: float32, before attention and before the feed-forward.
        norm_C: float32, the last.
        embedding: Address, kind as the others.
        embedding_scales: Address.
        head: Address.
        head_scales: Address.
        eps: Of the norms.
    """

    kind: int
    addresses_L7: np.ndarray
    scales_L7: np.ndarray
    norms_L2C: np.ndarray
    norm_C: np.ndarray
    embedding: int
    embedding_scales: int
    head: int
    head_scales: int
    eps: np.float32


class Shape(NamedTuple):
    """Sizes of the model."""

    dim: int
    ffn_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int


class Cache(NamedTuple):
    """The pool of blocks: kind of its values, address of each layer's keys and values, sizes."""

    kind: int
    keys_L: np.ndarray
    values_L: np.ndarray
    block_tokens: int


class Call(NamedTuple):
    """The tokens of one call.

    Attributes:
        tokens_N: Ids, int64.
        positions_N: Position of each in its request, int64.
        tables_NM: Blocks of each token's request, int32.
        cos_NH: Rotation of each token, float32.
        sin_NH: The same.
        rows_R: Tokens whose logits are wanted, int64.
        waits: Whether a token may see another one of the same call.
    """

    tokens_N: np.ndarray
    positions_N: np.ndarray
    tables_NM: np.ndarray
    cos_NH: np.ndarray
    sin_NH: np.ndarray
    rows_R: np.ndarray
    waits: int


class Buffers(NamedTuple):
    """Memory of the activations, at least as large as the call needs; float32.

    Attributes:
        counter: One int64, zero before the call: what the threads spin on.
        x_NC: The residual stream.
        normed_PNC: A copy of its norm for each thread.
        qkv_NQ: Queries, keys and values.
        mixed_NC: What attention gives.
        gate_NF: Inside the feed-forward.
        up_NF: Inside the feed-forward.
        scores_PGS: Scratch of attention for each thread.
        scratch_P16: Scratch of a tile for each thread.
        logits_RV: The result.
    """

    counter: np.ndarray
    x_NC: np.ndarray
    normed_PNC: np.ndarray
    qkv_NQ: np.ndarray
    mixed_NC: np.ndarray
    gate_NF: np.ndarray
    up_NF: np.ndarray
    scores_PGS: np.ndarray
    scratch_P16: np.ndarray
    logits_RV: np.ndarray


@kernel
def meet(counter: Int, target: Int) -> None:
    """Wait until all threads have come here; the counter then stands at ``target``.

    A thread that spins for long gives its processor away: the one it waits for may need it.
    """
    atomic_add(counter, 1)
    spins = 0
    while atomic_load(counter) < target:
        spins += 1
        if spins < _SPINS_BEFORE_YIELD:
            pause()
        else:
            _yield_processor()


@kernel
def share(n_rows: Int, thread: Int, n_threads: Int) -> tuple[Int, Int]:
    """Return the first and the last + 1 of a thread's rows, in groups of 4 (whole tiles)."""
    groups = (n_rows + 3) // 4
    return (
        min(n_rows, groups * thread // n_threads * 4),
        min(n_rows, groups * (thread + 1) // n_threads * 4),
    )


@kernel
def forward(
    thread: Int, n_threads: Int, weights: Weights, shape: Shape, cache: Cache, call: Call,
    buffers: Buffers,
) -> None:  # fmt: skip
    """Do one thread's part of a forward."""
    w, b = weights, buffers
    n, dim, ffn = len(call.tokens_N), shape.dim, shape.ffn_dim
    kv_dim = shape.n_kv_heads * shape.head_dim
    counter = b.counter.ctypes.data
    normed, scratch = b.normed_PNC[thread], b.scratch_P16[thread]
    width = _WIDTHS[w.kind]
    met = 0
    for t in range(thread, n, n_threads):
        token = call.tokens_N[t]
        scale = w.embedding_scales + 4 * token if w.embedding_scales else 0
        embed(w.kind, w.embedding + token * dim * width, scale, b.x_NC[t])
    for layer in range(len(w.addresses_L7)):
        at, scales = w.addresses_L7[layer], w.scales_L7[layer]
        met += n_threads
        meet(counter, met)
        for t in range(n):
            normalise(b.x_NC[t], w.norms_L2C[layer, 0], w.eps, normed[t], scratch)
        start = 0
        for which in (WQ, WK, WV):
            rows = dim if which == WQ else kv_dim
            first, last = share(rows, thread, n_threads)
            multiply(
                w.kind, at[which], dim * width, scales[which], first, last, normed, n, dim,
                b.qkv_NQ[:, start : start + rows], 0, scratch,
            )  # fmt: skip
            start += rows
        met += n_threads
        meet(counter, met)
        if call.waits:
            mix(thread, n_threads, layer, shape, cache, call, b, True, False)
            met += n_threads
            meet(counter, met)
            mix(thread, n_threads, layer, shape, cache, call, b, False, True)
        else:
            mix(thread, n_threads, layer, shape, cache, call, b, True, True)
        met += n_threads
        meet(counter, met)
        first, last = share(dim, thread, n_threads)
        multiply(
            w.kind, at[WO], dim * width, scales[WO], first, last, b.mixed_NC, n, dim, b.x_NC, 1,
            scratch,
        )  # fmt: skip
        met += n_threads
        meet(counter, met)
        for t in range(n):
            normalise(b.x_NC[t], w.norms_L2C[layer, 1], w.eps, normed[t], scratch)
        first, last = share(ffn, thread, n_threads)
        multiply(
            w.kind, at[W1], dim * width, scales[W1], first, last, normed, n, dim, b.gate_NF, 0,
            scratch,
        )  # fmt: skip
        multiply(
            w.kind, at[W3], dim * width, scales[W3], first, last, normed, n, dim, b.up_NF, 0,
            scratch,
        )  # fmt: skip
        gate(b.gate_NF, b.up_NF, n, first, last)
        met += n_threads
        meet(counter, met)
        first, last = share(dim, thread, n_threads)
        multiply(
            w.kind, at[W2], ffn * width, scales[W2], first, last, b.gate_NF, n, ffn, b.x_NC, 1,
            scratch,
        )  # fmt: skip
    met += n_threads
    meet(counter, met)
    n_rows = len(call.rows_R)
    for i in range(n_rows):
        normalise(b.x_NC[call.rows_R[i]], w.norm_C, w.eps, normed[i], scratch)
    first, last = share(shape.vocab_size, thread, n_threads)
    multiply(
        w.kind, w.head, dim * width, w.head_scales, first, last, normed, n_rows, dim, b.logits_RV,
        0, scratch,
    )  # fmt: skip


@kernel
def mix(
    thread: Int, n_threads: Int, layer: Int, shape: Shape, cache: Cache, call: Call,
    buffers: Buffers, stores: Int, attends: Int,
) -> None:  # fmt: skip
    """Rotate and store keys and values, and attend, for a thread's (token, head) pairs."""
    size, n_kv = shape.head_dim, shape.n_kv_heads
    group, width = shape.n_heads // n_kv, _WIDTHS[cache.kind]
    slot_bytes = n_kv * size * width
    scale = np.float32(1.0 / np.sqrt(size))
    for item in range(thread, len(call.tokens_N) * n_kv, n_threads):
        t, head = item // n_kv, item % n_kv
        qkv, position, table = buffers.qkv_NQ[t], call.positions_N[t], call.tables_NM[t]
        at_q, at_k = head * group * size, (n_kv * group + head) * size
        at_v = at_k + n_kv * size
        keys = cache.keys_L[layer] + head * size * width
        values = cache.values_L[layer] + head * size * width
        if stores:
            for i in range(group):
                q = qkv[at_q + i * size : at_q + (i + 1) * size]
                rotate(q, call.cos_NH[t], call.sin_NH[t])
                for c in range(size):
                    q[c] *= scale
            rotate(qkv[at_k : at_k + size], call.cos_NH[t], call.sin_NH[t])
            slot = np.int64(table[position // cache.block_tokens]) * cache.block_tokens
            slot = (slot + position % cache.block_tokens) * slot_bytes
            copy_head(qkv[at_k : at_k + size], cache.kind, keys + slot)
            copy_head(qkv[at_v : at_v + size], cache.kind, values + slot)
        if attends:
            attend(
                qkv[at_q : at_q + group * size].reshape(group, size), cache.kind, keys, values,
                slot_bytes, table, cache.block_tokens, position + 1, buffers.scores_PGS[thread],
                buffers.mixed_NC[t, at_q : at_q + group * size].reshape(group, size),
                buffers.scratch_P16[thread],
            )  # fmt: skip
