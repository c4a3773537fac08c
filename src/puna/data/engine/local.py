"""Kernels over shards on this machine: a pool of worker processes, results in shard order.

Shared by engines whose kernels run locally; it knows nothing of relational steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.core.fsio import remove_tree, write_json
from puna.core.pool import WorkerPool, resolve_workers
from puna.core.progress import progress
from puna.data.engine.base import MANIFEST_FILE, Kernel, Manifest, ShardReport
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


def map_shards(
    step: str,
    documents: Path,
    out: Path,
    kernel: Kernel,
    *,
    n_workers: int,
    carry: Sequence[str] | None = None,
    side: Path | None = None,
    small_input_bytes: int | None = None,
) -> Manifest:
    """Run a kernel over every shard, check conservation over all of them, publish the manifest.

    Args:
        step: Name of the step.
        documents: Folder of shards to read.
        out: Step folder; what a killed attempt left there is reused.
        kernel: What to run.
        n_workers: Worker processes, 0 for one per core; the output does not depend on it.
        carry: Columns to copy (an annotating step), or None (a judging step).
        side: Folder with a side shard per shard.
        small_input_bytes: Input size up to which everything runs in this process; by default
            :data:`SMALL_INPUT_BYTES`.

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
    small = SMALL_INPUT_BYTES if small_input_bytes is None else small_input_bytes
    n_processes = 1 if n_bytes <= small else min(resolve_workers(n_workers), len(shards))
    reports: list[ShardReport] = []
    n_in = n_kept = 0
    with (
        WorkerPool(n_processes) as pool,
        progress(step, total=sum(shard.n_rows for shard in shards), unit="docs") as bar,
    ):
        for report in pool.map(run_shard, tasks):
            reports.append(report)
            n_in += report.rows_in
            n_kept += report.rows_kept
            note = f"{n_kept / n_in:.1%} kept" if n_in and carry is None else ""
            bar.advance(report.rows_in, note=note)
    manifest = Manifest(step, reports)
    _publish(manifest, tasks)
    return manifest


def _publish(manifest: Manifest, tasks: Sequence[ShardTask]) -> None:
    """Check every shard once more from the files, then write the manifest and drop the marks."""
    out = tasks[0].out
    for task, report in zip(tasks, manifest.shards, strict=True):
        again = verify_shard(task, report.key)
        if again != report:
            raise RuntimeError(f"{task.shard.name} of {task.step} changed after it was written")
    write_json(out / MANIFEST_FILE, manifest.to_json())
    remove_tree(out / MARKS_DIR)


def read_manifest(out: Path) -> list[dict[str, Any]]:
    """Return the shards' entries of a step's published manifest; empty when it is not finished."""
    path = out / MANIFEST_FILE
    return json.loads(path.read_text(encoding="utf-8"))["shards"] if path.is_file() else []
