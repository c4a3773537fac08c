"""The relational steps of deduplication, as Ibis expressions.

A *node* is a document of this run or of an index; those of this run come first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis

from puna.data.dedup.keep import Keep

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.engine import Engine

_NARROW = ("node", "shard", "id", "source", "n_bytes", "quality", "is_known")
_COMPARED = ("text_hash", "url_hash", "signature_hash", "signature", "buckets")


def read_nodes(engine: Engine, folder: Path, *, is_known: bool, has_quality: bool) -> ir.Table:
    """Return the rows of signatures, of this run or of an index, with the same columns."""
    rows = engine.read(folder)
    quality: Any = ibis.null("float64")
    if has_quality:
        number: Any = rows["quality"].cast("float64")
        quality = number.isnan().ifelse(ibis.null("float64"), number)  # NaN would come first
    rows = rows.mutate(quality=quality, is_known=ibis.literal(is_known))
    return rows.select(*_NARROW, *_COMPARED)


def survivor_order(keep: Keep) -> list[Any]:
    """Return the order in which the members of a group come; the first one stays."""
    best = {"quality": [ibis.desc("quality", nulls_first=False)], "longest": [ibis.desc("n_bytes")]}
    return [ibis.desc("is_known"), *best.get(keep, []), ibis.asc("id"), ibis.asc("node")]


def nodes_of(rows: ir.Table, keep: Keep, *, by_url: bool) -> ir.Table:
    """Find what stands for each document.

    Returns:
        Beside the columns of a node: ``lost_to`` and ``lost_as``, for a document that goes by its
        id or URL, whatever its text; for the others ``exact_node``, the keeper of their text; for
        these keepers ``first_node``, the first node with their signature.
    """
    narrow = rows.select(*_NARROW, "text_hash", "url_hash", "signature_hash")
    left = narrow.left_join(_lost(narrow, keep, by_url=by_url), "node")
    left = left.select(*narrow.columns, "lost_to", "lost_as")
    same_text = ibis.window(group_by="text_hash", order_by=survivor_order(keep))
    exact = left.filter(left.lost_to.isnull())
    exact = exact.mutate(exact_node=exact.node.first().over(same_text))
    keepers = exact.filter(exact.node == exact.exact_node)
    same_signature = ibis.window(group_by="signature_hash")
    first = keepers.mutate(first_node=keepers.node.min().over(same_signature))
    nodes = left.left_join(exact.select("node", "exact_node"), "node").drop("node_right")
    nodes = nodes.left_join(first.select("node", "first_node"), "node")
    return nodes.select(*_NARROW, "lost_to", "lost_as", "exact_node", "first_node")


def _lost(narrow: ir.Table, keep: Keep, *, by_url: bool) -> ir.Table:
    """Find the new documents whose id an index has, or whose URL a better document has."""
    known = narrow.filter(narrow.is_known).group_by("id").agg(lost_to=lambda t: t.node.min())
    new = narrow.filter(~narrow.is_known).select("id", "node")
    lost = new.inner_join(known, "id").select("node", "lost_to")
    lost = lost.mutate(lost_as=ibis.literal("duplicate.id"))
    if not by_url:
        return lost
    named = narrow.filter(narrow.url_hash.notnull())
    same_url = ibis.window(group_by="url_hash", order_by=survivor_order(keep))
    named = named.mutate(lost_to=named.node.first().over(same_url))
    named = named.filter((named.node != named.lost_to) & ~named.is_known)
    named = named.select("node", "lost_to").mutate(lost_as=ibis.literal("duplicate.url"))
    return lost.union(named.anti_join(lost, "node"))


def members_of(rows: ir.Table, nodes: ir.Table) -> ir.Table:
    """Return the members (bucket, node) of the buckets that a new document shares with another."""
    first = nodes.filter(nodes.first_node == nodes.node).select("node")
    buckets = rows.select("node", "is_known", bucket=rows.buckets.unnest()).semi_join(first, "node")
    shared = buckets.group_by("bucket").agg(
        n_members=buckets.count(), n_known=buckets.is_known.cast("int64").sum()
    )
    shared = shared.filter((shared.n_members > 1) & (shared.n_known < shared.n_members))
    return buckets.semi_join(shared, "bucket").select("bucket", "node")


def rank(nodes: ir.Table, groups: ir.Table, keep: Keep) -> ir.Table:
    """Return the order (node, group, rank) of the documents that stand for a text, in groups."""
    table = nodes.filter(nodes.exact_node == nodes.node).inner_join(groups, "node")
    in_group = ibis.window(group_by="group", order_by=survivor_order(keep))
    table = table.mutate(
        rank=ibis.row_number().over(in_group),
        n_members=table.node.count().over(ibis.window(group_by="group")),
    )
    return table.filter(table.n_members > 1).select("node", "group", "rank")


def decide(nodes: ir.Table, groups: ir.Table, keep: Keep) -> ir.Table:
    """Give every document that is not the keeper of its group its reason.

    A document that goes by its id or URL is never the keeper: what it goes for is of its group and
    comes before it.

    Args:
        nodes: Result of :func:`nodes_of`.
        groups: Columns node, group, cluster, similarity; with ``keeper`` when a group may keep
            several documents.
        keep: Which document of a group is the keeper, otherwise.
    """
    table = nodes.inner_join(groups, "node")
    if "keeper" not in groups.columns:
        in_group = ibis.window(group_by="group", order_by=survivor_order(keep))
        table = table.mutate(keeper=table.node.first().over(in_group))
    same_cluster = ibis.window(group_by="cluster")
    table = table.mutate(cluster_id=table.id.min().over(same_cluster))
    keepers = nodes.select(keeper="node", keeper_id="id", keeper_source="source")
    table = table.inner_join(keepers, "keeper")
    table = table.filter(~table.is_known)
    reason = ibis.cases(
        (table.node == table.keeper, ibis.null("string")),
        (table.lost_as.notnull(), table.lost_as),
        (table.node != table.exact_node, "duplicate.exact"),
        else_="duplicate.near",
    )
    return table.mutate(reason=reason).select(
        "node", "shard", "id", "source", "reason", "similarity", "keeper", "keeper_id",
        "keeper_source", "cluster_id",
    )  # fmt: skip


def verdicts(decided: ir.Table, near: float) -> ir.Table:
    """Return what the engine judges by: reason, value, threshold, detail, and the cluster."""
    kept, is_near = decided.reason.isnull(), decided.reason == "duplicate.near"
    nothing = ibis.null("float64")
    return decided.select(
        "shard",
        "id",
        "reason",
        value=ibis.cases((kept, nothing), (is_near, decided.similarity), else_=1.0),
        threshold=ibis.cases((kept, nothing), (is_near, near), else_=1.0),
        detail=ibis.cases((kept, ibis.null("string")), else_=decided.keeper_id),
        cluster=decided.cluster_id,
    )


def matches(decided: ir.Table, measured: ir.Table) -> ir.Table:
    """Return what was dropped for what.

    Args:
        decided: Result of :func:`decide`.
        measured: Columns node, exact (similarity of a near-duplicate and its keeper).
    """
    dropped = decided.filter(decided.reason.notnull()).left_join(measured, "node")
    return dropped.select(
        kept_id="keeper_id",
        kept_source="keeper_source",
        dropped_id="id",
        dropped_source="source",
        reason="reason",
        similarity=ibis.cases((dropped.reason == "duplicate.exact", 1.0), else_=dropped.exact),
        cluster="cluster_id",
    )
