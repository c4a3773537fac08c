"""The relational steps of semantic deduplication, as Ibis expressions.

A *node* is a document of this run or of an index; those of this run come first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis

from puna.data.dedup.keep import Keep
from puna.data.dedup.relations import survivor_order

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.engine import Engine

REASON = "semantic_duplicate"
_COLUMNS = ("node", "shard", "id", "source", "n_bytes", "quality", "is_known", "embedding_hash",
            "embedding")  # fmt: skip


def read_nodes(engine: Engine, folder: Path, *, is_known: bool, has_quality: bool) -> ir.Table:
    """Return the embeddings of this run or of an index, with the same columns."""
    rows = engine.read(folder)
    quality: Any = ibis.null("float64")
    if has_quality:
        number: Any = rows["quality"].cast("float64")
        quality = number.isnan().ifelse(ibis.null("float64"), number)  # NaN would come first
    return rows.mutate(quality=quality, is_known=ibis.literal(is_known)).select(*_COLUMNS)


def first_nodes(rows: ir.Table) -> ir.Table:
    """Return (node, first_node): the first node with the same embedding, if it has one."""
    some = rows.filter(rows.embedding_hash.notnull())
    same = ibis.window(group_by="embedding_hash")
    return some.mutate(first_node=some.node.min().over(same)).select("node", "first_node")


def members_of(rows: ir.Table, assigned: ir.Table, first: ir.Table) -> ir.Table:
    """Return the members (cluster, node, embedding) of clusters in which a new one has company.

    Args:
        rows: Result of :func:`read_nodes`.
        assigned: Columns node, clusters.
        first: Result of :func:`first_nodes`; documents with one embedding take part once.
    """
    ones = first.filter(first.node == first.first_node).select("node")
    members = assigned.select("node", cluster=assigned.clusters.unnest()).semi_join(ones, "node")
    members = members.inner_join(rows.select("node", "is_known", "embedding"), "node")
    shared = members.group_by("cluster").agg(
        n_members=members.count(), n_known=members.is_known.cast("int64").sum()
    )
    shared = shared.filter((shared.n_members > 1) & (shared.n_known < shared.n_members))
    return members.semi_join(shared, "cluster").select("cluster", "node", "embedding")


def ranked(rows: ir.Table, groups: ir.Table, keep: Keep) -> ir.Table:
    """Return the members (group, rank, node, embedding) of groups; rank 0 is the best.

    Args:
        rows: Result of :func:`read_nodes`.
        groups: Columns node, group; of groups with several members only.
        keep: Which document of a group is the best.
    """
    table = rows.inner_join(groups.select("node", "group"), "node")
    in_group = ibis.window(group_by="group", order_by=survivor_order(keep))
    table = table.mutate(rank=ibis.row_number().over(in_group))
    return table.select("group", "rank", "node", "embedding")


def decide(rows: ir.Table, groups: ir.Table, chosen: ir.Table, *, chains: bool) -> ir.Table:
    """Return what happens to every new document.

    Args:
        rows: Result of :func:`read_nodes`.
        groups: Columns node, group, link (cosine of the strongest link that joined it).
        chosen: Columns node, keeper, cosine.
        chains: One document stands for a whole group; the value of a verdict is then that link.
    """
    keepers = rows.select(keeper="node", kept_id="id", kept_source="source")
    found = chosen.filter(chosen.node != chosen.keeper).inner_join(keepers, "keeper")
    found = found.inner_join(groups.select("node", "link"), "node")
    found = found.mutate(value=found.link if chains else found.cosine)
    new = rows.filter(~rows.is_known).select("node", "shard", "id", "source")
    table = new.left_join(found, "node").drop("node_right")
    return table.select(
        "node", "shard", "id", "source", "keeper", "kept_id", "kept_source", "cosine", "value"
    )


def verdicts(decided: ir.Table, threshold: float) -> ir.Table:
    """Return what the engine judges by: reason, value, threshold, detail."""
    kept = decided.keeper.isnull()
    return decided.select(
        "shard",
        "id",
        reason=kept.ifelse(ibis.null("string"), ibis.literal(REASON)),
        value="value",
        threshold=kept.ifelse(ibis.null("float64"), ibis.literal(threshold, "float64")),
        detail="kept_id",
    )


def matches(decided: ir.Table) -> ir.Table:
    """Return what was dropped for what."""
    dropped = decided.filter(decided.keeper.notnull())
    return dropped.select(
        "kept_id", "kept_source", dropped_id="id", dropped_source="source", cosine="cosine",
        value="value",
    )  # fmt: skip
