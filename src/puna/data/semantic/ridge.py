"""Fitting a static table of token vectors to the embeddings that its teacher gives real texts.

A static embedding is linear in the table: the row of a text in A holds the shares of its tokens,
and A E is to be near to the teacher's T. Ridge regression towards the table E0 of the tokens alone,

    E = E0 + A' (A A' + r I)^-1 (T - A E0),

needs a system of the size of the sample only, changes no token that the sample lacks, and its
leave-one-out residuals are known without refitting (Allen 1974, PRESS): they choose r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puna.data.semantic.passages import unit_rows

RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""What is tried, in units of the mean squared length of a row of A (ours)."""
_COLUMNS = 2048
"""Tokens of a dense block."""


@dataclass(frozen=True)
class Shares:
    """The matrix A: how much each token counts in each text, rows adding up to 1.

    Attributes:
        rows: Text of each entry, int64 [n_entries].
        tokens: Its token, int64 [n_entries], ascending.
        values: Its share, float32 [n_entries].
        n_texts: Rows.
    """

    rows: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    n_texts: int

    def blocks(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the tokens that occur, in blocks, each with its dense columns [n_texts, k]."""
        used, position = np.unique(self.tokens, return_inverse=True)
        found = []
        for start in range(0, len(used), _COLUMNS):
            names = used[start : start + _COLUMNS]
            first, last = np.searchsorted(position, [start, start + len(names)])
            dense = np.zeros((self.n_texts, len(names)), np.float32)
            inside = slice(first, last)
            dense[self.rows[inside], position[inside] - start] = self.values[inside]
            found.append((names, dense))
        return found


def shares_of(passages: list[list[int]], weights: np.ndarray) -> Shares:
    """Return the shares of tokens of passages.

    Args:
        passages: Token ids of each text, none empty.
        weights: Of each token, float [n_tokens], positive.
    """
    rows = np.repeat(np.arange(len(passages)), [len(ids) for ids in passages])
    tokens = np.concatenate([np.asarray(ids, np.int64) for ids in passages])
    sums = np.zeros(len(passages))
    np.add.at(sums, rows, weights[tokens])
    keys, which = np.unique(tokens * len(passages) + rows, return_inverse=True)
    values = np.zeros(len(keys))
    np.add.at(values, which, weights[tokens] / sums[rows])
    return Shares(
        keys % len(passages), keys // len(passages), values.astype(np.float32), len(passages)
    )


@dataclass(frozen=True)
class Fit:
    """A fitted table.

    Attributes:
        table: float32 [n_tokens, dim], not yet times the weights.
        ridge: What was chosen.
        agreement_before: Mean cosine with the teacher before the fit.
        agreement_after: The same after it, each text predicted by the fit to all others.
    """

    table: np.ndarray
    ridge: float
    agreement_before: float
    agreement_after: float


def fit_table(table: np.ndarray, shares: Shares, target: np.ndarray) -> Fit:
    """Fit a table to the teacher's embeddings.

    Memory: 12 bytes per pair of texts.

    Args:
        table: Vectors of the tokens alone, float32 [n_tokens, dim].
        shares: What the texts are made of.
        target: The teacher's embeddings of the texts, float32 [n_texts, dim].
    """
    blocks = shares.blocks()
    gram = np.zeros((shares.n_texts, shares.n_texts), np.float32)
    before = np.zeros_like(target)
    for names, dense in blocks:
        gram += dense @ dense.T
        before += dense @ table[names]
    scale = float((before * target).sum() / max((before * before).sum(), 1e-12))
    table, before = table * np.float32(scale), before * np.float32(scale)
    residual = target - before
    values, vectors = np.linalg.eigh(gram)
    rotated = vectors.T @ residual
    unit = float(np.trace(gram)) / shares.n_texts
    tried = []
    for ridge in RIDGES:
        inverse = 1 / (np.maximum(values, 0) + ridge * unit)
        dual = vectors @ (rotated * inverse[:, None])
        left_out = dual / ((vectors * vectors) @ inverse)[:, None]
        tried.append((float((left_out * left_out).sum()), ridge, dual, left_out))
    _, ridge, dual, left_out = min(tried, key=lambda one: one[:2])
    fitted = table.copy()
    for names, dense in blocks:
        fitted[names] += dense.T @ dual
    return Fit(fitted, ridge, _agreement(before, target), _agreement(target - left_out, target))


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((unit_rows(a) * unit_rows(b)).sum(1).mean())
