"""All runs of a design: which are missing, on all cores, and their table."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.fsio import write_text
from puna.core.pool import WorkerPool, resolve_workers
from puna.core.progress import progress
from puna.core.units import format_rate
from puna.mix.design import PlannedRun, run_key
from puna.mix.proxy.corpus import digest_of, open_shards, targets_of
from puna.mix.proxy.train import SCHEMA, Job, make_run
from puna.mix.sources import Manifest

RESULTS_DIR = "results"
TABLE_FILE = "runs.csv"


@dataclass(frozen=True)
class Made:
    """What came out.

    Attributes:
        results: One per planned run, in their order.
        table: The table of runs.
        n_new: Runs that were made now.
        n_tokens: Tokens that were trained on now.
        seconds: What that took.
        n_workers: Processes.
        notes: What to mind, in sentences.
    """

    results: list[dict[str, Any]]
    table: Path
    n_new: int
    n_tokens: int
    seconds: float
    n_workers: int
    notes: list[str]

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all processes."""
        return self.n_tokens / self.seconds if self.n_new else 0.0


def make_runs(
    manifest: Manifest, planned: Sequence[PlannedRun], shards: str, out: Path, *,
    n_workers: int = 0, table: str = TABLE_FILE,
) -> Made:  # fmt: skip
    """Make the runs that are missing and write the table of all.

    A result is written at once under a name made of its content (mix, seed, proxy, tokens); a call
    that was killed goes on with the runs that are missing.

    Args:
        manifest: Sources, targets and settings of the proxies.
        planned: Runs of a design.
        shards: Folder of token shards.
        out: Folder for the results and the table.
        n_workers: Processes of one thread; 0 for one per core.
        table: Name of the table in that folder.

    Raises:
        PunaError: The plan, the manifest and the shards do not fit together, or the disk is full.
    """
    _check_plan(manifest, planned)
    jobs = _jobs(manifest, planned, shards, out)
    wanted = [one.name for one in manifest.target] or list(jobs[0].targets)
    found = {job.path: _known(job, wanted) for job in jobs}
    todo = list({job.path: job for job in jobs if found[job.path] is None}.values())
    workers = min(resolve_workers(n_workers), max(len(todo), 1))
    per_run = manifest.proxy.n_tokens
    begin_s = time.monotonic()
    if todo:
        (out / RESULTS_DIR).mkdir(parents=True, exist_ok=True)
        total, done = len({job.path for job in jobs}), len(found) - len(todo)
        shown = progress(
            "mix.run", total=total * per_run, unit="tokens", initial=done * per_run
        )  # fmt: skip
        with shown as bar, WorkerPool(workers) as pool:
            for result in pool.map(make_run, todo):
                done += 1
                bar.advance(per_run, f"{done} of {total} runs")
                found[_path(out, result["run"], result["data"])] = result
    seconds = time.monotonic() - begin_s
    results = [found[job.path] or {} for job in jobs]
    path = out / table
    write_text(path, table_of(manifest, planned, results, wanted))
    return Made(
        results, path, len(todo), len(todo) * per_run, seconds, workers, _notes(manifest, results)
    )


def table_of(
    manifest: Manifest, planned: Sequence[PlannedRun], results: Sequence[dict[str, Any]],
    targets: Sequence[str],
) -> str:  # fmt: skip
    """Return the table that `puna mix fit` reads; a run that diverged has no losses."""
    text = io.StringIO()
    rows = []
    for one, result in zip(planned, results, strict=True):
        row = one.row(manifest.names) | {"done": 1}
        row |= {"n_params": result["n_params"], "n_tokens": result["n_tokens"]}
        losses = result["losses"]
        rows.append(row | {f"loss.{name}": _shown(losses[name]) for name in targets})
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_plan(path: Path, manifest: Manifest) -> list[PlannedRun]:
    """Read what `puna mix design` wrote.

    Raises:
        PunaError: The file is missing, is no plan, or has other sources than the manifest.
    """
    try:
        rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    except FileNotFoundError as error:
        raise PunaError(f"{path}: no such file", "write it with `puna mix design`") from error
    if not rows:
        raise PunaError(f"{path}: has no runs", "write it with `puna mix design`")
    columns = [f"mix.{name}" for name in manifest.names]
    needed = ["run", "kind", "seed", "held_out", *columns]
    gone = [name for name in needed if name not in rows[0]]
    more = [name for name in rows[0] if name.startswith("mix.") and name not in columns]
    if gone or more:
        what = f"no column {gone[0]!r}" if gone else f"a source {more[0][4:]!r} of its own"
        raise PunaError(
            f"{path}: has {what}; the manifest has the sources {', '.join(manifest.names)}",
            "plan the runs with this manifest: `puna mix design`",
        )
    return [_planned(row, manifest, f"{path}: run {row['run']}") for row in rows]


def _planned(row: dict[str, str], manifest: Manifest, where: str) -> PlannedRun:
    shares = {}
    for name in manifest.names:
        text = row[f"mix.{name}"]
        try:
            shares[name] = float(text)
        except (TypeError, ValueError):
            shares[name] = -1.0
        if not 0 <= shares[name] <= 1:
            raise PunaError(f"{where}: share of {name} is {text!r}", "use a number from 0 to 1")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise PunaError(f"{where}: shares sum to {total:.6g}", "make them sum to 1")
    try:
        seed = int(row["seed"])
    except (TypeError, ValueError) as error:
        raise PunaError(f"{where}: seed is {row['seed']!r}", "use a whole number") from error
    kept = {name: share for name, share in shares.items() if share > 0}
    return PlannedRun(row["run"], row["kind"], kept, seed, row["held_out"] == "1")


def _check_plan(manifest: Manifest, planned: Sequence[PlannedRun]) -> None:
    content = manifest.proxy.content()
    for one in planned:
        if run_key(one.shares, one.seed, content) != one.key:
            raise PunaError(
                f"run {one.key} was planned with other settings than those under [proxy]",
                "plan the runs again: `puna mix design`; runs that are the same are not made again",
            )


def _jobs(manifest: Manifest, planned: Sequence[PlannedRun], folder: str, out: Path) -> list[Job]:
    shards = open_shards(folder, manifest.names)
    targets = targets_of(shards)
    gone = [one.name for one in manifest.target if one.name not in targets]
    if gone:
        raise PunaError(
            f"target {gone[0]!r} of the manifest has no held-out document in {folder}",
            f"use targets that it has: {', '.join(targets)}",
        )
    proxy = manifest.proxy.model_dump_json()
    jobs = []
    for one in planned:
        data = digest_of(shards, list(one.shares))
        jobs.append(
            Job(one.key, dict(one.shares), one.seed, shards.absolute, proxy, data, targets,
                _path(out, one.key, data))
        )  # fmt: skip
    return jobs


def _path(out: Path, run: str, data: str) -> Path:
    return out / RESULTS_DIR / f"{run}-{data[:8]}.json"


def _known(job: Job, wanted: Sequence[str]) -> dict[str, Any] | None:
    """Return a finished run; None when it is missing, or has not measured what is wanted."""
    try:
        found = json.loads(job.path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PunaError(f"{job.path}: no valid JSON: {error}", "remove this file") from error
    same = found.get("schema") == SCHEMA and found.get("data") == job.data
    measured = found.get("targets", {})
    return found if same and all(measured.get(t) == job.targets[t] for t in wanted) else None


def _notes(manifest: Manifest, results: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    lost = [result["run"] for result in results if result["diverged"]]
    if lost:
        notes.append(
            f"{len(lost)} runs ended with a loss that is no number ({', '.join(lost[:5])}): lower "
            "optim.lr under [proxy]"
        )
    for one in manifest.source:
        passes = max(
            (result["consumed"].get(one.name, {}).get("epochs", 0.0) for result in results),
            default=0.0,
        )
        if passes > one.max_epochs:
            notes.append(
                f"{one.name} was read {passes:.1f} times in a run, more than max_epochs "
                f"({one.max_epochs:g}): its worth is told too low for a training that reads it less"
            )
    return notes


def _shown(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.6f}"


def headline(made: Made) -> str:
    """Return one line for the person who watches."""
    rate = f", {format_rate(made.tokens_per_s, 'tokens')}" if made.n_new else ""
    return (
        f"{len(made.results)} runs, {made.n_new} made now by {made.n_workers} processes{rate}: "
        f"{made.table}"
    )
