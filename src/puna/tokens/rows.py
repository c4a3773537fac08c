"""Packing whole pieces (conversations, windows of documents) into rows of fixed length.

Shapes: B rows, T ``seq_len``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from puna.tokens.loader import NO_LABEL, Batch

OPEN_ROWS = 16


@dataclass(frozen=True)
class Piece:
    """A segment of a row: inputs and, at the same positions, the labels (the next tokens)."""

    inputs: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]


def pack_rows(
    lengths: Sequence[int] | Int64[np.ndarray, " n"], capacity: int, open_rows: int = OPEN_ROWS
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n_rows+1"]]:
    """Put pieces into rows by first fit over a window of open rows.

    Each piece goes into the oldest open row that has room; when none has, the fullest open row is
    closed once ``open_rows`` are open. The result depends on the order of the pieces only.

    Args:
        lengths: Length of each piece, 1..capacity.
        capacity: Length of a row.
        open_rows: Rows that stay open for later pieces.

    Returns:
        Indices of the pieces, row after row, and the offsets of the rows in that list.

    Raises:
        ValueError: A piece is empty or longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    open_now: list[int] = []
    for index, length in enumerate(map(int, lengths)):
        if not 0 < length <= capacity:
            raise ValueError(f"piece {index} has length {length}, a row holds 1..{capacity}")
        row = next((row for row in open_now if room[row] >= length), None)
        if row is None:
            if len(open_now) >= open_rows:
                open_now.remove(min(open_now, key=room.__getitem__))
            row = len(rows)
            rows.append([])
            room.append(capacity)
            open_now.append(row)
        rows[row].append(index)
        room[row] -= length
        if room[row] == 0:
            open_now.remove(row)
    members = np.array([index for row in rows for index in row], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return members, offsets


def fill_rows(rows: Sequence[Iterable[Piece]], seq_len: int, pad_id: int) -> Batch:
    """Lay pieces into rows as segments that do not see each other.

    Args:
        rows: The pieces of each row, in order; together at most ``seq_len`` long.
        seq_len: Positions of a row, T.
        pad_id: Token at positions that hold nothing.
    """
    shape = (len(rows), seq_len)
    tokens_BT = np.full(shape, pad_id, dtype=np.int64)
    labels_BT = np.full(shape, NO_LABEL, dtype=np.int64)
    doc_ids_BT = np.full(shape, -1, dtype=np.int32)
    positions_BT = np.zeros(shape, dtype=np.int32)
    for row, pieces in enumerate(rows):
        at = 0
        for segment, piece in enumerate(pieces):
            here = slice(at, at + len(piece.inputs))
            tokens_BT[row, here] = piece.inputs
            labels_BT[row, here] = piece.labels
            doc_ids_BT[row, here] = segment
            positions_BT[row, here] = np.arange(len(piece.inputs))
            at = here.stop
    return Batch(tokens_BT, labels_BT, doc_ids_BT, positions_BT)
