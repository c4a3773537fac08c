"""What a step is given: weights, sizes, cache, tokens and memory, as tuples that numba can read.

Shapes: N tokens, C dim, F ffn_dim, Q dim + 2 * kv_dim, L layers, H head_dim / 2, M blocks of a
request, R rows of logits, V vocab_size, P threads, G query heads per key/value head, S keys, K
key/value heads, Z spans of attention, E head_dim + 2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WQ, WK, WV, WO, W1, W2, W3 = range(7)
"""Columns of the tables of weights."""
STAGES_PER_LAYER = 5
"""Queries, keys and values; attention; its output; gate; the feed-forward's output."""
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
    qkv_NQ: np.ndarray
    mixed_NC: np.ndarray
    gate_NF: np.ndarray
    up_NF: np.ndarray
    scores_PGS: np.ndarray
    parts_NKZGE: np.ndarray
    lanes_P16: np.ndarray
