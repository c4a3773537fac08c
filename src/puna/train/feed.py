"""Batches ahead of time: a thread makes those of the next steps while this one computes.

A thread and no process: making a batch is a few milliseconds beside a step of hundreds, most of
them in numpy; nothing has to be copied between processes, and nothing is left when this one is
killed. Shards in a store are downloaded by the same thread, so downloads are ahead as well.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist

from puna.core.ledger import Ledger
from puna.tokens.loader import BatchSource, LeftOut, PackedLoader
from puna.train.batch import TensorBatch

if TYPE_CHECKING:
    from puna.train.parallel.world import World

_LOOK_UP_S = 0.1
"""How often a thread that waits for room looks whether it is still wanted."""


@dataclass(frozen=True)
class _Made:
    """What the thread has to give for a step: a batch, or the error that making it ended in."""

    step: int
    batch: TensorBatch | None
    error: BaseException | None = None


class BatchFeed:
    """The batches of one rank, in the order of the steps.

    Args:
        source: Makes them.
        world: The ranks; says which rows are this rank's and where they go.
        first_step: First step that will be asked for.
        n_steps: Steps of the run.
        depth: Batches that are ready at most; 0 makes each when it is asked for.
        events: Ledger; receives ``data.left_out`` for documents whose tokens are damaged.
    """

    def __init__(
        self, source: BatchSource, world: World, first_step: int, n_steps: int, depth: int,
        events: Ledger,
    ) -> None:  # fmt: skip
        self._source, self._world, self._events = source, world, events
        self._n_steps, self._depth = n_steps, depth
        self._skips = isinstance(source, PackedLoader) and source.on_damage == "skip"
        self._known: set[tuple[str, int]] = set()
        self._thread: threading.Thread | None = None
        self.waited_s = 0.0
        self._start(first_step)

    def __enter__(self) -> BatchFeed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(patience_s=None if error is None else _LOOK_UP_S)

    def get(self, step: int) -> TensorBatch:
        """Return the batch of the next step, on the device; ``waited_s`` tells what it took.

        On a GPU the copy goes on while this returns.

        Raises:
            PunaError: What making this batch raised, at the step that needs it.
        """
        begin_s = time.perf_counter()
        batch = self._take(step)
        while self._skips and self._learn(step):
            self.close()
            self._start(step)
            batch = self._take(step)
        if batch.tokens_BT.device != self._world.device:
            batch = batch.to(self._world.device)
        self.waited_s = time.perf_counter() - begin_s
        return batch

    def close(self, patience_s: float | None = None) -> None:
        """End the thread.

        Args:
            patience_s: How long to wait for it; None until it has ended. A download that goes on
                must not keep an error from being told, and dies with the process.
        """
        if self._thread is not None:
            self._stop.set()
            self._thread.join(patience_s)
            self._thread = None

    def _start(self, first_step: int) -> None:
        self._stop = threading.Event()
        self._ready: queue.Queue[_Made] = queue.Queue(max(self._depth, 1))
        if self._depth:
            self._thread = threading.Thread(
                target=self._work, args=(first_step, self._stop, self._ready), daemon=True,
                name="puna-batches",
            )  # fmt: skip
            self._thread.start()

    def _take(self, step: int) -> TensorBatch:
        made = self._ready.get() if self._depth else self._make(step)
        if made.error is not None:
            raise made.error
        if made.step != step or made.batch is None:
            raise ValueError(f"the batch of step {made.step} is next, not that of step {step}")
        return made.batch

    def _work(self, step: int, stop: threading.Event, ready: queue.Queue[_Made]) -> None:
        while step < self._n_steps and not stop.is_set():
            made = self._make(step)
            while not stop.is_set():
                try:
                    ready.put(made, timeout=_LOOK_UP_S)
                    break
                except queue.Full:
                    continue
            if made.error is not None:
                return
            step += 1

    def _make(self, step: int) -> _Made:
        world = self._world
        try:
            batch = self._source.batch(step, world.data_rank, world.layout.data)
            return _Made(step, TensorBatch.on_host(batch, pin=world.device.type == "cuda"))
        except BaseException as error:  # noqa: BLE001 (raised where the batch is needed)
            return _Made(step, None, error)

    def _learn(self, step: int) -> bool:
        """Leave out what any rank has found damaged; tell whether that was news here.

        Ranks may read copies of their own, of which one alone is damaged; a row that several of
        them compute must be one row.
        """
        if not isinstance(self._source, PackedLoader):
            raise TypeError("only packed documents can be left out")
        found_here = self._source.left_out
        own = [one for one in found_here if (one.source, one.document) not in self._known]
        if not self._world.sum([float(len(own))])[0]:
            return False
        found: dict[tuple[str, int], LeftOut] = {}
        for one in _gather(own, self._world):
            found.setdefault((one.source, one.document), one)
        news = {key: one for key, one in found.items() if key not in self._known}
        self._known |= set(news)
        self._source.leave_out(news.values())
        if self._world.rank == 0:
            for one in news.values():
                self._events.emit(
                    "data.left_out", durable=True, step=step, source=one.source,
                    document_id=one.document_id, document=one.document, why=one.why,
                )  # fmt: skip
        return self._world.size > 1


def _gather(own: list[LeftOut], world: World) -> list[LeftOut]:
    """Return what all ranks have found, in the order of the ranks."""
    if world.mesh is None:
        return own
    parts: list[list[LeftOut]] = [[] for _ in range(world.size)]
    dist.all_gather_object(parts, own)
    return [one for part in parts for one in part]
