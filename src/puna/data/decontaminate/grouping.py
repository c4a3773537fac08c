"""From matching n-grams to pairs of document and example, and to the pieces of the documents."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from puna.data.decontaminate.kernels import Index
from puna.data.kernels.buffers import Array, kernel


class Pairs(NamedTuple):
    """Documents and the examples that they have something in common with, ordered by document.

    Attributes:
        document: int64 [n]; number in the batch.
        example: int64 [n]; number in the index.
        coverage: float64 [n]; share of the example's words that were found.
        start: int64 [n]; byte of the document where the longest piece in common begins.
        end: int64 [n]; byte where it ends.
        of_row: int64 [n_hits]; pair of each hit.
    """

    document: np.ndarray
    example: np.ndarray
    coverage: np.ndarray
    start: np.ndarray
    end: np.ndarray
    of_row: np.ndarray


@kernel
def _group(
    rows: Array, order: Array, postings: Array, example_words: Array
) -> tuple[Array, Array, Array, Array]:
    most = 0
    for e in range(len(example_words) - 1):
        most = max(most, example_words[e + 1] - example_words[e])
    covered = np.zeros(most, np.int64)  # pair + 1 that covered the word last
    pairs, coverage = np.empty((len(rows), 2), np.int64), np.empty(len(rows), np.float64)
    pieces, of_row = np.empty((len(rows), 2), np.int64), np.empty(len(rows), np.int64)
    n, n_covered, start, end = 0, 0, 0, 0
    for k in range(len(order)):
        row = rows[order[k]]
        example, first, n_words = postings[row[1]]
        if n == 0 or pairs[n - 1, 0] != row[0] or pairs[n - 1, 1] != example:
            pairs[n, 0], pairs[n, 1] = row[0], example
            pieces[n, 0], pieces[n, 1] = row[2], row[3]
            n, n_covered, start, end = n + 1, 0, row[2], row[3]
        if row[2] > end:
            start = row[2]
        end = max(end, row[3])
        if end - start > pieces[n - 1, 1] - pieces[n - 1, 0]:
            pieces[n - 1, 0], pieces[n - 1, 1] = start, end
        begin = example_words[example]
        for w in range(first - begin, first - begin + n_words):
            n_covered += covered[w] != n
            covered[w] = n
        coverage[n - 1] = n_covered / (example_words[example + 1] - begin)
        of_row[order[k]] = n - 1
    return pairs[:n], coverage[:n], pieces[:n], of_row


def group_hits(rows: np.ndarray, index: Index) -> Pairs:
    """Group hits by document and example.

    Args:
        rows: From :func:`puna.data.decontaminate.kernels.find_examples`.
        index: The index that they were found with.
    """
    examples = index.postings[rows[:, 1], 0]
    order = np.lexsort((rows[:, 3], rows[:, 2], examples, rows[:, 0]))
    pairs, coverage, pieces, of_row = _group(rows, order, index.postings, index.example_words)
    return Pairs(pairs[:, 0], pairs[:, 1], coverage, pieces[:, 0], pieces[:, 1], of_row)


@kernel
def _merge(rows: Array, order: Array) -> Array:
    spans = np.empty((len(rows), 3), np.int64)
    n = 0
    for k in range(len(order)):
        row = rows[order[k]]
        if n and spans[n - 1, 0] == row[0] and row[2] <= spans[n - 1, 2]:
            spans[n - 1, 2] = max(spans[n - 1, 2], row[3])
            continue
        spans[n, 0], spans[n, 1], spans[n, 2] = row[0], row[2], row[3]
        n += 1
    return spans[:n]


def merge_spans(rows: np.ndarray) -> np.ndarray:
    """Join hits that touch or overlap: int64 [n, 3] of document, begin and end, in order.

    Args:
        rows: From :func:`puna.data.decontaminate.kernels.find_examples`.
    """
    return _merge(rows, np.lexsort((rows[:, 2], rows[:, 0])))
