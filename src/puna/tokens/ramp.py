"""Batches that grow over a run: how many rows each step has, as a function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from puna.tokens.loader import Batch


@dataclass(frozen=True)
class Stair:
    """Equal steps at the beginning of a run.

    Attributes:
        end: First step that is no longer of this stair.
        n_rows: Rows of each of its steps.
        n_pieces: Into how many rows of equal length each row is cut.
    """

    end: int
    n_rows: int
    n_pieces: int = 1


@dataclass(frozen=True)
class Ramp:
    """Rows of every step.

    Attributes:
        n_rows: Rows of a step after the last stair.
        stairs: In the order of time.
    """

    n_rows: int
    stairs: tuple[Stair, ...] = ()

    def to_json(self) -> list[list[int]]:
        """Return the stairs as JSON values, for :meth:`of`."""
        return [[stair.end, stair.n_rows, stair.n_pieces] for stair in self.stairs]

    @classmethod
    def of(cls, n_rows: int, stairs: Sequence[Sequence[int]]) -> Ramp:
        """Make a ramp from JSON values."""
        return cls(n_rows, tuple(Stair(*stair) for stair in stairs))

    def at(self, step: int) -> Stair:
        """Return the stair of a step; after the last one, one that does not end."""
        for stair in self.stairs:
            if step < stair.end:
                return stair
        return Stair(step + 1, self.n_rows)

    def rows_before(self, step: int) -> int:
        """Return how many rows all earlier steps have together."""
        total, begin = 0, 0
        for stair in self.stairs:
            total += (min(step, stair.end) - begin) * stair.n_rows
            if step < stair.end:
                return total
            begin = stair.end
        return total + (step - begin) * self.n_rows

    def steps_for(self, n_rows: int) -> int:
        """Return the fewest steps that have so many rows."""
        begin = 0
        for stair in self.stairs:
            steps = -(-n_rows // stair.n_rows)
            if begin + steps <= stair.end:
                return begin + steps
            n_rows -= (stair.end - begin) * stair.n_rows
            begin = stair.end
        return begin + -(-n_rows // self.n_rows)


def cut_rows(batch: Batch, n_pieces: int) -> Batch:
    """Cut each row into shorter rows of their own.

    A document that goes over a cut becomes two: the second part sees nothing of the first, and its
    positions begin at 0. Labels stay: the last token of a part still predicts the next one.
    """
    from puna.tokens.loader import Batch

    if n_pieces == 1:
        return batch

    def cut(rows_BT: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return rows_BT.reshape(len(rows_BT) * n_pieces, -1)

    doc_ids_BT, positions_BT = cut(batch.doc_ids_BT), cut(batch.positions_BT).copy()
    is_first_BT = doc_ids_BT == doc_ids_BT[:, :1]
    positions_BT -= np.where(is_first_BT, positions_BT[:, :1], 0)
    source_B = None if batch.source_B is None else np.repeat(batch.source_B, n_pieces)
    return Batch(
        cut(batch.tokens_BT), cut(batch.labels_BT), doc_ids_BT, positions_BT, batch.sources,
        source_B,
    )  # fmt: skip
