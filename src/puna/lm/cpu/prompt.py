"""A forward of prompts in bfloat16, run by every thread of a crew at once.

The residual stream and all sums are float32; what enters a product is rounded to bfloat16, queries
and the weights of attention too. Tokens of one request lie side by side, 16 in a vector; a request
begins a new one. A layer has nine stages, which threads share piece by piece
(:mod:`puna.lm.cpu.schedule`).

Attention looks at a request's keys in blocks from its first one, so that a token's bits do not
depend on where its prompt was cut.

Needs what :mod:`puna.lm.cpu.pairs` needs. Shapes: see :mod:`puna.lm.cpu.structures`.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Int, kernel
from puna.lm.cpu.intrinsics import BFLOAT16, load_float
from puna.lm.cpu.lanes import VECTOR_BYTES
from puna.lm.cpu.lanewise import (
    copy_short,
    copy_word,
    gate_pairs,
    invert,
    normalise_pairs,
    pack_pairs,
    rotate_pairs,
    scale_vectors,
    soften,
)
from puna.lm.cpu.pairs import multiply_pairs
from puna.lm.cpu.schedule import finish, take, wait
from puna.lm.cpu.structures import (
    GATE_ROWS,
    GATE_VECTORS,
    KEY_BLOCK,
    STAGES_PER_PROMPT_LAYER,
    W1,
    W2,
    W3,
    WK,
    WO,
    WQ,
    WV,
    Cache,
    Prompt,
    PromptBuffers,
    Shape,
    Weights,
)

_VECTOR_BYTES, _KEY_BLOCK, _STAGES = VECTOR_BYTES, KEY_BLOCK, STAGES_PER_PROMPT_LAYER
_LANES = 16
_ROWS = 48  # of a piece of a product: whole tiles, and with its tokens in the second-level cache
_GATE_ROWS, _GROUP = GATE_ROWS, GATE_VECTORS
_LOWEST = np.float32(-1e30)


@kernel
def compute_prompt(
    thread: Int, weights: Weights, shape: Shape, cache: Cache, prompt: Prompt,
    buffers: PromptBuffers,
) -> None:  # fmt: skip
    """Do one thread's part of a forward: keys and values are stored, ``x_VC16`` is the result."""
    n_vectors = len(prompt.owners_V)
    progress = buffers.progress_T.ctypes.data
    piece = take(progress, 0, n_vectors)
    while piece < n_vectors:
        for lane in range(_LANES):
            row = weights.embedding + 2 * shape.dim * prompt.tokens_V16[piece, lane]
            for c in range(shape.dim):
                buffers.x_VC16[piece, c, lane] = load_float(BFLOAT16, row + 2 * c)
        finish(progress, 0)
        piece = take(progress, 0, n_vectors)
    wait(progress, 0, n_vectors)
    stage = 1
    for layer in range(len(weights.addresses_L7)):
        _normalise(stage, layer, 0, weights, shape, prompt, buffers)
        _project(stage + 1, layer, weights, shape, prompt, buffers)
        _rotate(stage + 2, layer, shape, cache, prompt, buffers)
        _gather(stage + 3, layer, shape, cache, prompt, buffers)
        _attend(thread, stage + 4, shape, prompt, buffers)
        _add(stage + 5, layer, WO, weights, shape, prompt, buffers)
        _normalise(stage + 6, layer, 1, weights, shape, prompt, buffers)
        _gate(thread, stage + 7, layer, weights, shape, prompt, buffers)
        _add(stage + 8, layer, W2, weights, shape, prompt, buffers)
        stage += _STAGES


@kernel
def _normalise(
    stage: Int, layer: Int, which: Int, weights: Weights, shape: Shape, prompt: Prompt,
    buffers: PromptBuffers,
) -> None:  # fmt: skip
    """Norm of the residual stream; a piece is a vector of tokens."""
    progress, n_pieces = buffers.progress_T.ctypes.data, len(prompt.owners_V)
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        normalise_pairs(
            buffers.x_VC16[piece].ctypes.data, shape.dim // 2, weights.norms_L2[layer, which],
            buffers.eps_1.ctypes.data, buffers.normed_VC16[piece].ctypes.data,
        )  # fmt: skip
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def _project(
    stage: Int, layer: Int, weights: Weights, shape: Shape, prompt: Prompt,
    buffers: PromptBuffers,
) -> None:  # fmt: skip
    """Queries, keys and values; a piece is some rows of one of the matrices."""
    kv_dim, row_bytes = shape.n_kv_heads * shape.head_dim, 2 * shape.dim
    n_query = (shape.dim + _ROWS - 1) // _ROWS
    n_key = (kv_dim + _ROWS - 1) // _ROWS
    progress, n_pieces = buffers.progress_T.ctypes.data, n_query + 2 * n_key
    normed, qkv = buffers.normed_VC16, buffers.qkv_VQ16
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        if piece < n_query:
            which, row, n_rows, before = WQ, piece * _ROWS, shape.dim, 0
        elif piece < n_query + n_key:
            which, row, n_rows, before = WK, (piece - n_query) * _ROWS, kv_dim, shape.dim
        else:
            row, before = (piece - n_query - n_key) * _ROWS, shape.dim + kv_dim
            which, n_rows = WV, kv_dim
        multiply_pairs(
            weights.addresses_L7[layer, which] + row * row_bytes, row_bytes,
            min(_ROWS, n_rows - row), normed.ctypes.data, normed.strides[0],
            len(prompt.owners_V), shape.dim // 2,
            qkv.ctypes.data + (before + row) * _VECTOR_BYTES, qkv.strides[0], 0,
        )  # fmt: skip
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def _rotate(
    stage: Int, layer: Int, shape: Shape, cache: Cache, prompt: Prompt, buffers: PromptBuffers
) -> None:
    """Rotate queries and keys, store keys and values; a piece is a vector of tokens."""
    n_heads, n_kv, size = shape.n_heads, shape.n_kv_heads, shape.head_dim
    progress, n_pieces = buffers.progress_T.ctypes.data, len(prompt.owners_V)
    head_bytes, factors = size * _VECTOR_BYTES, buffers.factors_216
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        x, out = buffers.qkv_VQ16[piece].ctypes.data, buffers.query_VQ16[piece].ctypes.data
        cos, sin = prompt.cos_VH16[piece].ctypes.data, prompt.sin_VH16[piece].ctypes.data
        for head in range(n_heads + n_kv):
            rotate_pairs(
                x + head * head_bytes, cos, sin, size // 2,
                factors[1 if head < n_heads else 0].ctypes.data, out + head * head_bytes // 2,
            )  # fmt: skip
        pack_pairs(
            x + (n_heads + n_kv) * head_bytes, n_kv * size // 2, factors[0].ctypes.data,
            out + (n_heads + n_kv) * head_bytes // 2,
        )  # fmt: skip
        blocks_M = prompt.tables_RM[prompt.owners_V[piece]]
        n_pairs = n_kv * size // 2
        keys = out + n_heads * head_bytes // 2
        values = keys + n_pairs * _VECTOR_BYTES
        for lane in range(prompt.counts_V[piece]):
            position = prompt.positions_V16[piece, lane]
            block = np.int64(blocks_M[position // cache.block_tokens])
            slot = block * cache.block_tokens + position % cache.block_tokens
            key = cache.keys_L[layer] + slot * 4 * n_pairs
            value = cache.values_L[layer] + slot * 4 * n_pairs
            for pair in range(n_pairs):
                at = pair * _VECTOR_BYTES + 4 * lane
                copy_word(keys + at, key + 4 * pair)
                copy_word(values + at, value + 4 * pair)
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def _gather(
    stage: Int, layer: Int, shape: Shape, cache: Cache, prompt: Prompt, buffers: PromptBuffers
) -> None:
    """Collect keys, and values turned around, from the cache; a piece is a block of one head."""
    n_kv, size = shape.n_kv_heads, shape.head_dim
    progress, n_pieces = buffers.progress_T.ctypes.data, len(prompt.block_owners_B) * n_kv
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        block, head = piece // n_kv, piece % n_kv
        owner = prompt.block_owners_B[block]
        first = (block - prompt.first_blocks_R[owner]) * _KEY_BLOCK
        key = buffers.keys_BKSD[block, head].ctypes.data
        value = buffers.values_BKDS[block, head].ctypes.data
        for at in range(_KEY_BLOCK):
            position = first + at
            if position < prompt.n_keys_R[owner]:
                number = np.int64(prompt.tables_RM[owner, position // cache.block_tokens])
                slot = number * cache.block_tokens + position % cache.block_tokens
                place = (slot * n_kv + head) * size * 2
                for pair in range(size // 2):
                    copy_word(
                        cache.keys_L[layer] + place + 4 * pair, key + 2 * at * size + 4 * pair
                    )
                for d in range(size):
                    copy_short(
                        cache.values_L[layer] + place + 2 * d, value + 2 * (d * _KEY_BLOCK + at)
                    )
            else:
                buffers.keys_BKSD[block, head, at] = 0
                buffers.values_BKDS[block, head, :, at] = 0
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def _attend(thread: Int, stage: Int, shape: Shape, prompt: Prompt, buffers: PromptBuffers) -> None:
    """Attend; a piece is a vector of tokens in the heads that share keys."""
    n_kv, size = shape.n_kv_heads, shape.head_dim
    group, n_vectors = shape.n_heads // n_kv, len(prompt.owners_V)
    progress, n_pieces = buffers.progress_T.ctypes.data, n_vectors * n_kv
    scores, mixed = buffers.scores_PGS16[thread], buffers.mixed_PGD16[thread]
    weights, state = buffers.weights_PGS16[thread], buffers.state_PG316[thread]
    visible_16 = buffers.visible_P16[thread]
    half_head = size // 2 * _VECTOR_BYTES
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        vector, head = n_vectors - 1 - piece // n_kv, piece % n_kv  # the longest first
        owner = prompt.owners_V[vector]
        n_keys = prompt.positions_V16[vector, _LANES - 1] + 1
        queries = buffers.query_VQ16[vector].ctypes.data + head * group * half_head
        mixed[:] = 0
        state[:, 0] = _LOWEST
        state[:, 1] = 0
        for first in range(0, n_keys, _KEY_BLOCK):
            block = prompt.first_blocks_R[owner] + first // _KEY_BLOCK
            multiply_pairs(
                buffers.keys_BKSD[block, head].ctypes.data, 2 * size, _KEY_BLOCK, queries,
                half_head, group, size // 2, scores.ctypes.data, scores.strides[0], 0,
            )  # fmt: skip
            for lane in range(_LANES):
                visible_16[lane] = prompt.positions_V16[vector, lane] + 1 - first
            for g in range(group):
                soften(
                    scores[g].ctypes.data, _KEY_BLOCK, visible_16.ctypes.data,
                    state[g].ctypes.data, weights[g].ctypes.data,
                )  # fmt: skip
                scale_vectors(mixed[g].ctypes.data, size, state[g, 2].ctypes.data)
            multiply_pairs(
                buffers.values_BKDS[block, head].ctypes.data, 2 * _KEY_BLOCK, size,
                weights.ctypes.data, weights.strides[0], group, _KEY_BLOCK // 2,
                mixed.ctypes.data, mixed.strides[0], 1,
            )  # fmt: skip
        out = buffers.normed_VC16[vector].ctypes.data + head * group * half_head
        for g in range(group):
            invert(state[g, 1].ctypes.data)
            pack_pairs(
                mixed[g].ctypes.data, size // 2, state[g, 1].ctypes.data, out + g * half_head
            )
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def _add(
    stage: Int, layer: Int, which: Int, weights: Weights, shape: Shape, prompt: Prompt,
    buffers: PromptBuffers,
) -> None:  # fmt: skip
    """Add the output of attention (wo) or of the feed-forward (w2) to the residual stream."""
    inputs = buffers.normed_VC16 if which == WO else buffers.gate_VF16
    size = shape.dim if which == WO else shape.ffn_dim
    progress, n_pieces = buffers.progress_T.ctypes.data, (shape.dim + _ROWS - 1) // _ROWS
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        row = piece * _ROWS
        multiply_pairs(
            weights.addresses_L7[layer, which] + row * 2 * size, 2 * size,
            min(_ROWS, shape.dim - row), inputs.ctypes.data, inputs.strides[0],
            len(prompt.owners_V), size // 2, buffers.x_VC16.ctypes.data + row * _VECTOR_BYTES,
            buffers.x_VC16.strides[0], 1,
        )  # fmt: skip
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)


@kernel
def _gate(
    thread: Int, stage: Int, layer: Int, weights: Weights, shape: Shape, prompt: Prompt,
    buffers: PromptBuffers,
) -> None:  # fmt: skip
    """Compute silu(w1 x) * w3 x; a piece is some rows of both."""
    dim, n_vectors = shape.dim, len(prompt.owners_V)
    progress = buffers.progress_T.ctypes.data
    n_pieces = (shape.ffn_dim + _GATE_ROWS - 1) // _GATE_ROWS
    inputs, both = buffers.normed_VC16, buffers.both_P2VF16[thread]
    piece = take(progress, stage, n_pieces)
    while piece < n_pieces:
        row = piece * _GATE_ROWS
        n_rows = min(_GATE_ROWS, shape.ffn_dim - row)
        for first in range(0, n_vectors, _GROUP):
            n = min(_GROUP, n_vectors - first)
            for which in (W1, W3):
                out = both[0 if which == W1 else 1]
                multiply_pairs(
                    weights.addresses_L7[layer, which] + row * 2 * dim, 2 * dim, n_rows,
                    inputs[first].ctypes.data, inputs.strides[0], n, dim // 2,
                    out.ctypes.data, out.strides[0], 0,
                )  # fmt: skip
            for v in range(n):
                gate_pairs(
                    both[0, v].ctypes.data, both[1, v].ctypes.data, n_rows // 2,
                    buffers.gate_VF16[first + v].ctypes.data + row // 2 * _VECTOR_BYTES,
                )  # fmt: skip
        finish(progress, stage)
        piece = take(progress, stage, n_pieces)
    wait(progress, stage, n_pieces)
