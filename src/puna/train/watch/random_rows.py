"""Random tokens as documents of random lengths, to measure speed without data; imports no torch.

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from puna.tokens.loader import NO_LABEL, Batch, rank_rows


class RandomRows:
    """Rows of packed documents whose tokens mean nothing.

    Args:
        vocab_size: Ids are below it.
        seq_len: Tokens per row.
        global_batch: Rows of a step.
        document_tokens: Mean length of a document (exponential, as far as a row allows).
    """

    def __init__(
        self, vocab_size: int, seq_len: int, global_batch: int, document_tokens: int
    ) -> None:
        self.n_rows, self._seq_len = global_batch, seq_len
        self._vocab_size, self._document_tokens = vocab_size, document_tokens

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Return rows of this rank; each from its own number, whatever the ranks."""
        rows = [self._row(step * self.n_rows + row) for row in rank_rows(self.n_rows, rank, world)]
        tokens, labels, doc_ids, positions = (np.stack(parts) for parts in zip(*rows, strict=True))
        return Batch(tokens, labels, doc_ids, positions)

    def lineage(self, step: int) -> list[dict[str, Any]]:
        """Return nothing to trace: there are no documents."""
        return [{"row": row, "source": "random", "segments": []} for row in range(self.n_rows)]

    def _row(self, number: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([1, number])
        n = self._seq_len
        tokens = rng.integers(0, self._vocab_size, n + 1)
        lengths = 1 + rng.exponential(self._document_tokens, n).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        starts = starts[starts < n]
        doc_ids = np.searchsorted(starts, np.arange(n), side="right") - 1
        labels = tokens[1:].copy()
        labels[starts[1:] - 1] = NO_LABEL
        positions = np.arange(n) - starts[doc_ids]
        return tokens[:-1], labels, doc_ids.astype(np.int32), positions.astype(np.int32)


def random_rows(
    vocab_size: int, seq_len: int, global_batch: int, document_tokens: int
) -> RandomRows:
    """Make them in a rank (the factory of training processes)."""
    return RandomRows(vocab_size, seq_len, global_batch, document_tokens)
