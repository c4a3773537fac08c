"""The data stages of a run as folders of shards: what a stage kept, rejected, and was given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from puna.core.artifact import Artifact
from puna.data.engine.base import Shard
from puna.data.engine.shards import list_shards, open_shard
from puna.data.engine.shardwork import open_schema
from puna.data.flow import finished
from puna.data.schema import DOCUMENTS_DIR, REJECTED_DIR

Place = Literal["kept", "rejected"]
PLACES: tuple[Place, ...] = ("kept", "rejected")


@dataclass(frozen=True)
class DataStage:
    """A finished data stage.

    Attributes:
        name: Of the stage.
        artifact: Its folder.
        shards: What it kept and what it rejected; a stage that rejects nothing has no shards there.
        given: The stage whose documents it read, None when these are not in the run.
    """

    name: str
    artifact: Artifact
    shards: dict[Place, list[Shard]]
    given: DataStage | None

    def columns(self, place: Place) -> list[str]:
        """Return the names of the columns; empty without shards."""
        shards = self.shards[place]
        return open_schema(shards[0].path).names if shards else []

    def tables(self, place: Place, columns: Sequence[str]) -> Iterator[tuple[Shard, int, pa.Table]]:
        """Yield a shard, its first row and the columns that exist, for each row group.

        Args:
            place: What was kept, or what was rejected.
            columns: Wanted columns; those that the stage does not have are left out.
        """
        for shard in self.shards[place]:
            yield from row_groups(shard, columns)


def row_groups(
    shard: Shard, columns: Sequence[str], wanted: set[int] | None = None
) -> Iterator[tuple[Shard, int, pa.Table]]:
    """Yield the row groups of a shard with their first rows.

    Args:
        shard: The file.
        columns: Wanted columns; those that it does not have are left out.
        wanted: Rows; groups without one of them are not read.
    """
    with open_shard(shard.path) as file:
        names = [name for name in columns if name in file.schema_arrow.names]
        first = 0
        for group in range(file.num_row_groups):
            n = file.metadata.row_group(group).num_rows
            if wanted is None or not wanted.isdisjoint(range(first, first + n)):
                yield shard, first, file.read_row_group(group, columns=names, use_threads=False)
            first += n


def open_run(run_dir: Path) -> list[DataStage]:
    """Open the finished data stages of a run, in their order.

    Raises:
        PunaError: There is no such run, no data stage of it is finished, or a shard is missing.
    """
    stages: list[DataStage] = []
    for name, artifact in finished(run_dir).items():
        shards: dict[Place, list[Shard]] = {"kept": list_shards(artifact.file(DOCUMENTS_DIR))}
        rejected = artifact.path / REJECTED_DIR
        shards["rejected"] = list_shards(rejected) if rejected.is_dir() else []
        read = artifact.record.get("inputs", {}).get("documents", {}).get("fingerprint")
        given = next((one for one in stages if one.artifact.fingerprint == read), None)
        stages.append(DataStage(name, artifact, shards, given))
    return stages


def unfinished(run_dir: Path, names: Sequence[str]) -> list[str]:
    """Name the stages that have begun and are not finished."""
    return [name for name in names if (run_dir / f"{name}.partial").is_dir()]
