"""From counts per batch to the tables of the second pass, and back from a hash to its line."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.core.fsio import atomic_path
from puna.data.engine import Engine
from puna.data.engine.shards import list_shards, open_shard, read_batches
from puna.data.kernels.buffers import power_of_two, texts_of
from puna.data.lines.kernels import fill_table
from puna.data.lines.passes import LineRule
from puna.data.lines.tokens import N_BUCKETS, log_distribution

if TYPE_CHECKING:
    import ibis.expr.types as ir

TOP_LINES = 50
"""Most frequent lines that are reported."""

_TOP_BYTES = 200
_STREAM_ROWS = 1 << 16


def write_frequent(
    engine: Engine, counts: ir.Table, max_count: int, folder: Path, tables: Path
) -> ir.Table:
    """Find the keys that occur more than ``max_count`` times and write their hash table.

    Args:
        engine: Adds the counts up.
        counts: Rows of :class:`puna.data.lines.passes.CountKernel`.
        max_count: Largest count that is not frequent.
        folder: Gets the frequent keys: key, n, first (number of the document where it comes first).
        tables: Gets ``keys.npy`` and ``firsts.npy``.
    """
    lines = counts.select("node", line=counts.lines.unnest())
    lines = lines.select("node", key=lines.line["key"], n=lines.line["n"])
    sums = lines.group_by("key").agg(n=lines.n.sum(), first=lines.node.min())
    engine.write(sums.filter(sums.n > max_count), folder, order_by=["key"])
    shards = list_shards(folder)
    size = int(power_of_two(2 * sum(shard.n_rows for shard in shards) + 2))
    with atomic_path(tables / "keys.npy") as keys_at, atomic_path(tables / "firsts.npy") as used_at:
        table = np.lib.format.open_memmap(keys_at, "w+", np.uint64, (size,))
        used = np.lib.format.open_memmap(used_at, "w+", np.int64, (size,))
        for shard in shards:
            for batch in read_batches(shard.path, ["key", "first"], _STREAM_ROWS):
                fill_table(table, used, batch.column("key").to_numpy(),
                           batch.column("first").to_numpy())  # fmt: skip
        table.flush()
        used.flush()
    return engine.read(folder)


def write_tokens(engine: Engine, counts: ir.Table, tables: Path) -> list[str]:
    """Write the sources (``sources.npy``) and the logarithm of their distributions (``log_q.npy``).

    Returns:
        The sources whose tokens were counted.
    """
    rows = counts.select("source", token=counts.tokens.unnest())
    rows = rows.select("source", token=rows.token["token"], n=rows.token["n"])
    table = engine.collect(
        rows.group_by(["source", "token"]).agg(n=rows.n.sum()), ["source", "token"]
    )
    names, groups = np.unique(table["source"].to_numpy().astype(str), return_inverse=True)
    sums = np.zeros((len(names), N_BUCKETS), np.int64)
    sums[groups, table["token"].to_numpy()] = table["n"].to_numpy()
    for name, array in (("sources", names), ("log_q", log_distribution(sums))):
        with atomic_path(tables / f"{name}.npy") as path, path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    return names.tolist()


def top_lines(
    engine: Engine, frequent: ir.Table, documents: Path, rule: LineRule
) -> list[dict[str, Any]]:
    """Return the most frequent lines: text (at most 200 bytes), count, unit, an example document.

    Equal lines of different buckets are reported as one for each bucket.
    """
    import ibis

    order = [ibis.desc("n"), ibis.asc("key")]
    table = engine.collect(frequent.order_by(order).limit(TOP_LINES), ["n", "key"])
    shards = list_shards(documents)
    found = []
    for row in sorted(table.to_pylist(), key=lambda row: (-row["n"], row["key"])):
        shard = next(s for s in reversed(shards) if s.first_row <= row["first"] and s.n_rows)
        document = _row(shard.path, row["first"] - shard.first_row)
        texts = texts_of(document["text"])
        lines = rule.scan(texts, row["first"], np.ones(1, bool))
        key = np.array([row["key"]], np.int64).view(np.uint64)[0]
        place = np.flatnonzero(lines.keys == key)
        unit = "line" if len(place) else "paragraph"
        if not len(place):
            place = np.flatnonzero(lines.paragraphs == np.flatnonzero(lines.paragraph_keys == key))
        start, end = lines.starts[place[0]], lines.starts[place[-1 if unit != "line" else 0] + 1]
        text = bytes(texts.data[start:end])[:_TOP_BYTES].decode("utf-8", "ignore").strip()
        found.append({"text": text, "n": row["n"], "unit": unit,
                      "first_id": document["id"][0].as_py()})  # fmt: skip
    return found


def _row(path: Path, row: int) -> Any:
    """Read one row of a shard, and no row group but its own."""
    with contextlib.closing(open_shard(path)) as file:
        for group in range(file.num_row_groups):
            n = file.metadata.row_group(group).num_rows
            if row < n:
                return file.read_row_group(group, columns=["id", "text"]).slice(row, 1)
            row -= n
    raise IndexError(f"{path} has no such row")
