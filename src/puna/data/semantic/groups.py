"""From embeddings to clusters, and from links to groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from puna.data.dedup.groups import sizes_of
from puna.data.engine.base import ROWS_DIR
from puna.data.kernels.components import components, strongest_links
from puna.data.semantic.clusters import k_means
from puna.data.semantic.kernels import AssignKernel, embedding_matrix

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.engine import Engine
    from puna.data.semantic.stage import SemanticConfig

_SPLITS = 3
"""Rounds in which clusters that are too large are split (ours)."""


def assign_clusters(
    engine: Engine, cfg: SemanticConfig, rows: ir.Table, first: ir.Table, folders: list[Path],
    work: Path,
) -> tuple[ir.Table, dict[str, Any]]:  # fmt: skip
    """Find the clusters of all documents.

    A cluster with more than ``max_cluster`` documents is replaced by clusters of its own documents;
    after three rounds what is still larger stays as it is.

    Args:
        engine: The engine.
        cfg: The stage's configuration.
        rows: Embeddings of this run and of indexes.
        first: Columns node, first_node; those with one embedding are compared once.
        folders: Folders of the rows.
        work: Gets the result.

    Returns:
        Columns node, clusters; and counts for the metrics.
    """
    from puna.data.semantic.stage import CLUSTER_DOCS

    ones = rows.semi_join(first.filter(first.node == first.first_node), "node")
    n_docs = engine.count(ones)
    n_clusters = cfg.clusters or -(-n_docs // CLUSTER_DOCS)
    centroids = _centroids(engine, cfg, ones, max(n_clusters, 1))
    for round_ in range(_SPLITS + 1):
        assigned = _assigned(engine, cfg, centroids, folders, work / f"clusters-{round_}")
        taking_part = assigned.semi_join(ones, "node")
        each = taking_part.select("node", cluster=taking_part.clusters.unnest())
        counted = engine.collect(each.group_by("cluster").agg(n=each.count()), ["cluster"])
        sizes = np.zeros(len(centroids), np.int64)
        sizes[counted["cluster"].to_numpy()] = counted["n"].to_numpy()
        large = np.flatnonzero(sizes > cfg.max_cluster)
        if len(large) == 0 or round_ == _SPLITS:
            break
        parts = [np.delete(centroids, large, axis=0)]
        for cluster in large:
            inside = ones.semi_join(each.filter(each.cluster == int(cluster)), "node")
            n_parts = int(-(-2 * sizes[cluster] // cfg.max_cluster))
            parts.append(_centroids(engine, cfg, inside, n_parts))
        split = np.unique(np.concatenate(parts), axis=0)
        if len(split) == len(centroids):
            break  # its documents are too much alike
        centroids = split
    counts = {"n_clusters": len(centroids), "largest_cluster": int(sizes.max(initial=0))}
    return assigned, counts


def _centroids(engine: Engine, cfg: SemanticConfig, rows: ir.Table, n_clusters: int) -> np.ndarray:
    """Cluster a sample: the rows with the smallest ids, which are hashes."""
    n = n_clusters * cfg.sample_per_cluster
    sample = rows.select("id", "node", "embedding").order_by(["id", "node"]).limit(n)
    vectors = embedding_matrix(engine.collect(sample, ["id", "node"])["embedding"])
    return k_means(vectors, n_clusters, seed=cfg.seed, n_iterations=cfg.iterations)


def _assigned(
    engine: Engine, cfg: SemanticConfig, centroids: np.ndarray, folders: list[Path], work: Path
) -> ir.Table:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "centroids.npy"
    np.save(path, centroids)
    kernel = AssignKernel(xxhash.xxh3_128_hexdigest(centroids.tobytes()), cfg.probes, path)
    tables = []
    for number, folder in enumerate(folders):
        out = work / f"rows-{number}"
        engine.annotate("data.semantic: clusters", folder, out, kernel, carry=("node",))
        tables.append(engine.read(out / ROWS_DIR).select("node", "clusters"))
    first, *others = tables
    return first.union(*others) if others else first


def group_nodes(
    engine: Engine, first: ir.Table, links: ir.Table, n_nodes: int
) -> tuple[pa.Table, dict[str, Any]]:
    """Join linked documents to groups (union-find).

    Args:
        engine: The engine.
        first: Columns node, first_node.
        links: Columns a, b, cosine.
        n_nodes: Number of nodes; 16 bytes of memory each.

    Returns:
        A table of node, group (its smallest node) and link (cosine of the node's strongest link) of
        the groups with several members, and counts for the metrics.
    """
    same = engine.collect(first.filter(first.node != first.first_node), ["node"])
    equal = np.stack([same["first_node"].to_numpy(), same["node"].to_numpy()], 1)
    found = engine.collect(links, ["a", "b", "cosine"])
    pairs = np.stack([found["a"].to_numpy(), found["b"].to_numpy()], 1)
    edges = np.concatenate([pairs, equal])
    likeness = np.concatenate([found["cosine"].to_numpy(), np.ones(len(equal))])
    groups = components(n_nodes, edges)
    strongest = strongest_links(n_nodes, edges, likeness)
    several = np.flatnonzero(np.bincount(groups, minlength=n_nodes)[groups] > 1)
    table = {"node": several, "group": groups[several], "link": strongest[several]}
    counts = {"n_links": len(edges), "groups": sizes_of(groups)}
    return pa.table(table), counts
