"""The relational steps of substring deduplication, as Ibis expressions.

Tables: *blocks* (node, key, hash_1, hash_2, start, n_windows, repeats), *runs* (key, hash_1,
hash_2, begin, end, first_place: where the windows ``begin`` to ``end`` of such blocks stand first),
*ranks* (node, rank: the order in which documents are the first).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis

from puna.data.dedup.relations import survivor_order
from puna.data.substrings.spans import PLACE

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.dedup.keep import Keep
    from puna.data.engine import Engine

KEY = ("key", "hash_1", "hash_2")


def documents_of_rows(rows: ir.Table) -> ir.Table:
    """Return the documents: node, shard, id, source, n_bytes, quality."""
    quality: Any = ibis.null("float64")
    if "quality" in rows.columns:
        number: Any = rows["quality"].cast("float64")
        quality = number.isnan().ifelse(ibis.null("float64"), number)  # NaN would come first
    return rows.select("node", "shard", "id", "source", "n_bytes", quality=quality)


def ranks_of(documents: ir.Table, keep: Keep) -> ir.Table:
    """Number the documents: those that keep their passages come first."""
    table = documents.mutate(is_known=ibis.literal(False))
    order = ibis.window(order_by=survivor_order(keep)[1:])
    return table.select("node", rank=ibis.row_number().over(order).cast("int64"))


def moved_last(ranks: ir.Table, rejected: ir.Table) -> ir.Table:
    """Return the ranks with the rejected documents behind all others, otherwise in this order."""
    table = ranks.left_join(rejected.select("node", "reason"), "node").drop("node_right")
    order = ibis.window(order_by=[table.reason.notnull(), table["rank"]])
    return table.select("node", rank=ibis.row_number().over(order).cast("int64"))


def blocks_of(engine: Engine, folder: Path) -> ir.Table:
    """Return the blocks, one a row."""
    rows = engine.read(folder)
    rows = rows.select("node", block=rows.blocks.unnest())
    names = (*KEY, "start", "n_windows", "repeats")
    return rows.select("node", **{name: rows.block[name] for name in names})


def several_of(blocks: ir.Table) -> ir.Table:
    """Return the fingerprints (key) that stand for more than one kind of block."""
    kinds = blocks.select(*KEY).distinct()
    counts = kinds.group_by("key").agg(n=kinds.count())
    return counts.filter(counts.n > 1).select("key")


def wanted_of(blocks: ir.Table, several: ir.Table, documents: ir.Table) -> ir.Table:
    """Return one block of each kind that must be compared, with the shard of its document."""
    table = blocks.semi_join(several, "key")
    table = table.group_by(*KEY).agg(
        place=(table.node * PLACE + table.start).min(), n_windows=table.n_windows.max()
    )
    table = with_document(table, "place").rename(node="place_doc", start="place_byte")
    shards = documents.select("node", "shard")
    return table.inner_join(shards, "node").select("shard", "node", "start", "n_windows", *KEY)


def with_document(table: ir.Table, place: str) -> ir.Table:
    """Append what a place consists of: ``<place>_doc`` and ``<place>_byte``."""
    at_byte = table[place] % PLACE
    document = ((table[place] - at_byte) / PLACE).cast("int64")  # exact: a multiple, below 2**53
    return table.mutate(**{f"{place}_byte": at_byte, f"{place}_doc": document})


def placed(blocks: ir.Table, ranks: ir.Table) -> ir.Table:
    """Append to blocks their place in the corpus, in the order of the ranks."""
    table = blocks.inner_join(ranks, "node")
    return table.mutate(place=table["rank"] * PLACE + table.start)


def firsts_of(blocks: ir.Table) -> ir.Table:
    """Return where each kind of block stands first."""
    return blocks.group_by(*KEY).agg(place=blocks.place.min(), n_windows=blocks.n_windows.max())


def texts_of_blocks(engine: Engine, folder: Path) -> ir.Table:
    """Return the bytes of the blocks that must be compared, one a row."""
    rows = engine.read(folder)
    rows = rows.select(one=rows.text.unnest())
    return rows.select(**{name: rows.one[name] for name in (*KEY, "bytes")})


def found_of(
    blocks: ir.Table, firsts: ir.Table, several: ir.Table, compared: ir.Table, size: int,
    *, within: bool,
) -> ir.Table:  # fmt: skip
    """Return the windows of blocks that stand somewhere before.

    Args:
        blocks: From :func:`placed`.
        firsts: From :func:`firsts_of`.
        several: From :func:`several_of`.
        compared: Runs of the blocks with such fingerprints.
        size: Bytes of a window.
        within: Before them in the same document counts, too.
    """
    alone = firsts.anti_join(several, "key")
    alone = alone.select(*KEY, begin=ibis.literal(0, "int64"), end="n_windows", first_place="place")
    table = blocks.inner_join(compared.select(*alone.columns).union(alone), list(KEY))
    if within:
        is_before = (table.first_place + size <= table.place + table.begin) | (table.repeats > 1)
    else:
        is_before = table.first_place < table["rank"] * PLACE
    return table.filter(is_before).select(
        "node", "place", "start", "n_windows", "repeats", "begin", "end", "first_place"
    )


def rejected_of(
    documents: ir.Table, spans: ir.Table, max_share: float, min_left_bytes: int
) -> ir.Table:
    """Return the documents of which too little is left: node, reason, value, threshold."""
    table = documents.inner_join(spans.select("node", "n_bytes_found"), "node")
    share = table.n_bytes_found.cast("float64") / table.n_bytes.cast("float64")
    table = table.mutate(share=share, left=table.n_bytes - table.n_bytes_found)
    is_most, is_short = table.share > max_share, table.left < min_left_bytes
    table = table.filter(is_most | is_short)
    return table.select(
        "node",
        reason=ibis.cases((is_most, "substring.mostly_duplicate"), else_="substring.emptied"),
        value=ibis.cases((is_most, table.share), else_=table.left.cast("float64")),
        threshold=ibis.cases((is_most, float(max_share)), else_=float(min_left_bytes)),
    )


def verdicts_of(documents: ir.Table, spans: ir.Table, rejected: ir.Table) -> ir.Table:
    """Return what the engine judges and cuts by, for every document."""
    verdicts = rejected.select(
        "node", substring_reason="reason", substring_value="value", substring_threshold="threshold"
    )
    table = documents.left_join(spans.select("node", "spans"), "node").drop("node_right")
    table = table.left_join(verdicts, "node")
    return table.select("shard", "id", "spans", *verdicts.columns[1:])
