"""What cosines unlike documents have under an embedder: the ground for choosing a threshold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from puna.core.errors import PunaError
from puna.data.semantic.embedder import Embedder

SHARES = (0.1, 0.01, 0.001)
"""Shares of false positives for which a threshold is told."""
_STREAM = 0x7E57


def false_positive_thresholds(
    embedder: Embedder, texts: Iterable[str], n_texts: int, seed: int
) -> dict[str, Any]:
    """Measure the cosines of pairs that are no duplicates.

    Kinds: two documents by chance; the two halves of one document (one topic, other content), of
    documents with at least 400 characters. The corpus may hold duplicates: run this behind
    data.dedup.

    Args:
        embedder: The embedder.
        texts: Documents.
        n_texts: How many to look at, the first ones.
        seed: Of the pairs.

    Returns:
        Kind -> pairs, median, and the cosine that a share of them exceeds, for :data:`SHARES`.

    Raises:
        PunaError: There are fewer than 20 documents.
    """
    sample = [text for text, _ in zip(texts, range(n_texts), strict=False)]
    if len(sample) < 20:
        raise PunaError(f"{len(sample)} documents are too few for a threshold", "give at least 20")
    rng = np.random.Generator(np.random.PCG64([_STREAM, seed]))
    vectors = embedder.embed(sample)
    a, b = rng.integers(0, len(sample), (2, 10 * len(sample)))
    vectors_a, vectors_b = vectors[a[a != b]], vectors[b[a != b]]
    kinds = {"two documents": np.einsum("nd,nd->n", vectors_a, vectors_b)}
    long = [text for text in sample if len(text) >= 400]
    if len(long) >= 20:
        first = embedder.embed([text[: len(text) // 2] for text in long])
        second = embedder.embed([text[len(text) // 2 :] for text in long])
        kinds["halves of one document"] = np.einsum("nd,nd->n", first, second)
    return {
        kind: {
            "pairs": len(found),
            "median": float(np.median(found)),
            **{f"{share:.1%} above": float(np.quantile(found, 1 - share)) for share in SHARES},
        }
        for kind, found in kinds.items()
    }
