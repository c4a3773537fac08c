"""A seeded sample of documents that depends on their ids alone.

A document's rank is a hash of the seed and its id; the sample are the documents of the lowest
ranks. So it is the same for any number of shards and workers and any order, it is uniform, and the
samples of two stages of a run hold the same documents, as far as these are still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from puna.data.report.folders import PLACES, DataStage, Place, row_groups

TEXT_COLUMNS = ("id", "source", "path", "text", "language")


def ranks_of(ids: pa.ChunkedArray | pa.Array, seed: int) -> np.ndarray:
    """Return the ranks of documents: uint64 [n_docs]."""
    digest = xxhash.xxh3_64_intdigest
    ranks = (digest(one, seed) for one in ids.cast(pa.binary()).to_pylist())
    return np.fromiter(ranks, np.uint64, len(ids))


class Lowest:
    """Keeps the rows with the lowest keys of a stream of tables, in bounded memory.

    Args:
        n: Rows to keep.
        by: Columns that order them; together they must be unique, so that the result does not
            depend on the order of the stream.
    """

    def __init__(self, n: int, by: Sequence[str]) -> None:
        self._n, self._by = n, [(name, "ascending") for name in by]
        self._tables: list[pa.Table] = []
        self._n_rows = 0

    def add(self, table: pa.Table) -> None:
        """Take rows in."""
        if not table.num_rows:
            return
        self._tables.append(table)
        self._n_rows += table.num_rows
        if self._n_rows > 4 * self._n + 4096:
            self._tables = [self._cut()]
            self._n_rows = self._tables[0].num_rows

    def _cut(self) -> pa.Table:
        table = pa.concat_tables(self._tables, promote_options="default")
        return table.sort_by(self._by).slice(0, self._n).combine_chunks()

    def table(self) -> pa.Table | None:
        """Return the rows in the order of their keys; None when there was no row."""
        return self._cut() if self._tables else None


@dataclass(frozen=True)
class Sample:
    """Documents that came to a stage.

    Attributes:
        rows: In the order of rank: id, source, reason (null: kept), further columns; ``place``,
            ``shard`` and ``row`` tell where it is.
        n_docs: Documents that came to the stage.
    """

    rows: pa.Table
    n_docs: int

    @property
    def kept(self) -> np.ndarray:
        """Which documents the stage kept: bool [n]."""
        return np.asarray(self.rows["reason"].is_null())

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column, null as NaN: float64 [n]."""
        return self.rows[name].cast(pa.float64()).to_numpy()


def located(table: pa.Table, place: Place, shard: int, first_row: int) -> pa.Table:
    """Append to rows of a shard where they are: ``place``, ``shard``, ``row``."""
    n = table.num_rows
    table = table.append_column("place", pa.array([place] * n, pa.string()))
    table = table.append_column("shard", pa.array(np.full(n, shard), pa.int64()))
    return table.append_column("row", pa.array(np.arange(first_row, first_row + n), pa.int64()))


def draw(
    stage: DataStage, n: int, seed: int, *, columns: Sequence[str] = (),
    places: Sequence[Place] = PLACES,
) -> Sample | None:  # fmt: skip
    """Draw documents of those that came to a stage.

    Args:
        stage: The stage.
        n: Size of the sample.
        seed: Equal seeds draw the same documents.
        columns: Columns to read besides id and source, where the stage has them.
        places: Draw only of what was kept, or of what was rejected.

    Returns:
        The sample; None when no document came.
    """
    lowest, n_docs = Lowest(n, ("rank", "id")), 0
    for place in places:
        for shard, first, table in stage.tables(place, ["id", "source", "reason", *columns]):
            n_docs += table.num_rows
            ranked = table.append_column("rank", pa.array(ranks_of(table["id"], seed)))
            if "reason" not in ranked.column_names:
                reasons = pa.nulls(ranked.num_rows, pa.string())
                ranked = ranked.append_column("reason", reasons)
            lowest.add(located(ranked, place, shard.index, first))
    rows = lowest.table()
    return None if rows is None else Sample(rows, n_docs)


def texts_of_sample(stage: DataStage, sample: Sample) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Yield positions in the sample and the documents as the stage was given them.

    When the stage that gave them is not in the run, texts are read from the stage itself: as they
    were given for what it rejected, and as it left them for what it kept.

    Yields:
        int64 [n], and columns id, source, path, text, language (where there is one).
    """
    position = {one: index for index, one in enumerate(sample.rows["id"].to_pylist())}
    given = stage.given
    if given is not None:
        shards = {int(index) for index in sample.rows["shard"].unique().to_pylist()}
        for shard in given.shards["kept"]:  # a step keeps the shards of its input
            if shard.index in shards:
                yield from _chosen(row_groups(shard, TEXT_COLUMNS), position)
        return
    for place in PLACES:
        yield from _chosen(stage.tables(place, TEXT_COLUMNS), position)


def _chosen(tables: Any, position: dict[str, int]) -> Iterator[tuple[np.ndarray, pa.Table]]:
    for _, _, table in tables:
        ids = table["id"].to_pylist()
        rows = [row for row, one in enumerate(ids) if one in position]
        if rows:
            where = np.array([position[ids[row]] for row in rows], np.int64)
            yield where, table.take(pa.array(rows)).combine_chunks()
