"""The work on one shard: run a kernel, write the result, check conservation, leave a commit mark.

A shard is done when its mark ``.marks/<shard>.json`` exists; the mark is written after the files,
and holds what was read back from them. A mark counts only under the same *key*: step, kernel and
content of the input file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from puna.core.errors import PunaError
from puna.core.fsio import hash_file, hash_json, write_json
from puna.data.engine.base import ROWS_DIR, ConservationError, Kernel, Shard, ShardReport
from puna.data.engine.shards import (
    VERDICT_FIELDS,
    add_digests,
    ids_digest,
    is_ordered,
    open_shard,
    read_batches,
    read_columns,
    rejected_schema,
    shard_flow,
    shard_writer,
)
from puna.data.schema import DOCUMENTS_DIR, REJECTED_DIR

BATCH_ROWS = 1024
MARKS_DIR = ".marks"
_N_VERDICT = len(VERDICT_FIELDS)


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs for one shard.

    Attributes:
        step: Name of the step.
        shard: What to read.
        out: Step folder.
        kernel: What to run.
        carry: Columns copied by an annotating step; None for a judging step.
        side: Shard with more columns for the same ids in the same order.
        published: The shard's entry in the manifest that an earlier attempt published.
    """

    step: str
    shard: Shard
    out: Path
    kernel: Kernel
    carry: tuple[str, ...] | None = None
    side: Path | None = None
    published: dict[str, Any] | None = None

    @property
    def mark(self) -> Path:
        """The commit mark."""
        return self.out / MARKS_DIR / f"{self.shard.name}.json"

    def datasets(self) -> tuple[str, ...]:
        """Folders below ``out`` that the step writes."""
        return (ROWS_DIR,) if self.carry is not None else (DOCUMENTS_DIR, REJECTED_DIR)

    def key(self) -> str:
        """Identity under which a finished shard is reused."""
        side = hash_file(self.side) if self.side is not None else None
        content = hash_file(self.shard.path)
        return hash_json([self.step, repr(self.kernel), self.carry, content, side])


def run_shard(task: ShardTask) -> ShardReport:
    """Bring one shard up to date and return its report.

    Raises:
        ConservationError: The written files do not hold what was read.
        PunaError: The input is damaged or not ordered by id.
    """
    key = task.key()
    done = _read_mark(task, key)
    if done is not None:
        return done
    if task.carry is not None:
        _write_annotated(task)
    else:
        _write_judged(task)
    report = verify_shard(task, key)
    write_json(task.mark, report.to_json())
    return report


def verify_shard(task: ShardTask, key: str) -> ShardReport:
    """Read back what a shard's files hold and compare it with the input.

    Raises:
        ConservationError: Ids are lost, doubled, foreign or out of order.
    """
    name, step = task.shard.name, task.step
    columns_in = ["id"] if task.carry is not None else ["id", "source", "n_bytes"]
    given = read_columns(task.shard.path, columns_in)
    ids_in = given.column("id")
    digest_in = ids_digest(ids_in)
    if not is_ordered(ids_in):
        raise PunaError(f"{task.shard.path}: rows are not in strict order of their ids",
                        "run the stage that wrote this dataset again")  # fmt: skip
    if task.carry is not None:
        ids_out = read_columns(task.out / ROWS_DIR / name, ["id"]).column("id")
        _check(step, name, "id", digest_in, ids_digest(ids_out), is_ordered(ids_out))
        n_rows = len(ids_in)
        return ShardReport(
            name, key, n_rows, n_rows, 0, digest_in, digest_in, ids_digest(ids_in[:0])
        )
    kept = read_columns(task.out / DOCUMENTS_DIR / name, ["id", "source", "n_bytes"])
    columns = ["id", "source", "n_bytes", "reason"]
    rejected = read_columns(task.out / REJECTED_DIR / name, columns)
    digests = ids_digest(kept["id"]), ids_digest(rejected["id"])
    ordered = is_ordered(kept["id"]) and is_ordered(rejected["id"])
    _check(step, name, "kept + rejected", digest_in, add_digests(*digests), ordered)
    return ShardReport(
        name, key, len(ids_in), kept.num_rows, rejected.num_rows, digest_in, *digests,
        shard_flow(given, kept, rejected),
    )  # fmt: skip


def _check(step: str, name: str, what: str, read: str, written: str, ordered: bool) -> None:
    if read != written:
        n_read, n_written = read.partition(":")[0], written.partition(":")[0]
        same = "the same number, but other ids" if n_read == n_written else f"wrote {n_written}"
        raise ConservationError(step, name, f"read {n_read} rows, {same} ({what})")
    if not ordered:
        raise ConservationError(step, name, "the written rows are not ordered by id")


def _read_mark(task: ShardTask, key: str) -> ShardReport | None:
    """Return the report of a finished shard if its files still hold what its mark says."""
    mark = task.published
    if task.mark.is_file():
        try:
            mark = json.loads(task.mark.read_text(encoding="utf-8"))
        except ValueError:
            return None  # damaged: do the shard again
    files = [task.out / dataset / task.shard.name for dataset in task.datasets()]
    if mark is None or mark.get("key") != key or not all(path.is_file() for path in files):
        return None
    try:
        report = verify_shard(task, key)
    except PunaError:
        return None  # the files were changed or damaged since
    return report if report.to_json() == mark else None


def _write_annotated(task: ShardTask) -> None:
    carry = ["id", *(name for name in task.carry or () if name != "id")]
    columns = list(dict.fromkeys([*carry, *task.kernel.columns]))
    fields = [open_schema(task.shard.path).field(name) for name in carry]
    schema = pa.schema([*fields, *task.kernel.adds()])
    with shard_writer(task.out / ROWS_DIR / task.shard.name, schema) as writer:
        for batch, result in _results(task, columns):
            writer.write(_concat(batch.select(carry), result, schema))


def _write_judged(task: ShardTask) -> None:
    documents = open_schema(task.shard.path)
    extra = [one for one in list(task.kernel.adds())[_N_VERDICT:] if one.name != "text"]
    kept_schema = pa.schema([*documents, *extra])
    schema = rejected_schema(kept_schema)
    name = task.shard.name
    with (
        shard_writer(task.out / DOCUMENTS_DIR / name, kept_schema) as kept,
        shard_writer(task.out / REJECTED_DIR / name, schema) as rejected,
    ):
        for batch, result in _results(task, None):
            added = result.select([one.name for one in extra])
            rows = _concat(batch.select(documents.names), added, kept_schema)
            is_kept = result.column(0).is_null()
            kept.write(_with_text(rows, result).filter(is_kept))
            is_rejected = result.column(0).is_valid()
            verdict = result.select(range(_N_VERDICT)).filter(is_rejected)
            step = pa.array([task.step] * verdict.num_rows, pa.string())
            dropped = rows.filter(is_rejected)
            arrays = [*dropped.columns, step, *verdict.columns]
            rejected.write(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _with_text(rows: pa.RecordBatch, result: pa.RecordBatch) -> pa.RecordBatch:
    """Put in the text that the kernel gave, if it gives texts."""
    if "text" not in result.schema.names:
        return rows
    text = result.column("text")
    columns = dict(zip(rows.schema.names, rows.columns, strict=True))
    columns |= {"text": text, "n_bytes": pc.call_function("binary_length", [text])}
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=rows.schema)


def open_schema(path: Path) -> pa.Schema:
    """Return the columns of a shard, without file-level metadata."""
    with contextlib.closing(open_shard(path)) as file:
        return file.schema_arrow.remove_metadata()


def _results(
    task: ShardTask, columns: list[str] | None
) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Run the kernel over a shard; every batch comes with a result of the same length."""
    side = _open_side(task)
    first_row = 0
    expected = task.kernel.adds()
    for batch in read_batches(task.shard.path, columns, BATCH_ROWS):
        given = batch if side is None else _beside(task, batch, side, first_row)
        result = task.kernel(given, task.shard, first_row)
        if result.num_rows != batch.num_rows:
            raise ConservationError(
                task.step, task.shard.name,
                f"the kernel {type(task.kernel).__name__} returned {result.num_rows} results for "
                f"{batch.num_rows} rows (rows {first_row} to {first_row + batch.num_rows - 1})",
            )  # fmt: skip
        if not result.schema.equals(expected):
            raise TypeError(f"{task.kernel!r} promised {expected} and returned {result.schema}")
        yield batch, result
        first_row += batch.num_rows


def _open_side(task: ShardTask) -> pa.Table | None:
    if task.side is None:
        return None
    with contextlib.closing(open_shard(task.side)) as file:
        side = file.read(use_threads=False)
    if side.num_rows != task.shard.n_rows:
        raise ConservationError(
            task.step, task.shard.name, f"{task.shard.n_rows} rows, but {side.num_rows} verdicts"
        )
    return side


def _beside(
    task: ShardTask, batch: pa.RecordBatch, side: pa.Table, first_row: int
) -> pa.RecordBatch:
    part = side.slice(first_row, batch.num_rows).combine_chunks()
    if not part["id"].combine_chunks().equals(batch.column("id")):
        raise ConservationError(task.step, task.shard.name, "the verdicts are for other ids")
    added = [name for name in part.column_names if name != "id" and name not in batch.schema.names]
    arrays = [part[name].combine_chunks() for name in added]
    return pa.RecordBatch.from_arrays([*batch.columns, *arrays], [*batch.schema.names, *added])


def _concat(left: pa.RecordBatch, right: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([*left.columns, *right.columns], schema=schema)


def clean_leftovers(folders: Sequence[Path]) -> None:
    """Remove the temporary files that a killed attempt left in its folders."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            path.unlink()
