"""The steps of deduplication, from signatures to verdicts.

1. One pass over the text: hash of the normalised text and of the normalised URL, MinHash signature,
   LSH buckets. The documents of indexes bring theirs with them.
2. Of documents with one URL (or an id that an index has) one stays; the others play no further
   part. Documents with equal text hashes form an exact group; its keeper stands for all. Keepers
   with equal signatures are linked at once; one of them stands for all in the buckets.
3. Buckets that several documents share are searched for pairs of signatures with a similarity of at
   least ``near`` or at least ``cluster``. No pair of a bucket is skipped, whatever its size. What
   may be near is verified: the exact Jaccard similarity of the two sets of word 5-grams decides.
4. Connected components of near links are groups: one document of each is kept (or several, so that
   what is dropped is near to what it is dropped for, when ``chains`` is off). Connected components
   of all links are clusters: they go to one side of the train/held-out split.

Running the stage on its own output drops nothing: two kept documents that share a bucket have been
compared, and were less similar than ``near``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from puna.core.errors import PunaError
from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import before
from puna.data.dedup.keep import Keep
from puna.data.engine import Engine, EngineConfig, open_engine
from puna.data.engine.base import ROWS_DIR
from puna.data.run_index import INDEX_DIR
from puna.data.schema import DOCUMENTS_DIR, shard_name
from puna.data.stagework import SCRATCH_DIR, WORK_DIR, documents_of, require_documents, step_metrics

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.dedup.index import Index

_N_PERMUTATIONS = 128
PAIRS_FILE = "pairs.parquet"


class DedupConfig(EngineConfig):
    """When two documents are the same, and which of them stays."""

    near: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of the word 5-grams from which documents are near-duplicates and one is
    kept."""
    cluster: float = Field(default=0.5, gt=0, le=1)
    """Similarity of signatures from which documents belong to one cluster (one side of the
    split)."""
    bands: int = Field(default=32, ge=1, le=128)
    """Bands of the 128 hash values; 32 bands of 4 find a pair of similarity 0.8 with probability
    1 - 5e-8, one of 0.5 with probability 0.87."""
    verify: bool = True
    """Compute the exact similarity of pairs whose signatures say that they may be near; without it,
    the estimate decides (standard error 0.035 at 0.8) and a pass over the texts is saved."""
    chains: bool = True
    """Keep one document of a chain of near-duplicates (a is near to b and b to c, a and c are
    not); false: drop a document only for one that it is itself near to."""
    urls: bool = True
    """Keep one of the documents whose URLs are two spellings of one address, whatever their
    texts."""
    url_field: str = Field(default="url", min_length=1)
    """Metadata that holds the URL; without it, the path counts if it is one."""
    keep: Keep = "quality"
    """The document of a group that stays: the one with the best `quality` (a column, when the
    documents have it), then the smallest id; the one with most bytes, then the smallest id; or the
    smallest id."""
    index: tuple[str, ...] = ()
    """Indexes of earlier runs (their data.dedup folders): documents that these have kept stay, and
    what duplicates them is dropped here."""
    write_index: bool = False
    """Write an index of what is kept, for later runs; about 600 bytes per document and half of the
    size of the text."""

    @model_validator(mode="after")
    def _consistent(self) -> DedupConfig:
        if _N_PERMUTATIONS % self.bands:
            raise ValueError(f"bands must divide {_N_PERMUTATIONS}, not {self.bands}")
        if self.cluster > self.near:
            raise ValueError(f"cluster ({self.cluster}) must not be above near ({self.near})")
        if not self.chains and not self.verify:
            raise ValueError("chains = false compares exact similarities: it needs verify = true")
        return self


def external_state(cfg: DedupConfig) -> dict[str, Any]:
    """Tell what the indexes hold now, so that a rerun can say that they have changed."""
    from puna.data.dedup.index import read_record

    try:
        return {"index": [read_record(path)[1]["content"] for path in cfg.index]}
    except PunaError as error:
        return {"unavailable": error.message}


@stage(
    "data.dedup", needs={"documents": before("data.dedup")}, resumable=True, schema_version=2,
    external_state=external_state,
)  # fmt: skip
def deduplicate(cfg: DedupConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Keep one of each group of exact and near-duplicates; name the cluster of every document.

    Writes ``documents/`` (with a column ``cluster``), ``rejected/``, where ``detail`` is the id of
    the document that was kept, and ``pairs.parquet``: kept_id, kept_source, dropped_id,
    dropped_source, reason, similarity (of just these two; null for one URL or id) and cluster.
    Memory beside the engine's: 100 bytes per document and link.
    """
    from puna.data.dedup.index import write_index
    from puna.data.dedup.kernels import VerdictKernel

    started_s = time.monotonic()
    documents, work = documents_of(inputs["documents"]), out / WORK_DIR
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        carry = carried_columns(documents, "data.dedup")
        counts = _decide(cfg, engine, documents, carry, out)
        manifest = engine.judge(
            "data.dedup", documents, out, VerdictKernel(extra=("cluster",)), side=work / "verdicts"
        )
        if cfg.write_index:
            url_field = cfg.url_field if cfg.urls else None
            write_index(engine, out / DOCUMENTS_DIR, out / INDEX_DIR, url_field, carry)
    remove_tree(work)
    return {**step_metrics(manifest, started_s, events), **counts}


def carried_columns(documents: Path, stage: str) -> list[str]:
    """Return the columns that the choice of a keeper depends on.

    Raises:
        PunaError: The quality is no number.
    """
    import pyarrow as pa

    from puna.data.engine.shards import list_shards
    from puna.data.engine.shardwork import open_schema

    schema = open_schema(list_shards(documents)[0].path)
    if "quality" not in schema.names:
        return ["source", "n_bytes"]
    kind = schema.field("quality").type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise PunaError(
            f"{stage}: the column 'quality' of {documents} holds {kind}, not numbers",
            "rename the column, or let it hold numbers",
        )
    return ["source", "n_bytes", "quality"]


def _decide(
    cfg: DedupConfig, engine: Engine, documents: Path, carry: list[str], out: Path
) -> dict[str, Any]:
    """Compare all documents; write the verdicts and ``pairs.parquet``; return counts."""
    from puna.data.dedup import relations
    from puna.data.dedup.groups import cut_chains, group_nodes
    from puna.data.dedup.index import open_indexes
    from puna.data.dedup.kernels import LinkKernel, SignatureKernel
    from puna.data.dedup.sets import open_store

    work = out / WORK_DIR
    url_field = cfg.url_field if cfg.urls else None
    signed = engine.annotate(
        "data.dedup: signatures", documents, work / "signatures",
        SignatureKernel(cfg.bands, url_field), carry=carry,
    )  # fmt: skip
    n_new = signed.rows_in
    require_documents(n_new, "data.dedup", "data.filter")
    require_unique_ids(engine, engine.read(work / "signatures" / ROWS_DIR), n_new, "data.dedup")
    indexes = open_indexes(engine, cfg.index, n_new, cfg.bands, work)
    rows = relations.read_nodes(
        engine, work / "signatures" / ROWS_DIR, is_known=False, has_quality="quality" in carry
    )
    for number, index in enumerate(indexes):
        folder = work / f"known-{number}" / ROWS_DIR
        rows = rows.union(
            relations.read_nodes(engine, folder, is_known=True, has_quality=index.has_quality)
        )
    nodes = relations.nodes_of(rows, cfg.keep, by_url=cfg.urls)
    nodes = written(engine, nodes, work / "nodes", ["node"])
    members = written(
        engine, relations.members_of(rows, nodes), work / "members", ["bucket", "node"]
    )
    sets = _write_sets(engine, documents, indexes, nodes, members, work) if cfg.verify else None
    kernel = LinkKernel(cfg.bands, cfg.near, cfg.cluster, n_new, sets)
    signatures = rows.select("node", "signature")
    links = engine.groups(
        members.inner_join(signatures, "node").select("bucket", "node", "signature"),
        work / "links", kernel, by="bucket", order_by=["node"],
    )  # fmt: skip
    n_nodes = n_new + sum(index.n_docs for index in indexes)
    groups, counts = group_nodes(engine, nodes, links, n_nodes, cfg.near, open_store(sets))
    relation = engine.put(groups, work / "groups")
    if not cfg.chains:
        ranked = relations.rank(nodes, relation, cfg.keep)
        groups = cut_chains(
            engine, ranked, nodes, groups, open_store(sets), near=cfg.near, n_new=n_new
        )
        relation = engine.put(groups, work / "keepers")
    decided = relations.decide(nodes, relation, cfg.keep)
    decided = written(engine, decided, work / "decided", ["node"])
    engine.write(
        relations.verdicts(decided, cfg.near), work / "verdicts", order_by=["shard", "id"],
        n_shards=len(signed.shards),
    )  # fmt: skip
    return {**counts, **_report(engine, decided, sets, n_new, out)}


def written(engine: Engine, relation: ir.Table, folder: Path, order_by: list[str]) -> ir.Table:
    """Compute a relation once, for several uses."""
    engine.write(relation, folder, order_by=order_by)
    return engine.read(folder)


def require_unique_ids(engine: Engine, rows: ir.Table, n_rows: int, stage: str) -> None:
    """Refuse documents that share an id.

    Raises:
        PunaError: Some do.
    """
    n_ids = engine.count(rows.select("id").distinct())
    if n_ids != n_rows:
        raise PunaError(
            f"{stage}: {n_rows - n_ids} of {n_rows} documents have the id of another document",
            "give every source its own name and list no file twice, then run data.ingest again",
        )


def _write_sets(
    engine: Engine,
    documents: Path,
    indexes: list[Index],
    nodes: ir.Table,
    members: ir.Table,
    work: Path,
) -> Path:
    """Write the shingles of the nodes that share a bucket or a signature; return their folder."""
    import xxhash

    from puna.data.dedup.sets import ShingleKernel, write_store

    alike = nodes.filter(nodes.first_node != nodes.node).select("node", "first_node")
    found = engine.collect(alike, ["node"])
    shared = engine.collect(members.select("node").distinct(), ["node"])["node"].to_numpy()
    parts = [shared, found["node"].to_numpy(), found["first_node"].to_numpy()]
    wanted = np.unique(np.concatenate(parts))
    path = work / "wanted.npy"
    np.save(path, wanted)
    kernel = ShingleKernel(path, xxhash.xxh3_128_hexdigest(wanted.data))
    engine.annotate("data.dedup: shingles", documents, work / "shingles", kernel)
    datasets: list[tuple[Path, np.ndarray | None]] = [(work / "shingles" / ROWS_DIR, None)]
    for index in indexes:
        start, stop = np.searchsorted(wanted, [index.first_node, index.first_node + index.n_docs])
        datasets.append((index.rows, wanted[start:stop] - index.first_node))
    write_store(work / "sets", datasets)
    return work / "sets"


def _report(
    engine: Engine, decided: ir.Table, sets: Path | None, n_new: int, out: Path
) -> dict[str, Any]:
    """Write ``pairs.parquet``; return which sources lost how many documents to which."""
    import pyarrow as pa

    from puna.data.dedup.relations import matches
    from puna.data.dedup.sets import open_store
    from puna.data.kernels.jaccard import similarities

    near = decided.filter(decided.reason == "duplicate.near").select("node", "keeper")
    found = engine.collect(near, ["node"])
    pairs = np.stack([found["node"].to_numpy(), found["keeper"].to_numpy()], 1)
    exact = pa.nulls(len(pairs), pa.float64())
    if sets is not None:
        exact = pa.array(similarities(pairs, open_store(sets)))
    work = out / WORK_DIR
    measured = engine.put(pa.table({"node": found["node"], "exact": exact}), work / "measured")
    report = matches(decided, measured)
    engine.write(report, work / "pairs", order_by=["kept_id", "dropped_id"])
    (work / "pairs" / shard_name(0)).replace(out / PAIRS_FILE)
    dropped = decided.filter(decided.reason.notnull())
    by_sources = dropped.group_by("keeper_source", "source").agg(docs=dropped.count())
    counted = engine.collect(by_sources, ["keeper_source", "source"]).to_pylist()
    n_known = engine.count(dropped.filter(dropped.keeper >= n_new))
    return {
        "dropped_for_index": n_known,
        "dropped_between": [
            {"kept": row["keeper_source"], "dropped": row["source"], "docs": row["docs"]}
            for row in counted
        ],
    }
