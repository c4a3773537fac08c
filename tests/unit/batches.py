"""Batches for tests."""

from __future__ import annotations

import numpy as np

from puna.tokens.loader import Batch


def packed_batch(vocab_size: int, n_rows: int, seq_len: int, seed: int = 0) -> Batch:
    """Make rows of random tokens, each of two documents."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (n_rows, seq_len + 1))
    half = seq_len // 2
    doc_ids = np.zeros((n_rows, seq_len), np.int32)
    doc_ids[:, half:] = 1
    positions = np.concatenate([np.arange(half), np.arange(seq_len - half)]).astype(np.int32)
    return Batch(
        tokens[:, :-1].copy(), tokens[:, 1:].copy(), doc_ids, np.tile(positions, (n_rows, 1))
    )
