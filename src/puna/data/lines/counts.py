"""From counts per batch to the tables of the second pass, and back from a hash to its line."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.core.fsio import atomic_path
from puna.data.engine import Engine
from puna.data.engine.shards import list_shards, open_shard, read_batches
from puna.data.kernels.buffers import power_of_two, texts_from
from puna.data.lines.kernels import LineTable, fill_table
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
    rows = sorted(table.to_pylist(), key=lambda row: (-row["n"], row["key"]))
    holders = numbered_documents(documents, sorted({row["first"] for row in rows}))
    found = []
    for row in rows:
        identifier, content = holders[row["first"]]
        texts = texts_from([content])
        lines = rule.scan(texts, row["first"], np.ones(1, bool))
        unit, span = _find(lines, np.array([row["key"]], np.int64).view(np.uint64)[0])
        text = bytes(texts.data[slice(*span)])[:_TOP_BYTES].decode("utf-8", "ignore").strip()
        found.append({"text": text, "n": row["n"], "unit": unit, "first_id": identifier})
    return found


def _find(lines: LineTable, key: np.uint64) -> tuple[str, tuple[int, int]]:
    """Return what a key of a document is, and its bytes."""
    unit, place = "line", np.flatnonzero(lines.keys == key)[:1]
    if not len(place):
        unit, paragraph = "paragraph", np.flatnonzero(lines.paragraph_keys == key)[0]
        place = np.flatnonzero(lines.paragraphs == paragraph)
    return unit, (int(lines.starts[place[0]]), int(lines.starts[place[-1] + 1]))


def numbered_documents(folder: Path, nodes: list[int]) -> dict[int, tuple[str, str]]:
    """Read some documents by their number in the dataset: id and text. Row groups are read once."""
    found: dict[int, tuple[str, str]] = {}
    for shard in list_shards(folder):
        with contextlib.closing(open_shard(shard.path)) as file:
            first = shard.first_row
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                here = [node for node in nodes if first <= node < end]
                if here:
                    table = file.read_row_group(group, columns=["id", "text"])
                    rows = table.take([node - first for node in here]).to_pylist()
                    found |= {node: (row["id"], row["text"])
                              for node, row in zip(here, rows, strict=True)}  # fmt: skip
                first = end
    return found
