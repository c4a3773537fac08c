"""Kernels of the stage: which part a document belongs to, and how often it is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from puna.data.engine.shards import VERDICT_FIELDS
from puna.data.quality.balance import draws
from puna.data.split import TRAIN, TokenCounter

if TYPE_CHECKING:
    import pyarrow as pa

    from puna.data.engine.base import Shard

SAMPLED_OUT = "compose.sampled_out"
NO_VALUE = "(none)"
"""Group of the documents whose column is null, or whose metadata lacks the key."""
METADATA_PREFIX = "metadata."


def group_values(batch: pa.RecordBatch, column: str) -> list[str]:
    """Return a column as text; ``metadata.KEY`` reads a key of the metadata.

    Args:
        batch: Documents.
        column: Name of the column, or ``metadata.`` and a key.
    """
    if column.startswith(METADATA_PREFIX):
        key = column.removeprefix(METADATA_PREFIX)
        rows = batch.column("metadata").to_pylist()
        values = [json.loads(row).get(key) for row in rows]
    else:
        values = batch.column(column).to_pylist()
    return [NO_VALUE if value is None else str(value) for value in values]


def read_by(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns of the table that :func:`group_values` reads for these."""
    names = ("metadata" if one.startswith(METADATA_PREFIX) else one for one in columns)
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class GroupKernel:
    """Finds the group, the part, the tokens and the random draw of every document.

    Attributes:
        by: Columns that make the groups.
        matches: Per rule the values that it names: (column, value) pairs. A document belongs to the
            first rule that fits, else to the part after the last.
        seed: Seed of the draws.
        draw_by: Column that is drawn for: ``id`` or ``cluster``.
        count: Counts tokens.
    """

    by: tuple[str, ...]
    matches: tuple[tuple[tuple[str, str], ...], ...]
    seed: int
    draw_by: str
    count: TokenCounter
    columns: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Read what the groups, the draw and the counter read."""
        names = ("split", self.draw_by, *read_by(self.by), *self.count.columns)
        object.__setattr__(self, "columns", tuple(dict.fromkeys(names)))

    def adds(self) -> pa.Schema:
        """Return the columns split_name, tokens, draw, part and group_0, group_1, ..."""
        import pyarrow as pa

        fixed = [("split_name", pa.string()), ("tokens", pa.int64()), ("draw", pa.float64()),
                 ("part", pa.int32())]  # fmt: skip
        groups = [(f"group_{index}", pa.string()) for index in range(len(self.by))]
        return pa.schema([pa.field(*one) for one in (*fixed, *groups)])

    def prepare(self) -> None:
        """Nothing to compile."""

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document."""
        import pyarrow as pa

        groups = {column: group_values(batch, column) for column in self.by}
        part = np.full(batch.num_rows, len(self.matches), np.int32)
        for index in reversed(range(len(self.matches))):
            fits = np.full(batch.num_rows, True)
            for column, value in self.matches[index]:
                fits &= np.array([one == value for one in groups[column]], bool)
            part[fits] = index
        arrays = [
            batch.column("split").to_pylist(),
            np.asarray(self.count(batch), np.int64),
            draws(batch.column(self.draw_by).to_pylist(), "compose", self.seed),
            part,
            *groups.values(),
        ]
        schema = self.adds()
        columns = [pa.array(one, f.type) for one, f in zip(arrays, schema, strict=True)]
        return pa.RecordBatch.from_arrays(columns, schema=schema)


@dataclass(frozen=True)
class ComposeKernel:
    """Keeps a training document as often as its part and its draw say; held-out ones once.

    Attributes:
        base: Per part, how often each document is read at least.
        threshold: Per part, the draw below which a document is read once more.
    """

    base: tuple[int, ...]
    threshold: tuple[float, ...]
    columns: tuple[str, ...] = field(default=("split", "part", "draw"), repr=False)

    def adds(self) -> pa.Schema:
        """Return the verdict columns and ``repeat`` (int32, 0 for what is dropped)."""
        import pyarrow as pa

        return pa.schema([*VERDICT_FIELDS, pa.field("repeat", pa.int32())])

    def prepare(self) -> None:
        """Nothing to compile."""

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one verdict per document."""
        import pyarrow as pa

        part = batch.column("part").to_numpy(zero_copy_only=False)
        draw = batch.column("draw").to_numpy(zero_copy_only=False)
        is_train = np.array([one == TRAIN for one in batch.column("split").to_pylist()], bool)
        limit = np.array(self.threshold, np.float64)[part]
        copies = np.array(self.base, np.int32)[part] + (draw < limit)
        repeat = np.where(is_train, copies, 1).astype(np.int32)
        kept = repeat > 0
        arrays = [
            pa.array(np.full(batch.num_rows, SAMPLED_OUT, object), pa.string(), mask=kept),
            pa.array(draw, pa.float64(), mask=kept),
            pa.array(limit, pa.float64(), mask=kept),
            pa.nulls(batch.num_rows, pa.string()),
            pa.array(repeat),
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())
