"""Where the state of a training is kept, nearest first: shared memory, disk, a durable store.

A snapshot in shared memory costs a copy and is taken often; it serves when processes die and their
machine lives. Checkpoints on disk are written from a snapshot by a thread while training goes on;
they serve everything else, and are uploaded to a store for the day when the disk is lost. All are
verified when they are loaded. A shard that is damaged comes
from any other tier that has the same content; where none has, the state before is loaded. The event
``train.restored`` tells the tier, and of each repaired shard where it came from.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from puna.core.ledger import Ledger
from puna.train.checkpoint.recall import recall
from puna.train.checkpoint.repair import Served, ShardSource
from puna.train.checkpoint.replica import PEERS_DIR, Replicas
from puna.train.checkpoint.snapshot import MemoryShards, SnapshotNote, Snapshots
from puna.train.checkpoint.store import CheckpointStore
from puna.train.config import CheckpointConfig
from puna.train.parallel.world import World

_BACKGROUND_NICE = 15
"""Of the thread that writes checkpoints: beside a busy training it gets 3 % of a processor."""


@dataclass(frozen=True)
class Restored:
    """What was loaded.

    Attributes:
        step: Steps done; the next step has this number.
        tier: ``memory``, ``disk`` or ``store``.
    """

    step: int
    tier: str


class CheckpointTiers:
    """Saves and restores the state of a training.

    Args:
        config: How often and how.
        store: Checkpoints on disk.
        memory: Folder for snapshots, in a memory file system; None for none.
        identity: Digest of the job.
        tensors: Live tensors, sharded or plain.
        world: Ranks; every method is called by all of them.
        events: Ledger.
        attempt: Number of the attempt.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        store: CheckpointStore,
        memory: Path | None,
        identity: str,
        tensors: Mapping[str, Tensor],
        world: World,
        events: Ledger,
        attempt: int,
    ) -> None:
        self._config, self._store, self._world = config, store, world
        self._tensors, self._events, self._attempt = tensors, events, attempt
        self._memory = memory
        self._snapshots = self._map(memory, identity) if memory and config.memory_every else None
        self._replicas = self._replicate(memory) if memory and config.replicate else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def _map(self, folder: Path, identity: str) -> Snapshots | None:
        """Map the buffers of all ranks, or of none."""
        key = f"{identity} {self._world.layout.sizes} {self._world.rank}"
        found, problem = None, ""
        try:
            found = Snapshots(folder, self._world.rank, key, self._tensors)
        except OSError as error:
            problem = str(error)
        problems = [text for text in self._world.gather(problem) if text]
        if problems and self._world.rank == 0:
            self._events.emit("train.snapshots_off", why=problems[0])
        return None if problems else found

    def _replicate(self, folder: Path) -> Replicas | None:
        """Keep the snapshots of other ranks, or of none."""
        if self._snapshots is None or self._world.mesh is None:
            return None
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self._world.size))
        try:
            return Replicas(folder, self._world, per_node, self._snapshots, self._events)
        except OSError as error:  # the same on every rank
            if self._world.rank == 0:
                self._events.emit("train.replicas_off", why=str(error))
            return None

    def restore(self) -> Restored | None:
        """Load the newest whole state; None when there is none.

        Raises:
            PunaError: A checkpoint belongs to another job.
        """
        sources: list[ShardSource] = []
        if self._memory is not None:
            sources.append(MemoryShards(self._memory))
            sources.append(MemoryShards(self._memory / PEERS_DIR, "peer"))
        sources.append(self._store.shards)
        if self._store.durable is not None:
            sources.append(self._store.durable)
        if self._snapshots is not None:
            found = recall(
                self._snapshots, self._world, sources, self._store.newest_step(), self._replicas
            )
            if found is not None:
                return self._restored(found[0], "memory", found[1])
        loaded = self._store.restore(self._tensors, sources)
        if loaded is None:
            return None
        return self._restored(loaded.manifest.step, loaded.tier, loaded.served)

    def _restored(self, step: int, tier: str, served: list[Served]) -> Restored:
        """Tell which tier served; all shards came from ``tier`` but the named ones."""
        if self._world.rank == 0:
            self._events.emit(
                "train.restored", step=step, tier=tier, shards=[one.to_json() for one in served]
            )
        return Restored(step, tier)

    def give_up_after(self, step: int) -> bool:
        """Remove every state newer than ``step``, from all tiers, if there is one to go back to.

        That is a checkpoint, or the start while none is due; a state in memory alone may be lost
        before the next attempt has it.

        Raises:
            PunaError: A checkpoint that is being written could not be saved and must be.
        """
        self.wait()
        is_first = self._world.rank == 0
        found = self._store.has_state_until(step) if is_first else False
        if not self._world.from_first(found or step < self._config.every):
            return False
        if is_first:
            self._store.give_up_after(step)
        if self._memory is not None:
            for path in self._memory.rglob("*.json"):
                note = SnapshotNote.read(path)
                if note is not None and note.step > step:
                    path.unlink(missing_ok=True)
        self._world.gather(None)  # nobody leaves before all is removed
        return True

    def is_due(self, step: int, *, final: bool) -> bool:
        """Tell whether some tier takes the state after a step."""
        return self._is_checkpoint(step, final) or self._is_snapshot(step)

    def _is_checkpoint(self, step: int, final: bool) -> bool:
        return final or step % self._config.every == 0

    def _is_snapshot(self, step: int) -> bool:
        return self._snapshots is not None and step % self._config.memory_every == 0

    def after_step(self, step: int, dtype: str, *, final: bool) -> None:
        """Keep the state after a step, in the tiers whose turn it is.

        Args:
            step: Steps done.
            dtype: Dtype of the matrix products.
            final: The last step; returns when the checkpoint is committed.

        Raises:
            PunaError: A checkpoint could not be saved and must be; one that is written meanwhile
                tells at the next call that writes.
        """
        is_checkpoint = self._is_checkpoint(step, final)
        if self._snapshots is not None and (is_checkpoint or self._is_snapshot(step)):
            self._settle()
            self._snapshots.take(step, dtype)
            if self._world.rank == 0:
                self._events.emit("train.snapshot", step=step, seconds=self._snapshots.stall_s)
        if not is_checkpoint:
            return
        self.wait()
        if self._snapshots is None or final or not self._config.in_background:
            self._save(self._tensors, step, dtype, final)
        else:
            self._thread = threading.Thread(
                target=self._save_snapshot, args=(self._snapshots, step, dtype), daemon=True
            )
            self._thread.start()

    def wait(self) -> None:
        """Wait until what is being written is committed.

        Raises:
            PunaError: A checkpoint could not be saved and must be.
        """
        self._settle()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _settle(self) -> None:
        """Wait for the last snapshot; one that could not be committed is told, and no more."""
        if self._snapshots is not None:
            try:
                self._snapshots.settle()
            except OSError as error:
                self._events.emit("train.snapshot_failed", rank=self._world.rank, why=str(error))

    def _save_snapshot(self, snapshots: Snapshots, step: int, dtype: str) -> None:
        _step_back()
        try:
            with snapshots.pinned(step) as tensors:
                self._save(tensors, step, dtype, False)
        except BaseException as error:  # noqa: BLE001 (raised by whoever waits)
            self._error = error

    def _save(self, tensors: Mapping[str, Tensor], step: int, dtype: str, final: bool) -> None:
        self._store.save(step, tensors, dtype=dtype, attempt=self._attempt, final=final)


def _step_back() -> None:
    """Let this thread have what training leaves of the processors (Linux: priority is a thread's).

    Where the training waits for it, nothing else wants them, and it is as fast as ever.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nice = max(_BACKGROUND_NICE, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, nice)
