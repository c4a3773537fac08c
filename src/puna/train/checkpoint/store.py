"""Saving and loading through PyTorch's distributed checkpoint (DCP), as safetensors files.

Each rank writes its shards; DCP puts them together for any other number of ranks. The commit is the
rename of the folder after every file in it was hashed and synced, so a killed or failed save leaves
the earlier checkpoints as they were. DCP's own format is not used: its metadata is a pickle.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from puna.core.errors import PunaError, explain_environment_error
from puna.core.fsio import commit_dir, remove_tree
from puna.core.ledger import Ledger
from puna.train.checkpoint.manifest import (
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


class CheckpointStore:
    """The checkpoints of one job.

    Args:
        folder: Holds one folder per checkpoint.
        world: Ranks; every method is called by all of them.
        identity: Digest of the job.
        keep: The newest that are kept.
        must_save: A failed save raises; else it is recorded and training goes on.
        events: Ledger.
        group: All ranks, for saving in another thread; None where that is not done.
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
    ) -> None:
        self._group = group
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
        from puna.train.checkpoint import dcp  # imported late: see the module

        start_s = time.monotonic()
        partial = self._folder / f".{step_dir(self._folder, step).name}.{attempt}{_PARTIAL}"
        problem: PunaError | None = None
        manifest: Manifest | None = None
        try:
            dcp.write(partial, tensors, no_dist=self._world.mesh is None, group=self._group)
        except dcp.CheckpointException as error:  # a BaseException; every rank gets the same one
            problem = _explain(error, partial)
        if problem is None and self._world.rank == 0:
            try:
                manifest = seal(
                    partial, step=step, world=self._world.size, identity=self._identity, dtype=dtype
                )
                remove_tree(step_dir(self._folder, step))
                commit_dir(partial, step_dir(self._folder, step))
            except OSError as error:
                problem = explain_environment_error(error, partial) or PunaError(str(error))
        problem = self._world.from_first(problem, self._group)
        if self._world.rank == 0:
            remove_tree(partial)
        if problem is not None:
            if self._must_save or final:
                raise PunaError(f"the checkpoint of step {step} cannot be saved: {problem.message}",
                                problem.fix)  # fmt: skip
            if self._world.rank == 0:
                self._events.emit("train.checkpoint_failed", step=step, error=problem.message)
            return
        self._saved = step
        if manifest is not None:
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

    def newest_step(self) -> int:
        """Steps done at the newest checkpoint, whole or not; -1 without one."""
        found = list_steps(self._folder)[:1] if self._world.rank == 0 else []
        return self._world.from_first(found[0] if found else -1)

    def earlier_dtype(self) -> str | None:
        """Dtype of the matrix products in the newest checkpoint; None when there is none."""
        found: str | None = None
        if self._world.rank == 0:
            for step in list_steps(self._folder):
                with contextlib.suppress(DamagedCheckpointError):
                    found = read_manifest(step_dir(self._folder, step)).dtype
                    break
        return self._world.from_first(found)

    def read_whole(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Load full tensors from a checkpoint, on one rank alone."""
        from puna.train.checkpoint import dcp  # imported late: see the module

        dcp.read(step_dir(self._folder, step), tensors, no_dist=True)

    def restore(
        self, tensors: Mapping[str, Tensor], sources: Sequence[ShardSource] = ()
    ) -> tuple[Manifest | None, list[Served]]:
        """Load the newest checkpoint that is whole or can be repaired; remove and name others.

        Args:
            tensors: Live tensors to load into; their values are undefined when nothing is returned.
            sources: Asked for shards that are damaged; used by rank 0.

        Returns:
            The manifest of what was loaded, None when there was nothing to load; and the shards
            that a source gave.

        Raises:
            PunaError: The checkpoint belongs to another job.
        """
        if self._world.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for stale in self._folder.glob(f".*{_PARTIAL}"):
                remove_tree(stale)
        while True:
            manifest, served = self._world.from_first(
                self._newest_whole(sources) if self._world.rank == 0 else (None, [])
            )
            if manifest is None:
                return None, []
            if manifest.identity != self._identity:
                raise PunaError(
                    f"{step_dir(self._folder, manifest.step)} belongs to a training with another "
                    "configuration",
                    f"remove the folder {self._folder}, or undo the change of the configuration",
                )
            from puna.train.checkpoint import dcp

            try:
                dcp.read(
                    step_dir(self._folder, manifest.step), tensors,
                    no_dist=self._world.mesh is None,
                )  # fmt: skip
            except dcp.CheckpointException as error:  # hashes fit, and yet DCP cannot read it
                if self._world.rank == 0:
                    self._discard(manifest.step, str(error).splitlines()[0])
                continue
            self._saved = manifest.step
            return manifest, served

    def _newest_whole(self, sources: Sequence[ShardSource]) -> tuple[Manifest | None, list[Served]]:
        for step in list_steps(self._folder):
            folder = step_dir(self._folder, step)
            try:
                manifest = read_manifest(folder)
                return manifest, repair(folder, manifest, sources)
            except DamagedCheckpointError as error:
                self._discard(step, str(error))
            except OSError as error:  # no room to repair it: it stays
                self._events.emit("train.checkpoint_damaged", step=step, why=str(error))
        return None, []

    def _discard(self, step: int, why: str) -> None:
        self._events.emit("train.checkpoint_damaged", durable=True, step=step, why=why)
        remove_tree(step_dir(self._folder, step))

    def _drop_old(self) -> None:
        for step in list_steps(self._folder)[self._keep :]:
            remove_tree(step_dir(self._folder, step))


def _explain(error: dcp.CheckpointException, partial: Path) -> PunaError:
    for rank, (cause, _) in sorted(error.failures.items()):
        explained = explain_environment_error(cause, partial)
        if explained is not None:
            return explained
        return PunaError(f"rank {rank}: {type(cause).__name__}: {cause}")
    return PunaError(str(error))
