"""The most frequent passages: what they say, how often, where they were left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash

from puna.data.engine import Engine
from puna.data.engine.shards import write_shard
from puna.data.lines.counts import numbered_documents
from puna.data.substrings.relations import with_document
from puna.data.substrings.spans import PLACE

if TYPE_CHECKING:
    import ibis.expr.types as ir

TOP_PASSAGES = 1000
"""Most frequent passages that are reported."""

_EXCERPT_BYTES = 200

_SCHEMA = pa.schema(
    [
        pa.field("hash", pa.string()),
        pa.field("occurrences", pa.int64()),
        pa.field("n_bytes", pa.int64()),
        pa.field("first_id", pa.string()),
        pa.field("excerpt", pa.string()),
    ]
)


def passages_of(spans: ir.Table) -> ir.Table:
    """Count the passages: first_place, n_bytes, n (copies that were found), example (a place)."""
    rows = spans.select("node", one=spans.passages.unnest())
    rows = rows.select("node", **{k: rows.one[k] for k in ("first_place", "n_bytes", "start")})
    return rows.group_by(["first_place", "n_bytes"]).agg(
        n=rows.count(), example=(rows.node * PLACE + rows.start).min()
    )


def write_passages(
    engine: Engine, passages: ir.Table, documents: ir.Table, ranks: ir.Table, folder: Path,
    path: Path,
) -> None:  # fmt: skip
    """Write the most frequent passages as Parquet: hash, occurrences, n_bytes, first_id, excerpt.

    Args:
        engine: Finds them.
        passages: From :func:`passages_of`, written.
        documents: Columns node and id.
        ranks: Rank of each document.
        folder: Documents that were read.
        path: The file.
    """
    import ibis

    order = [ibis.desc("n"), ibis.desc("n_bytes"), ibis.asc("first_place")]
    top = with_document(passages.order_by(order).limit(TOP_PASSAGES), "first_place")
    names = ranks.inner_join(documents.select("node", "id"), "node")
    names = names.select("id", first_place_doc="rank")
    table = engine.collect(top.inner_join(names, "first_place_doc"), ["first_place", "n_bytes"])
    rows = sorted(table.to_pylist(), key=lambda r: (-r["n"], -r["n_bytes"], r["first_place"]))
    places = [divmod(row["example"], PLACE) for row in rows]
    texts = numbered_documents(folder, sorted({node for node, _ in places}))
    found: list[dict[str, Any]] = []
    for row, (node, start) in zip(rows, places, strict=True):
        passage = texts[node][1].encode()[start : start + row["n_bytes"]]
        excerpt = _trimmed(passage).decode("utf-8", "ignore")
        found.append({"hash": xxhash.xxh3_128_hexdigest(passage), "occurrences": row["n"] + 1,
                      "n_bytes": row["n_bytes"], "first_id": row["id"],
                      "excerpt": excerpt})  # fmt: skip
    write_shard(path, pa.Table.from_pylist(found, _SCHEMA))


def _trimmed(passage: bytes) -> bytes:
    """Return the beginning of a passage without the rest of a character that was cut in two."""
    start = 0
    while start < len(passage) and passage[start] & 0xC0 == 0x80:
        start += 1
    return passage[start : start + _EXCERPT_BYTES]
