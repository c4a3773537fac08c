"""Ordered streams of Arrow batches: cut into shards, regrouped into whole groups.

Every engine hands its relational results through here, so that equal rows give equal files.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from puna.data.engine.shards import shard_writer
from puna.data.schema import shard_name

GROUP_ROWS = 262_144
"""Rows of complete groups that are handed to a group kernel at once (more for one large group)."""


def write_cut(folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> list[int]:
    """Write a stream that is ordered by its column ``shard`` as one file per shard seen.

    Args:
        folder: Where the shards go; the column ``shard`` is left out of them.
        schema: Columns of the batches.
        batches: The stream.

    Returns:
        The numbers of the shards written, ascending.
    """
    narrow = _narrow(schema)
    written: list[int] = []
    with contextlib.ExitStack() as stack:
        writer: Any = None
        for batch in batches:
            shards = batch.column("shard").to_numpy(zero_copy_only=False)
            rows = batch.select(narrow.names)
            starts = np.flatnonzero(np.diff(shards, prepend=written[-1] if written else -1))
            first = int(starts[0]) if len(starts) else len(shards)
            if first:
                writer.write(rows.slice(0, first))
            for start, end in itertools.pairwise([*starts, len(shards)]):
                index = int(shards[start])
                if written and index < written[-1]:
                    raise ValueError(f"shard {index} comes after shard {written[-1]}")
                stack.close()
                written.append(index)
                writer = stack.enter_context(shard_writer(folder / shard_name(index), narrow))
                writer.write(rows.slice(start, end - start))
    return written


def _narrow(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field for field in schema if field.name != "shard"])


def write_empty(folder: Path, schema: pa.Schema, indices: Iterable[int]) -> None:
    """Write the shards that got no row."""
    narrow = _narrow(schema)
    for index in indices:
        with shard_writer(folder / shard_name(index), narrow):
            pass


def whole_groups(batches: Iterable[pa.RecordBatch], by: str) -> Iterator[pa.Table]:
    """Regroup an ordered stream so that no group is torn between two tables."""
    pending: list[pa.RecordBatch] = []
    n_rows, enough = 0, GROUP_ROWS
    for batch in batches:
        pending.append(batch)
        n_rows += batch.num_rows
        if n_rows < enough:
            continue
        table = pa.Table.from_batches(pending).combine_chunks()
        key = table[by]
        cut = key.index(key[-1]).as_py()
        if cut:
            yield table.slice(0, cut)
        pending, n_rows = table.slice(cut).to_batches(), table.num_rows - cut
        enough = max(GROUP_ROWS, 2 * n_rows)  # a group that large is not looked at every time
    if n_rows:
        yield pa.Table.from_batches(pending).combine_chunks()
