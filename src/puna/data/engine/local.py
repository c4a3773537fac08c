"""Kernels over shards, results in shard order; and the worker processes of this machine.

Shared by all engines: :func:`map_shards` knows nothing of relational steps, nor of where its tasks
run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from puna.core.fsio import remove_tree, write_json
from puna.core.pool import WorkerPool, resolve_workers
from puna.core.progress import progress
from puna.data.engine.base import MANIFEST_FILE, Kernel, Manifest, Mapper, ShardReport
from puna.data.engine.shards import list_shards
from puna.data.engine.shardwork import (
    MARKS_DIR,
    ShardTask,
    clean_leftovers,
    run_shard,
    verify_shard,
)

SMALL_INPUT_BYTES = 32 << 20
"""Below this, starting worker processes (1-2 s of CPU each) costs more than it saves."""


A = TypeVar("A")
B = TypeVar("B")


class LocalMap:
    """A :class:`puna.data.engine.base.Mapper` over worker processes, started when first needed.

    Args:
        n_workers: Worker processes, 0 for one per usable core.
    """

    def __init__(self, n_workers: int) -> None:
        self._n_workers = resolve_workers(n_workers)
        self._pool: WorkerPool | None = None

    def __call__(
        self, function: Callable[[A], B], items: Sequence[A], *, useful_workers: int | None = None
    ) -> Iterator[B]:
        """See :class:`puna.data.engine.base.Mapper`."""
        useful = len(items) if useful_workers is None else useful_workers
        n_workers = min(self._n_workers, useful, len(items))
        if n_workers < 2:
            yield from map(function, items)
            return
        if self._pool is None or self._pool.n_workers < n_workers:
            self.__exit__(None, None, None)
            self._pool = WorkerPool(n_workers).__enter__()
        yield from self._pool.map(function, items)

    def __enter__(self) -> LocalMap:
        return self

    def __exit__(self, *exc: Any) -> None:
        """End the worker processes, at once after an error."""
        if self._pool is not None:
            self._pool.__exit__(*exc)
            self._pool = None


def map_shards(
    step: str,
    documents: Path,
    out: Path,
    kernel: Kernel,
    mapper: Mapper,
    *,
    carry: Sequence[str] | None = None,
    side: Path | None = None,
) -> Manifest:
    """Run a kernel over every shard, check conservation over all of them, publish the manifest.

    Args:
        step: Name of the step.
        documents: Folder of shards to read.
        out: Step folder; what a killed attempt left there is reused.
        kernel: What to run.
        mapper: Where the shards are worked on; the output does not depend on it.
        carry: Columns to copy (an annotating step), or None (a judging step).
        side: Folder with a side shard per shard.

    Raises:
        ConservationError: Rows were lost, doubled or changed.
    """
    shards = list_shards(documents)
    earlier = {entry["name"]: entry for entry in read_manifest(out)}
    tasks = [
        ShardTask(
            step, shard, out, kernel, None if carry is None else tuple(carry),
            None if side is None else side / shard.name, earlier.get(shard.name),
        )
        for shard in shards
    ]  # fmt: skip
    folders = [out / dataset for dataset in tasks[0].datasets()]
    for folder in [*folders, out / MARKS_DIR]:
        folder.mkdir(parents=True, exist_ok=True)
    clean_leftovers([*folders, out / MARKS_DIR])
    kernel.prepare()
    n_bytes = sum(shard.path.stat().st_size for shard in shards)
    useful = len(tasks) if n_bytes > SMALL_INPUT_BYTES else 1
    reports: list[ShardReport] = []
    n_in = n_kept = 0
    with progress(step, total=sum(shard.n_rows for shard in shards), unit="docs") as bar:
        for report in mapper(run_shard, tasks, useful_workers=useful):
            reports.append(report)
            n_in += report.rows_in
            n_kept += report.rows_kept
            note = f"{n_kept / n_in:.1%} kept" if n_in and carry is None else ""
            bar.advance(report.rows_in, note=note)
    clean_leftovers(folders)  # of a worker that died on a cluster, whose shard another has done
    manifest = Manifest(step, reports)
    _verify(tasks, reports, mapper, useful)
    write_json(out / MANIFEST_FILE, manifest.to_json())
    remove_tree(out / MARKS_DIR)
    return manifest


def _verify(
    tasks: Sequence[ShardTask], reports: Sequence[ShardReport], mapper: Mapper, useful: int
) -> None:
    """Check every shard once more from the files, now that all of them are there."""
    checks = [(task, report.key) for task, report in zip(tasks, reports, strict=True)]
    again = mapper(_verify_one, checks, useful_workers=useful)
    for task, report, found in zip(tasks, reports, again, strict=True):
        if found != report:
            raise RuntimeError(f"{task.shard.name} of {task.step} changed after it was written")


def _verify_one(check: tuple[ShardTask, str]) -> ShardReport:
    return verify_shard(*check)


def read_manifest(out: Path) -> list[dict[str, Any]]:
    """Return the shards' entries of a step's published manifest; empty when it is not finished."""
    path = out / MANIFEST_FILE
    return json.loads(path.read_text(encoding="utf-8"))["shards"] if path.is_file() else []
