"""The data stages of a run as folders of shards: what a stage kept, rejected, and was given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
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

    Raises:
        PunaError: The file is damaged.
    """
    with open_shard(shard.path) as file:
        names = [name for name in columns if name in file.schema_arrow.names]
        first = 0
        for group in range(file.num_row_groups):
            n = file.metadata.row_group(group).num_rows
            if wanted is None or not wanted.isdisjoint(range(first, first + n)):
                try:
                    table = file.read_row_group(group, columns=names, use_threads=False)
                except (pa.ArrowException, OSError) as error:
                    why = str(error).splitlines()[0]
                    raise PunaError(
                        f"{shard.path}: damaged Parquet file ({why})",
                        "remove the stage's folder and run the stage again",
                    ) from error
                yield shard, first, table
            first += n


def open_run(run_dir: Path, documents: Path | None = None) -> list[DataStage]:
    """Open the finished data stages of a run, in their order.

    Args:
        run_dir: Folder of the run.
        documents: Folder of the artifact that the run's first data stage read, for a run over the
            documents of another one.

    Raises:
        PunaError: There is no such run, no data stage of it is finished, a shard is missing, or
            no stage read the documents that are given.
    """
    known = [] if documents is None else [_open(Artifact(documents), [])]
    stages: list[DataStage] = []
    for artifact in finished(run_dir).values():
        stages.append(_open(artifact, [*known, *stages]))
    if known and not any(stage.given is known[0] for stage in stages):
        raise PunaError(
            f"{documents} is not what a data stage of {run_dir} read",
            "give the folder that `inputs` of its recipe names, as it was then",
        )
    return stages


def _open(artifact: Artifact, earlier: Sequence[DataStage]) -> DataStage:
    shards: dict[Place, list[Shard]] = {"kept": list_shards(artifact.file(DOCUMENTS_DIR))}
    rejected = artifact.path / REJECTED_DIR
    shards["rejected"] = list_shards(rejected) if rejected.is_dir() else []
    read = artifact.record.get("inputs", {}).get("documents", {}).get("fingerprint")
    given = next((one for one in earlier if one.artifact.fingerprint == read), None)
    return DataStage(artifact.stage, artifact, shards, given)


def unfinished(run_dir: Path, names: Sequence[str]) -> list[str]:
    """Name the stages that have begun and are not finished."""
    return [name for name in names if (run_dir / f"{name}.partial").is_dir()]
