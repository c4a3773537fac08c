"""Saving and loading through PyTorch's distributed checkpoint (DCP), as safetensors files.

Each rank writes its shards; DCP puts them together for any other number of ranks. The commit is the
rename of the folder after every file in it was hashed and synced, so a killed or failed save leaves
the earlier checkpoints as they were. DCP's own format is not used: its metadata is a pickle.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from puna.core.errors import PunaError, explain_environment_error
from puna.core.fsio import commit_dir, remove_tree, write_json
from puna.core.ledger import Ledger
from puna.train.checkpoint.durable import DurableStore, is_no_room
from puna.train.checkpoint.manifest import (
    MANIFEST_FILE,
    DamagedCheckpointError,
    Manifest,
    list_steps,
    read_manifest,
    seal,
    step_dir,
)
from puna.train.checkpoint.repair import DiskShards, Served, ShardSource, repair
from puna.train.parallel.world import World

if TYPE_CHECKING:
    from puna.train.checkpoint import dcp

_PARTIAL = ".partial"
_POLL_S = 0.5


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        manifest: Of the checkpoint.
        tier: ``disk`` or ``store``.
        served: Shards that came from elsewhere.
    """

    manifest: Manifest
    tier: str
    served: list[Served]


class CheckpointStore:
    """The checkpoints of one job.

    Args:
        folder: Holds one folder per checkpoint.
        world: Ranks; every method is called by all of them.
        identity: Digest of the job.
        keep: The newest that are kept.
        must_save: A failed save raises; else it is recorded and training goes on to the next.
        events: Ledger.
        group: All ranks, for saving in another thread; None where that is not done.
        durable: Where checkpoints are uploaded to by rank 0, and come from when disk has none.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        identity: str,
        keep: int,
        must_save: bool,
        events: Ledger,
        group: dist.ProcessGroup | None = None,
        durable: DurableStore | None = None,
    ) -> None:
        self._group, self.durable = group, durable
        self._folder, self._world, self._identity = folder, world, identity
        self._keep, self._must_save, self._events = keep, must_save, events
        self._saved: int | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        *,
        dtype: str,
        attempt: int,
        final: bool = False,
    ) -> None:
        """Save a checkpoint, commit it and drop the oldest.

        Args:
            step: Steps done.
            tensors: Live tensors, sharded or plain.
            dtype: Dtype of the matrix products.
            attempt: Number of the attempt; keeps its work folder apart from a killed one's.
            final: The last one of the run; it must be saved whatever the configuration says.

        Raises:
            PunaError: It could not be saved (disk full, no permission) and must be. Nothing
                half-written stays.
        """
        if self._saved == step:
            return
        start_s = time.monotonic()
        partial = self._folder / f".{step_dir(self._folder, step).name}.{attempt}{_PARTIAL}"
        while True:
            manifest, problem, is_full = self._write(partial, step, tensors, dtype)
            if problem is None or not self._make_room(is_full):
                break
        if problem is not None:
            if self._must_save or final:
                raise PunaError(f"the checkpoint of step {step} cannot be saved: {problem.message}",
                                problem.fix)  # fmt: skip
            if self._world.rank == 0:
                self._events.emit("train.checkpoint_failed", step=step, error=problem.message)
            return
        self._saved = step
        if manifest is not None:
            if self.durable is not None:
                self.durable.put(step_dir(self._folder, step), manifest)
            self._drop_old()
            seconds = time.monotonic() - start_s
            self._events.emit(
                "train.checkpoint", durable=True, step=step, seconds=seconds,
                n_bytes=manifest.n_bytes,
            )  # fmt: skip

    @property
    def shards(self) -> DiskShards:
        """The shards of all checkpoints, as they are now."""
        return DiskShards(self._folder)

    def _write(
        self, partial: Path, step: int, tensors: Mapping[str, Tensor], dtype: str
    ) -> tuple[Manifest | None, PunaError | None, bool]:
        """Write and commit; return the manifest (rank 0), what went wrong, and if room lacked."""
        from puna.train.checkpoint import dcp  # imported late: see the module

        manifest: Manifest | None = None
        problem, is_full = None, False
        if self._world.rank == 0:
            try:
                partial.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem, is_full = _environment(error, partial), is_no_room(error)
        problem = self._world.from_first(problem, self._group)
        if problem is None:
            try:
                dcp.write(partial, tensors, no_dist=self._world.mesh is None, group=self._group)
            except dcp.CheckpointException as error:  # a BaseException; the same on every rank
                problem = _explain(error, partial)
                is_full = any(is_no_room(cause) for cause, _ in error.failures.values())
        if problem is None and self._world.rank == 0:
            try:
                manifest = seal(
                    partial, step=step, world=self._world.size, identity=self._identity, dtype=dtype
                )
                remove_tree(step_dir(self._folder, step))
                commit_dir(partial, step_dir(self._folder, step))
            except (OSError, ValueError) as error:  # no room, or not what DCP should write
                problem, is_full = _environment(error, partial), is_no_room(error)
        problem = self._world.from_first(problem, self._group)
        if self._world.rank == 0:
            remove_tree(partial)
        return manifest, problem, is_full

    def _make_room(self, is_full: bool) -> bool:
        """Drop the oldest checkpoint of a full disk, never the last good one; tell if it went."""
        went = False
        if self._world.rank == 0 and is_full:
            in_use = self.durable.in_use() if self.durable is not None else set()
            older = [step for step in list_steps(self._folder)[1:] if step not in in_use]
            if older:
                remove_tree(step_dir(self._folder, older[-1]))
                self._events.emit(
                    "train.checkpoint_dropped", step=older[-1], why="the disk is full"
                )
                went = True
        return self._world.from_first(went, self._group)

    def newest_step(self) -> int:
        """Steps done at the newest checkpoint, on disk or in the store, whole or not; or -1."""
        found = -1
        if self._world.rank == 0:
            disk = list_steps(self._folder)
            found = max([*disk, *self._steps_in_store(is_needed=False)], default=-1)
        return self._world.from_first(found)

    def earlier_dtype(self) -> str | None:
        """Dtype of the matrix products in the newest checkpoint; None when there is none."""
        found: str | None = None
        if self._world.rank == 0:
            for step in list_steps(self._folder):
                with contextlib.suppress(DamagedCheckpointError):
                    found = read_manifest(step_dir(self._folder, step)).dtype
                    break
            else:
                for step in self._steps_in_store(is_needed=False):
                    with contextlib.suppress(DamagedCheckpointError, PunaError):
                        found = self._manifest_in_store(step).dtype
                        break
        return self._world.from_first(found)

    def read_whole(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Load full tensors from a checkpoint, on one rank alone."""
        from puna.train.checkpoint import dcp  # imported late: see the module

        dcp.read(step_dir(self._folder, step), tensors, no_dist=True)

    def restore(
        self, tensors: Mapping[str, Tensor], sources: Sequence[ShardSource] = ()
    ) -> Loaded | None:
        """Load the newest checkpoint that is whole or can be repaired; remove and name others.

        Args:
            tensors: Live tensors to load into; their values are undefined when nothing is returned.
            sources: Asked for shards that are damaged or not on disk; used by rank 0.

        Returns:
            What was loaded, None when there was nothing to load.

        Raises:
            PunaError: The checkpoint belongs to another job, or disk has none and the store cannot
                be read.
        """
        if self._world.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for stale in self._folder.glob(f".*{_PARTIAL}"):
                remove_tree(stale)
        while True:
            loaded, problem = self._world.from_first(
                self._newest_or_problem(sources) if self._world.rank == 0 else None
            )
            if problem is not None:
                raise problem
            if loaded is None:
                return None
            step = loaded.manifest.step
            if loaded.manifest.identity != self._identity:
                raise PunaError(
                    f"{step_dir(self._folder, step)} belongs to a training with another "
                    "configuration",
                    f"remove the folder {self._folder}, or undo the change of the configuration",
                )
            from puna.train.checkpoint import dcp

            try:
                dcp.read(step_dir(self._folder, step), tensors, no_dist=self._world.mesh is None)
            except dcp.CheckpointException as error:  # hashes fit, and yet DCP cannot read it
                if self._world.rank == 0:
                    self._discard(step, str(error).splitlines()[0])
                continue
            self._saved = step
            return loaded

    def finish_uploads(self, beat: Callable[[], None]) -> None:
        """Wait for the uploads on all ranks, with a sign of life twice a second.

        The newest checkpoint is uploaded if an attempt before this one was killed meanwhile.
        """
        if self.durable is None:
            return
        if self._world.rank == 0:
            newest = list_steps(self._folder)[:1]
            if newest and not self.durable.in_use():
                with contextlib.suppress(DamagedCheckpointError, PunaError):
                    if newest[0] not in self.durable.steps():
                        folder = step_dir(self._folder, newest[0])
                        self.durable.put(folder, read_manifest(folder))
        while self._world.from_first(bool(self.durable.in_use())):
            beat()
            time.sleep(_POLL_S)

    def _newest_or_problem(
        self, sources: Sequence[ShardSource]
    ) -> tuple[Loaded | None, PunaError | None]:
        try:
            return self._newest_whole(sources), None
        except PunaError as error:
            return None, error

    def _newest_whole(self, sources: Sequence[ShardSource]) -> Loaded | None:
        """Bring the newest checkpoint that can be had into a whole folder on disk."""
        on_disk = list_steps(self._folder)
        stored = self._steps_in_store(is_needed=not on_disk)
        for step in sorted({*on_disk, *stored}, reverse=True):
            try:
                if step in on_disk:
                    return self._repaired(step, step in stored, sources)
                return self._downloaded(step, sources)
            except DamagedCheckpointError as error:
                self._discard(step, str(error))
            except OSError as error:  # no room to repair it: it stays
                self._events.emit("train.checkpoint_damaged", step=step, why=str(error))
        return None

    def _repaired(self, step: int, is_stored: bool, sources: Sequence[ShardSource]) -> Loaded:
        folder = step_dir(self._folder, step)
        try:
            manifest = read_manifest(folder)
        except DamagedCheckpointError:
            if not is_stored:
                raise
            manifest = self._manifest_in_store(step)
            write_json(folder / MANIFEST_FILE, manifest.to_json())
        return Loaded(manifest, "disk", repair(folder, manifest, sources))

    def _downloaded(self, step: int, sources: Sequence[ShardSource]) -> Loaded:
        manifest = self._manifest_in_store(step)
        partial = self._folder / f".{step_dir(self._folder, step).name}.store{_PARTIAL}"
        try:
            partial.mkdir(exist_ok=True)
            served = repair(partial, manifest, sources)
            write_json(partial / MANIFEST_FILE, manifest.to_json())
            commit_dir(partial, step_dir(self._folder, step))
        finally:
            remove_tree(partial)
        return Loaded(manifest, "store", [one for one in served if one.tier != "store"])

    def _manifest_in_store(self, step: int) -> Manifest:
        assert self.durable is not None
        return self.durable.manifest(step)

    def _steps_in_store(self, *, is_needed: bool) -> list[int]:
        """Steps in the store; when it cannot be read and is not needed, tell and go on."""
        if self.durable is None:
            return []
        try:
            return self.durable.steps()
        except PunaError as error:
            if is_needed:
                raise
            self._events.emit("train.store_failed", url=self.durable.url, error=error.message)
            return []

    def has_state_until(self, step: int) -> bool:
        """Tell whether there is a checkpoint of a step or of one before, on disk or in the store.

        Raises:
            PunaError: There is none on disk, and the store cannot be read.
        """
        return any(one <= step for one in list_steps(self._folder)) or any(
            one <= step for one in self._steps_in_store(is_needed=True)
        )

    def give_up_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, on disk and in the store; rank 0 calls it.

        Raises:
            PunaError: The store cannot be written.
        """
        if self.durable is not None:
            self.durable.wait()
            self.durable.remove([one for one in self.durable.steps() if one > step])
        for one in list_steps(self._folder):
            if one > step:
                remove_tree(step_dir(self._folder, one))

    def _discard(self, step: int, why: str) -> None:
        self._events.emit("train.checkpoint_damaged", durable=True, step=step, why=why)
        remove_tree(step_dir(self._folder, step))

    def _drop_old(self) -> None:
        in_use = self.durable.in_use() if self.durable is not None else set()
        for step in set(list_steps(self._folder)[self._keep :]) - in_use:
            remove_tree(step_dir(self._folder, step))


def _environment(error: Exception, partial: Path) -> PunaError:
    return explain_environment_error(error, partial) or PunaError(str(error))


def _explain(error: dcp.CheckpointException, partial: Path) -> PunaError:
    for rank, (cause, _) in sorted(error.failures.items()):
        explained = explain_environment_error(cause, partial)
        if explained is not None:
            return explained
        return PunaError(f"rank {rank}: {type(cause).__name__}: {cause}")
    return PunaError(str(error))
