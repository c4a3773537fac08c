"""What a step is given: weights, sizes, cache, tokens and memory, as tuples that numba can read.

Shapes: N tokens, C dim, F ffn_dim, Q dim + 2 * kv_dim, L layers, H head_dim / 2, M blocks of a
request, R rows of logits, V vocab_size, P threads, G query heads per key/value head, S keys, K
key/value heads, Z spans of attention, E head_dim + 2, B words of rounded values and their scales.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WQ, WK, WV, WO, W1, W2, W3 = range(7)
"""Columns of the tables of weights."""
STAGES_PER_LAYER = 5
"""Queries, keys and values; attention; its output; gate; the feed-forward's output."""
STAGES_PER_PROMPT_LAYER = 9
"""See :mod:`puna.lm.cpu.prompt`."""
KEY_BLOCK = 64
"""Keys that a prompt's attention looks at together; even."""
GATE_ROWS, GATE_VECTORS = 24, 4
"""Rows and vectors of tokens whose gates a thread computes together; whole tiles."""
NEXT, DONE, PROGRESS_COLUMNS = 0, 8, 16
"""Columns of the table of progress: in cache lines of their own."""


class Weights(NamedTuple):
    """Where the parameters lie; the objects that own the memory are kept by the decoder.

    Attributes:
        kind: Of all matrices.
        addresses_L7: Address of row 0 of each matrix, int64.
        scales_L7: Address of the scales of its rows, int8 only.
        norm_kind: Of the norms.
        norms_L2: Addresses: before attention and before the feed-forward.
        norm: Address of the last one.
        embedding: Address, kind as the others.
        embedding_scales: Address.
        head: Address.
        head_scales: Address.
        eps: Of the norms.
    """

    kind: int
    addresses_L7: np.ndarray
    scales_L7: np.ndarray
    norm_kind: int
    norms_L2: np.ndarray
    norm: int
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
        logits_RV: The result, float32.
    """

    tokens_N: np.ndarray
    positions_N: np.ndarray
    tables_NM: np.ndarray
    cos_NH: np.ndarray
    sin_NH: np.ndarray
    rows_R: np.ndarray
    logits_RV: np.ndarray


class Buffers(NamedTuple):
    """Memory of the activations, at least as large as the call needs; float32 where not said.

    Attributes:
        progress_T: Of each stage, int64, zero before the call: pieces taken, pieces done.
        joined_NK: Spans that are done, of each token and head in all layers; int64, zero before.
        x_NC: The residual stream.
        normed_PNC: A copy of its norm for each thread.
        narrow_PNB: For each thread, what it multiplies by int8 weights, int16; see
            :func:`puna.lm.cpu.elementwise.narrow`. Without such weights it has no columns.
        qkv_NQ: Queries, keys and values.
        mixed_NC: What attention gives.
        gate_NF: Inside the feed-forward.
        up_NF: Inside the feed-forward.
        scores_PGS: Scratch of attention for each thread.
        parts_NKZGE: Attention's spans.
        lanes_P16: Scratch of each thread.
    """

    progress_T: np.ndarray
    joined_NK: np.ndarray
    x_NC: np.ndarray
    normed_PNC: np.ndarray
    narrow_PNB: np.ndarray
    qkv_NQ: np.ndarray
    mixed_NC: np.ndarray
    gate_NF: np.ndarray
    up_NF: np.ndarray
    scores_PGS: np.ndarray
    parts_NKZGE: np.ndarray
    lanes_P16: np.ndarray


class Prompt(NamedTuple):
    """The tokens of one call, in V vectors of 16; the last token fills up a vector.

    Attributes:
        tokens_V16: Ids, int64.
        positions_V16: Position of each in its request, int64, rising.
        counts_V: Tokens of a vector that are not filled up, int64.
        owners_V: Request of each vector, int64.
        cos_VH16: Rotation of each token, float32.
        sin_VH16: The same.
        tables_RM: Blocks of each request, int32.
        n_keys_R: Keys of each request, those of this call included, int64.
        first_blocks_R: First of its blocks of :data:`KEY_BLOCK` keys, int64.
        block_owners_B: Request of each of these blocks, int64.
    """

    tokens_V16: np.ndarray
    positions_V16: np.ndarray
    counts_V: np.ndarray
    owners_V: np.ndarray
    cos_VH16: np.ndarray
    sin_VH16: np.ndarray
    tables_RM: np.ndarray
    n_keys_R: np.ndarray
    first_blocks_R: np.ndarray
    block_owners_B: np.ndarray


class PromptBuffers(NamedTuple):
    """Memory of a prompt's activations; float32, or pairs of bfloat16 as int32 where it says so.

    Attributes:
        progress_T: Of each stage, int64, zero before the call: pieces taken, pieces done.
        eps_1: Of the norms.
        factors_216: Ones; 1 / sqrt(head_dim).
        x_VC16: The residual stream.
        normed_VC16: Its norm, or what attention gives; pairs.
        qkv_VQ16: Queries, keys and values.
        query_VQ16: The same, rotated; pairs.
        gate_VF16: Inside the feed-forward; pairs.
        both_P2VF16: Scratch of each thread: gate and up of a few rows.
        keys_BKSD: The keys of all requests in blocks, bfloat16 as int16.
        values_BKDS: The values, turned around, bfloat16 as int16.
        scores_PGS16: Scratch of each thread: scores of a block.
        weights_PGS16: Their exponentials; pairs.
        mixed_PGD16: Weighted values.
        state_PG316: What a softmax that goes on has to know.
        visible_P16: Keys of a block that each token sees, int32.
    """

    progress_T: np.ndarray
    eps_1: np.ndarray
    factors_216: np.ndarray
    x_VC16: np.ndarray
    normed_VC16: np.ndarray
    qkv_VQ16: np.ndarray
    query_VQ16: np.ndarray
    gate_VF16: np.ndarray
    both_P2VF16: np.ndarray
    keys_BKSD: np.ndarray
    values_BKDS: np.ndarray
    scores_PGS16: np.ndarray
    weights_PGS16: np.ndarray
    mixed_PGD16: np.ndarray
    state_PG316: np.ndarray
    visible_P16: np.ndarray
