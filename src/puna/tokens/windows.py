"""What a likelihood is summed over: windows of documents, packed to rows.

Shapes: B rows, T ``seq_len``.

The rule for documents longer than ``seq_len``: the first window predicts targets 1..T; each further
window starts so that its first ``overlap`` targets are known already and serve as context only, the
rest are scored. Every token after the first (the begin-of-text token) is scored exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from puna.tokens.loader import NO_LABEL, Batch
from puna.tokens.rows import Piece, fill_rows, pack_rows

_OPEN_ROWS = 64


def document_windows(
    tokens: Int64[np.ndarray, " n"], seq_len: int, overlap: int
) -> Iterator[Piece]:
    """Cut a document into windows by the rule of the module.

    Args:
        tokens: The document's tokens, the begin-of-text token first.
        seq_len: Longest window, T.
        overlap: Targets that a further window repeats as context, 0..T-1.
    """
    if not 0 <= overlap < seq_len:
        raise ValueError(f"overlap {overlap} is not in 0..{seq_len - 1}")
    inputs = np.asarray(tokens[:-1], dtype=np.int64)
    targets = np.asarray(tokens[1:], dtype=np.int64)
    scored_up_to = 0
    while scored_up_to < len(targets):
        start = max(scored_up_to - overlap, 0)
        end = min(start + seq_len, len(targets))
        labels = targets[start:end].copy()
        labels[: scored_up_to - start] = NO_LABEL
        yield Piece(inputs[start:end], labels)
        scored_up_to = end


def pack_pieces(
    pieces: Sequence[Piece], seq_len: int, rows_per_batch: int, pad_id: int
) -> Iterator[Batch]:
    """Pack pieces into rows that keep them apart (document mask), longest first.

    Args:
        pieces: Each at most ``seq_len`` long.
        seq_len: Positions of a row, T.
        rows_per_batch: Rows of a batch, B; the last batch may have fewer.
        pad_id: Token at positions that hold nothing.
    """
    by_length = sorted(pieces, key=lambda piece: -len(piece.inputs))
    members, offsets = pack_rows([len(piece.inputs) for piece in by_length], seq_len, _OPEN_ROWS)
    n_rows = len(offsets) - 1
    for first in range(0, n_rows, rows_per_batch):
        rows = range(first, min(first + rows_per_batch, n_rows))
        yield fill_rows(
            [[by_length[i] for i in members[offsets[row] : offsets[row + 1]]] for row in rows],
            seq_len,
            pad_id,
        )
