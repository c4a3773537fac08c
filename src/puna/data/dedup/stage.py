"""The steps of deduplication, from signatures to verdicts.

1. One pass over the text: hash of the normalised text, MinHash signature, LSH buckets.
2. Documents with equal text hashes form an exact group; its keeper stands for all. Keepers with
   equal signatures are linked at once; one of them stands for all in the buckets.
3. Buckets that several documents share are searched for pairs of signatures with a similarity of at
   least ``near`` or at least ``cluster``. No pair of a bucket is skipped, whatever its size.
4. Connected components of near links are groups: one document of each is kept. Connected components
   of all links are clusters: they go to one side of the train/held-out split.

Running the stage on its own output drops nothing: two kept documents that share a bucket have been
compared, and were less similar than ``near``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from puna.core.errors import PunaError
from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import before
from puna.data.engine import Engine, EngineConfig, open_engine
from puna.data.engine.base import ROWS_DIR
from puna.data.stagework import SCRATCH_DIR, WORK_DIR, documents_of, require_documents, step_metrics

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import pyarrow as pa

_N_PERMUTATIONS = 128


class DedupConfig(EngineConfig):
    """When two documents are the same, and which of them stays."""

    near: float = Field(default=0.8, gt=0, le=1)
    """Similarity of MinHash signatures from which documents are near-duplicates and one is kept."""
    cluster: float = Field(default=0.5, gt=0, le=1)
    """Similarity from which documents belong to one cluster (one side of the split)."""
    bands: int = Field(default=32, ge=1, le=128)
    """Bands of the 128 hash values; 32 bands of 4 find a pair of similarity 0.8 with probability
    1 - 5e-8, one of 0.5 with probability 0.87."""
    keep: Literal["longest", "smallest_id"] = "longest"
    """The document of a group that stays: the one with most bytes, then the smallest id; or the
    smallest id."""

    @model_validator(mode="after")
    def _consistent(self) -> DedupConfig:
        if _N_PERMUTATIONS % self.bands:
            raise ValueError(f"bands must divide {_N_PERMUTATIONS}, not {self.bands}")
        if self.cluster > self.near:
            raise ValueError(f"cluster ({self.cluster}) must not be above near ({self.near})")
        return self


@stage("data.dedup", needs={"documents": before("data.dedup")}, resumable=True)
def deduplicate(cfg: DedupConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Keep one of each group of exact and near-duplicates; name the cluster of every document.

    Writes ``documents/`` (with a column ``cluster``) and ``rejected/``, where ``detail`` is the id
    of the document that was kept. Memory beside the engine's: 64 bytes per document and link.
    """
    from puna.data.dedup.kernels import SignatureKernel, VerdictKernel

    started_s = time.monotonic()
    documents, work = documents_of(inputs["documents"]), out / WORK_DIR
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        signed = engine.annotate(
            "data.dedup: signatures", documents, work / "signatures", SignatureKernel(cfg.bands),
            carry=("n_bytes",),
        )  # fmt: skip
        require_documents(signed.rows_in, "data.dedup", "data.filter")
        signatures = engine.read(work / "signatures" / ROWS_DIR)
        _require_unique_ids(engine, signatures, signed.rows_in)
        nodes = _nodes(cfg, engine, signatures, work / "nodes")
        links = _links(cfg, engine, signatures, nodes, work / "links")
        groups, counts = _groups(cfg, engine, nodes, links, signed.rows_in)
        relation = engine.put(groups, work / "groups")
        engine.write(
            _verdicts(cfg, nodes, relation), work / "verdicts", order_by=["shard", "id"],
            n_shards=len(signed.shards),
        )  # fmt: skip
        manifest = engine.judge(
            "data.dedup", documents, out, VerdictKernel(extra=("cluster",)), side=work / "verdicts"
        )
    remove_tree(work)
    return {**step_metrics(manifest, started_s, events), **counts}


def _require_unique_ids(engine: Engine, signatures: ir.Table, n_rows: int) -> None:
    n_ids = engine.count(signatures.select("id").distinct())
    if n_ids != n_rows:
        raise PunaError(
            f"data.dedup: {n_rows - n_ids} of {n_rows} documents have the id of another document",
            "give every source its own name and list no file twice, then run data.ingest again",
        )


def _rule(cfg: DedupConfig) -> list[Any]:
    """Return the order in which the members of a group come; the first one stays."""
    import ibis

    return [ibis.desc("n_bytes"), ibis.asc("id")] if cfg.keep == "longest" else [ibis.asc("id")]


def _nodes(cfg: DedupConfig, engine: Engine, signatures: ir.Table, folder: Path) -> ir.Table:
    """Find what stands for each document: its exact keeper, and the first with its signature."""
    import ibis

    narrow = signatures.select("node", "shard", "id", "n_bytes", "text_hash", "signature_hash")
    same_text = ibis.window(group_by="text_hash", order_by=_rule(cfg))
    exact = narrow.mutate(exact_node=narrow.node.first().over(same_text))
    keepers = exact.filter(exact.node == exact.exact_node)
    same_signature = ibis.window(group_by="signature_hash")
    first = keepers.mutate(first_node=keepers.node.min().over(same_signature))
    nodes = exact.left_join(first.select("node", "first_node"), "node").select(
        "node", "shard", "id", "n_bytes", "exact_node", "first_node"
    )
    engine.write(nodes, folder, order_by=["node"])
    return engine.read(folder)


def _links(
    cfg: DedupConfig, engine: Engine, signatures: ir.Table, nodes: ir.Table, folder: Path
) -> ir.Table:
    """Find the similar pairs among the documents that stand for others."""
    from puna.data.dedup.kernels import LinkKernel

    first = nodes.filter(nodes.first_node == nodes.node).select("node")
    buckets = signatures.select("node", bucket=signatures.buckets.unnest())
    buckets = buckets.semi_join(first, "node")
    shared = buckets.group_by("bucket").agg(n_members=buckets.count())
    shared = shared.filter(shared.n_members > 1)
    members = buckets.semi_join(shared, "bucket").inner_join(
        signatures.select("node", "signature"), "node"
    )
    return engine.groups(
        members.select("bucket", "node", "signature"), folder,
        LinkKernel(cfg.bands, cfg.near, cfg.cluster), by="bucket", order_by=["node"],
    )  # fmt: skip


def _groups(
    cfg: DedupConfig, engine: Engine, nodes: ir.Table, links: ir.Table, n_nodes: int
) -> tuple[pa.Table, dict[str, Any]]:
    """Join linked documents to groups and clusters (union-find).

    Returns:
        A table of node, group, cluster (both named by their smallest node) and similarity (of the
        node's strongest link), and counts for the metrics.
    """
    import pyarrow as pa

    from puna.data.kernels.components import components, strongest_links

    table = engine.collect(nodes.select("node", "exact_node", "first_node"), ["node"])
    node = table["node"].to_numpy()
    exact = np.stack([table["exact_node"].to_numpy(), node], 1)
    first = np.stack([table["first_node"].fill_null(-1).to_numpy(), node], 1)
    exact, first = exact[exact[:, 0] != node], first[(first[:, 0] != node) & (first[:, 0] >= 0)]
    found = engine.collect(links, ["a", "b"])
    pairs = np.stack([found["a"].to_numpy(), found["b"].to_numpy()], 1)
    similarities = np.concatenate([found["similarity"].to_numpy(), np.ones(len(first))])
    pairs = np.concatenate([pairs, first])
    is_near = similarities >= cfg.near
    groups = components(n_nodes, np.concatenate([pairs[is_near], exact]))
    clusters = components(n_nodes, np.concatenate([pairs, exact]))
    strongest = strongest_links(n_nodes, pairs[is_near], similarities[is_near])
    columns = {"node": node, "group": groups, "cluster": clusters, "similarity": strongest}
    counts = {"n_links": len(pairs), "n_near_links": int(is_near.sum()),
              "groups": _sizes(groups), "clusters": _sizes(clusters)}  # fmt: skip
    return pa.table(columns), counts


def _sizes(roots: np.ndarray) -> dict[str, Any]:
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


def _verdicts(cfg: DedupConfig, nodes: ir.Table, groups: ir.Table) -> ir.Table:
    """Choose the keeper of each group and give every other document its reason."""
    import ibis

    table = nodes.inner_join(groups, "node").select(
        "node", "shard", "id", "n_bytes", "exact_node", "group", "cluster", "similarity"
    )
    table = table.mutate(
        keeper=table.id.first().over(ibis.window(group_by="group", order_by=_rule(cfg))),
        cluster_id=table.id.min().over(ibis.window(group_by="cluster")),
    )
    kept, exact = table.id == table.keeper, table.node != table.exact_node
    nothing = ibis.null("float64")
    return table.select(
        "shard",
        "id",
        reason=ibis.cases(
            (kept, ibis.null("string")), (exact, "duplicate.exact"), else_="duplicate.near"
        ),
        value=ibis.cases((kept, nothing), (exact, 1.0), else_=table.similarity),
        threshold=ibis.cases((kept, nothing), (exact, 1.0), else_=cfg.near),
        detail=ibis.cases((kept, ibis.null("string")), else_=table.keeper),
        cluster=table.cluster_id,
    )
