"""Two runs over the same sources: which documents changed their fate, and by which rule."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.data.engine.shards import list_shards, read_columns
from puna.data.flow import finished
from puna.data.schema import DOCUMENTS_DIR, REJECTED_DIR

KEPT, ABSENT = "kept", "not there"
SAMPLES = 5
_SCHEMA = pa.schema([("id", pa.string()), ("path", pa.string()), ("fate", pa.string())])


@dataclass(frozen=True)
class Change:
    """Documents that went one way in the first run and another in the second.

    Attributes:
        before: ``kept``, a stage and a reason, or ``not there`` (not read, or set aside).
        after: The same in the second run.
        n_docs: How many.
        samples: Ids and paths of some of them, by id.
    """

    before: str
    after: str
    n_docs: int
    samples: list[tuple[str, str]]


@dataclass(frozen=True)
class RunDiff:
    """The outcome.

    Attributes:
        n_first: Documents of the first run.
        n_second: Documents of the second run.
        n_same: Documents with the same fate in both.
        changes: The others, the most frequent first.
    """

    n_first: int
    n_second: int
    n_same: int
    changes: list[Change]


def compare_runs(first: Path, second: Path) -> RunDiff:
    """Compare the fates of all documents of two runs.

    Documents are the same when their ids are: the same path of a source of the same name.

    Args:
        first: Folder of a run.
        second: Folder of another.

    Raises:
        PunaError: One holds no finished data stage, or the runs share no document.
    """
    fates = [_fates(run) for run in (first, second)]
    joined = fates[0].join(
        fates[1], keys="id", join_type="full outer", left_suffix="_a", right_suffix="_b"
    )
    before, after = (
        pc.call_function("coalesce", [joined[f"fate_{side}"].cast(pa.string()), pa.scalar(ABSENT)])
        for side in "ab"
    )
    n_common = fates[0].num_rows + fates[1].num_rows - joined.num_rows
    if not n_common:
        raise PunaError(
            f"{first} and {second} have no document in common",
            "compare runs that read the same sources under the same names",
        )
    changed = pc.call_function("not_equal", [before, after])
    path = pc.call_function("coalesce", [joined["path_a"], joined["path_b"]])
    table = pa.table({"id": joined["id"], "path": path, "before": before, "after": after})
    moved = table.filter(changed).sort_by("id")
    counts: Counter[tuple[str, str]] = Counter()
    samples: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for batch in moved.to_batches():
        for row in batch.to_pylist():
            key = (row["before"], row["after"])
            counts[key] += 1
            if counts[key] <= SAMPLES:
                samples.setdefault(key, []).append((row["id"], row["path"]))
    changes = [Change(*key, n, samples[key]) for key, n in sorted(counts.items(), key=_by_count)]
    return RunDiff(
        fates[0].num_rows, fates[1].num_rows, table.num_rows - moved.num_rows, changes
    )  # fmt: skip


def _by_count(item: tuple[tuple[str, str], int]) -> tuple[int, tuple[str, str]]:
    return -item[1], item[0]


def _fates(run: Path) -> pa.Table:
    """Return id, path and fate of every document of a run, in no particular order."""
    artifacts = finished(run)
    last = list(artifacts)[-1]
    parts = []
    for stage, artifact in artifacts.items():
        parts += _rejected(stage, artifact)
        if stage == last:
            for shard in list_shards(artifact.path / DOCUMENTS_DIR):
                rows = read_columns(shard.path, ["id", "path"])
                parts.append(rows.append_column("fate", _constant(KEPT, rows.num_rows)))
    return pa.concat_tables([part.cast(_SCHEMA) for part in parts])


def _constant(text: str, n: int) -> pa.Array:
    return pa.array([text], pa.string()).take(pa.array([0] * n, pa.int32()))


def _rejected(stage: str, artifact: Artifact) -> list[pa.Table]:
    folder = artifact.path / REJECTED_DIR
    if not folder.is_dir():
        return []
    parts = []
    for shard in list_shards(folder):
        rows = read_columns(shard.path, ["id", "path", "reason"])
        fate = pc.call_function(
            "binary_join_element_wise",
            [pa.scalar(stage), rows["reason"].cast(pa.string()), pa.scalar(": ")],
        )
        parts.append(pa.table({"id": rows["id"], "path": rows["path"], "fate": fate}))
    return parts
