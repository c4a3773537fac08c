"""Bits per byte of held-out text in the middle of a training, on the sharded model itself.

Every data-parallel rank measures its share of the rows, all the same number of micro-batches, so
that none waits for another longer than in a step. Weights, optimiser and random numbers are not
touched: a training with it ends with the same bits as one without.

The matrix products have the precision of the training. ``eval.bpb`` takes the weights as they are
stored, float32; in bf16 its numbers differ in the third or fourth digit.

Shapes: B rows of a micro-batch, T tokens per row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from puna.core.ledger import Ledger
from puna.tokens.heldout import TextSet
from puna.tokens.loader import NO_LABEL, Batch
from puna.tokens.windows import pack_pieces
from puna.train.batch import TensorBatch
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.world import World
from puna.train.spec import HeldOutSpec

TOTAL = "all documents"


class HeldOutEvaluation:
    """Measures bits per byte when it is due.

    Args:
        spec: Documents, and how often; None for never.
        model: The model in training.
        seq_len: Tokens per row.
        world: The ranks.
        events: Ledger; receives ``train.eval`` (rank 0).
        attempt: Number of the attempt.
        beat: Called before each micro-batch: this rank is alive.
        on_event: Called with the step and the numbers of an event, on rank 0.
    """

    def __init__(
        self,
        spec: HeldOutSpec | None,
        model: ParallelModel,
        seq_len: int,
        world: World,
        events: Ledger,
        *,
        attempt: int,
        beat: Callable[[], None] = lambda: None,
        on_event: Callable[[int, dict[str, Any]], None] = lambda step, values: None,
    ) -> None:
        self._every = 0 if spec is None else spec.every
        self._model, self._world, self._events = model, world, events
        self._attempt, self._beat, self._on_event = attempt, beat, on_event
        self._sets: list[TextSet] = [] if spec is None else spec.source.open()
        self._batches = (
            share_of_rows(self._sets, seq_len, model.micro_rows(seq_len), world)
            if self._sets else []
        )  # fmt: skip

    def is_due(self, done: int, *, final: bool) -> bool:
        """Tell whether to measure after so many steps."""
        return bool(self._sets) and (final or done % self._every == 0)

    def run(self, done: int) -> None:
        """Measure, and write the event; all ranks call it."""
        begin_s = time.perf_counter()
        nats = self._model.evaluate(self._batches, len(self._sets), self._beat)
        seconds = time.perf_counter() - begin_s
        if self._world.rank != 0:
            return
        sources = {
            one.name: {
                "bits_per_byte": value / math.log(2) / one.n_bytes,
                "nats_per_token": value / one.n_tokens,
                "n_tokens": one.n_tokens, "n_bytes": one.n_bytes, "n_docs": one.n_docs,
            }
            for one, value in zip(self._sets, nats, strict=True)
        }  # fmt: skip
        n_bytes = sum(one.n_bytes for one in self._sets)
        total = sum(nats) / math.log(2) / n_bytes
        self._events.emit(
            "train.eval", attempt=self._attempt, step=done - 1, seconds=seconds,
            bits_per_byte=total, sources=sources,
        )  # fmt: skip
        shown = {name: found["bits_per_byte"] for name, found in sources.items()}
        self._on_event(done - 1, {"bits_per_byte": {TOTAL: total, **shown}, "seconds": seconds})


def share_of_rows(
    sets: Sequence[TextSet], seq_len: int, micro_batch: int, world: World
) -> list[TensorBatch]:
    """Pack the sets into rows and return this rank's, in micro-batches.

    Rows without a label fill up: every rank has the same number of micro-batches of one shape.

    Args:
        sets: Each row is of one of them; its number is the row's source.
        seq_len: Tokens per row.
        micro_batch: Rows of a micro-batch.
        world: The ranks.
    """
    rows: list[Batch] = []
    for number, one in enumerate(sets):
        for row in pack_pieces(one.pieces, seq_len, 1, 0):
            parts = (row.tokens_BT, row.labels_BT, row.doc_ids_BT, row.positions_BT)
            rows.append(Batch(*parts, source_B=np.array([number], np.int64)))
    empty = Batch(
        np.zeros((1, seq_len), np.int64), np.full((1, seq_len), NO_LABEL, np.int64),
        np.full((1, seq_len), -1, np.int32), np.zeros((1, seq_len), np.int32),
        source_B=np.zeros(1, np.int64),
    )  # fmt: skip
    n_data = world.layout.data
    mine = rows[world.data_rank :: n_data]
    n_micro = math.ceil(len(rows) / (n_data * micro_batch))
    mine += [empty] * (n_micro * micro_batch - len(mine))
    return [
        TensorBatch.of(_stack(mine[first : first + micro_batch]), world.device)
        for first in range(0, len(mine), micro_batch)
    ]


def _stack(rows: Sequence[Batch]) -> Batch:
    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(row, name) for row in rows])

    return Batch(
        joined("tokens_BT"), joined("labels_BT"), joined("doc_ids_BT"), joined("positions_BT"),
        source_B=joined("source_B"),
    )  # fmt: skip
