"""From links between documents to groups (one is kept) and clusters (one side of the split)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from puna.data.kernels.components import components, strongest_links
from puna.data.kernels.jaccard import Sets, direct_keepers, similarities

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.engine import Engine


def group_nodes(
    engine: Engine, nodes: ir.Table, links: ir.Table, n_nodes: int, near: float, sets: Sets
) -> tuple[pa.Table, dict[str, Any]]:
    """Join linked documents to groups and clusters (union-find).

    Args:
        engine: The engine.
        nodes: Columns node, lost_to, exact_node, first_node.
        links: Columns a, b, similarity.
        n_nodes: Number of nodes.
        near: Similarity from which a link joins a group.
        sets: Shingles of the nodes; without them, equal signatures count as similarity 1.

    Returns:
        A table of node, group, cluster (both named by their smallest node) and similarity (of the
        node's strongest link), and counts for the metrics.
    """
    table = engine.collect(nodes.select("node", "lost_to", "exact_node", "first_node"), ["node"])
    same = np.concatenate([_edges(table, "lost_to"), _edges(table, "exact_node")])
    first = _edges(table, "first_node")
    alike = similarities(first, sets) if len(sets.starts) > 1 else np.ones(len(first))
    found = engine.collect(links, ["a", "b"])
    pairs = np.stack([found["a"].to_numpy(), found["b"].to_numpy()], 1)
    likeness = found["similarity"].to_numpy()
    is_near = likeness >= near
    near_pairs = np.concatenate([pairs[is_near], first])
    groups = components(n_nodes, np.concatenate([near_pairs, same]))
    clusters = components(n_nodes, np.concatenate([pairs, first, same]))
    strongest = strongest_links(n_nodes, near_pairs, np.concatenate([likeness[is_near], alike]))
    columns = {"node": table["node"], "group": groups, "cluster": clusters, "similarity": strongest}
    counts = {"n_links": len(pairs) + len(first), "n_near_links": len(near_pairs),
              "groups": sizes_of(groups), "clusters": sizes_of(clusters)}  # fmt: skip
    return pa.table(columns), counts


def cut_chains(
    engine: Engine, ranked: ir.Table, nodes: ir.Table, groups: pa.Table, sets: Sets, *,
    near: float, n_new: int,
) -> pa.Table:  # fmt: skip
    """Choose keepers so that each dropped document is itself near to the one that is kept for it.

    Args:
        engine: The engine.
        ranked: Columns node, group, rank: the documents that stand for a text.
        nodes: Columns node, lost_to, exact_node.
        groups: Result of :func:`group_nodes`.
        sets: Shingles of the nodes.
        near: Similarity of near-duplicates.
        n_new: Nodes from this one on are of an index.

    Returns:
        ``groups`` with a column ``keeper``; the similarity is that of a node and its keeper.
    """
    members = engine.collect(ranked, ["group", "rank"])
    member = members["node"].to_numpy()
    kept_for, found = direct_keepers(
        member, members["group"].to_numpy(), sets, near=near, n_new=n_new
    )
    table = engine.collect(nodes.select("node", "lost_to", "exact_node"), ["node"])
    node = table["node"].to_numpy()
    stands = table["lost_to"].combine_chunks().fill_null(table["exact_node"].combine_chunks())
    keeper = stands.to_numpy()
    for _ in range(2):  # lost to a document that is lost by its id, which has the text of another
        keeper = keeper[keeper]
    similarity, chosen = np.zeros(len(node)), node.copy()
    chosen[member], similarity[member] = kept_for, found
    columns = {"keeper": chosen[keeper], "similarity": similarity}
    return pa.table({**{name: groups[name] for name in ("node", "group", "cluster")}, **columns})


def _edges(table: pa.Table, name: str) -> np.ndarray:
    """Return the pairs (what stands for a node, node) of the nodes that do not stand alone."""
    node = table["node"].to_numpy()
    other = table[name].fill_null(-1).to_numpy()
    return np.stack([other, node], 1)[(other >= 0) & (other != node)]


def sizes_of(roots: np.ndarray) -> dict[str, Any]:
    """Count components: all, those with several members, the largest, and a histogram of sizes."""
    sizes = np.unique(roots, return_counts=True)[1]
    histogram: dict[str, int] = {}
    low = 2
    while low <= sizes.max(initial=0):
        n = int(((sizes >= low) & (sizes < 2 * low)).sum())
        histogram[f"{low}-{2 * low - 1}"] = n
        low *= 2
    several = sizes[sizes > 1]
    return {"n": len(sizes), "n_with_several": len(several), "largest": int(sizes.max(initial=0)),
            "docs_in_several": int(several.sum()), "sizes": histogram}  # fmt: skip
