"""Semantic deduplication: documents that say the same in other words.

After SemDeDup (Abbas et al. 2023, arXiv:2303.09540), from its description:

1. One pass over the text: an embedding per document. The documents of indexes bring theirs.
2. Spherical k-means of a sample; every document goes to its `probes` nearest clusters.
3. Inside a cluster all pairs are compared; connected components of the pairs above the threshold
   are groups.
4. Of a group one document stays, or several, so that what is dropped is like what it is dropped for
   (the default; `chains` changes it).

All arithmetic behind the embeddings is exact (:mod:`puna.data.semantic.clusters`), so the result
does not depend on the number of workers or threads.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from puna.core.config import Execution, Seed
from puna.core.errors import PunaError
from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import before
from puna.data.dedup.keep import Keep
from puna.data.dedup.stage import (
    PAIRS_FILE,
    carried_columns,
    require_unique_ids,
    written,
)
from puna.data.engine import Engine, EngineConfig, open_engine
from puna.data.engine.base import ROWS_DIR
from puna.data.reasons import register_reasons
from puna.data.schema import shard_name
from puna.data.stagework import SCRATCH_DIR, WORK_DIR, documents_of, require_documents, step_metrics

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.semantic.index import SemanticIndex
    from puna.data.semantic.kernels import EmbedKernel

CLUSTER_DOCS = 10_000
"""Documents per cluster when the number of clusters is not given (ours): comparing all pairs of
20,000 (two probes) costs less than a static embedding of them."""

register_reasons(
    {
        "semantic_duplicate": "its embedding has a cosine of at least `threshold` with that of "
        "another document; the detail is the document that was kept",
    }
)


class SemanticConfig(EngineConfig):
    """When two documents say the same, and which of them stays."""

    embedder: str
    """Folder of the embedder: a static one (`puna data embedder distil`) or a sentence-transformers
    encoder."""
    digest: str | None = None
    """Digest that the embedder must have (it is among the stage's metrics); by default any."""
    device: Execution[str] = "auto"
    """Where an encoder runs: `cpu`, `cuda`, `mps`; `auto`: a GPU if there is one."""
    threshold: float = Field(default=0.95, gt=0, le=1)
    """Cosine from which two documents are duplicates. It depends on the embedder: see
    `puna data embedder threshold`."""
    passage_tokens: int = Field(default=256, ge=8)
    """Tokens of a passage; an encoder takes fewer if it was made for fewer."""
    passages: int = Field(default=4, ge=1)
    """Passages that are embedded, from the start of a document; its embedding is their mean. What
    comes behind is not looked at."""
    clusters: int = Field(default=0, ge=0)
    """Clusters of k-means; 0: one per 10,000 documents (ours). With one cluster all pairs of
    documents are compared."""
    probes: int = Field(default=2, ge=1)
    """Nearest clusters in which a document is compared; more find more pairs across borders."""
    sample_per_cluster: int = Field(default=100, ge=1)
    """Documents per cluster that k-means looks at."""
    iterations: int = Field(default=10, ge=1)
    """Iterations of k-means."""
    max_cluster: int = Field(default=100_000, ge=2)
    """Documents from which a cluster is split; memory is 5 bytes per dimension and document of the
    largest one."""
    chains: bool = False
    """Keep one document of a chain (a is like b and b like c, a and c are not); false: drop a
    document only for one that it is itself like."""
    keep: Keep = "quality"
    """The document of a group that stays: the one with the best `quality` (a column, when the
    documents have it), then the smallest id; the one with most bytes, then the smallest id; or the
    smallest id."""
    index: tuple[str, ...] = ()
    """Indexes of earlier runs (their data.semantic folders), made with the same embedder: documents
    that these have kept stay, and what says the same is dropped here."""
    write_index: bool = False
    """Write an index of what is kept, for later runs: a byte per dimension and document."""
    seed: Seed = 0
    """Seed of the start of k-means."""


def external_state(cfg: SemanticConfig) -> dict[str, Any]:
    """Tell what embedder and indexes are now, so that a rerun can say that they have changed."""
    from puna.data.semantic.embedder import digest_of
    from puna.data.semantic.index import read_record

    try:
        return {
            "embedder": digest_of(Path(cfg.embedder)),
            "index": [read_record(path)[1]["content"] for path in cfg.index],
        }
    except PunaError as error:
        return {"unavailable": error.message}


@stage(
    "data.semantic", needs={"documents": before("data.semantic")}, resumable=True,
    external_state=external_state,
)  # fmt: skip
def deduplicate_semantically(
    cfg: SemanticConfig, inputs: Artifacts, out: Path, events: Ledger
) -> Metrics:
    """Keep one of documents that say the same, by the cosine of their embeddings.

    Writes ``documents/``, ``rejected/``, where ``detail`` is the id of the document that was kept,
    and ``pairs.parquet``: kept_id, kept_source, dropped_id, dropped_source, cosine (of just these
    two) and value (that of the verdict).
    """
    from puna.data.dedup.kernels import VerdictKernel

    started_s = time.monotonic()
    documents, work = documents_of(inputs["documents"]), out / WORK_DIR
    kernel = _embed_kernel(cfg)
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        counts = _decide(cfg, engine, kernel, documents, out)
        manifest = engine.judge(
            "data.semantic", documents, out, VerdictKernel(), side=work / "verdicts"
        )
    remove_tree(work)
    return {**step_metrics(manifest, started_s, events), "digest": kernel.digest, **counts}


def _embed_kernel(cfg: SemanticConfig) -> EmbedKernel:
    """Find the embedder.

    Raises:
        PunaError: There is none, or it has another digest than it must have.
    """
    from puna.data.semantic.embedder import digest_of
    from puna.data.semantic.kernels import EmbedKernel
    from puna.data.semantic.passages import Passages

    digest = digest_of(Path(cfg.embedder))
    if cfg.digest not in (None, digest):
        raise PunaError(
            f"data.semantic: {cfg.embedder} has the digest {digest}, not {cfg.digest}",
            "give the right embedder, or correct `digest`",
        )
    cut = Passages(cfg.passage_tokens, cfg.passages)
    return EmbedKernel(digest, cut, cfg.embedder, cfg.device)


def _decide(
    cfg: SemanticConfig, engine: Engine, kernel: EmbedKernel, documents: Path, out: Path
) -> dict[str, Any]:
    """Compare all documents; write verdicts, ``pairs.parquet`` and the index; return counts."""
    from puna.data.semantic import relations
    from puna.data.semantic.groups import assign_clusters, group_nodes
    from puna.data.semantic.index import index_identity, open_indexes, write_index
    from puna.data.semantic.kernels import KeeperKernel, LinkKernel

    work = out / WORK_DIR
    carry = carried_columns(documents, "data.semantic")
    embedded = engine.annotate(
        "data.semantic: embeddings", documents, work / "embeddings", kernel, carry=carry
    )
    n_new = embedded.rows_in
    require_documents(n_new, "data.semantic", "the stage before it")
    folder = work / "embeddings" / ROWS_DIR
    require_unique_ids(engine, engine.read(folder), n_new, "data.semantic")
    identity = index_identity(kernel)
    indexes = open_indexes(engine, cfg.index, n_new, identity, work)
    rows = relations.read_nodes(engine, folder, is_known=False, has_quality="quality" in carry)
    for index in indexes:
        rows = rows.union(
            relations.read_nodes(engine, index.rows, is_known=True, has_quality=index.has_quality)
        )
    n_nodes = n_new + sum(index.n_docs for index in indexes)
    first = written(engine, relations.first_nodes(rows), work / "first", ["node"])
    folders = [folder, *(index.rows for index in indexes)]
    assigned, clusters = assign_clusters(engine, cfg, rows, first, folders, work)
    links = engine.groups(
        relations.members_of(rows, assigned, first), work / "links",
        LinkKernel(cfg.threshold, n_new), by="cluster", order_by=["node"],
    )  # fmt: skip
    table, counts = group_nodes(engine, first, links, n_nodes)
    groups = engine.put(table, work / "groups")
    chosen = engine.groups(
        relations.ranked(rows, groups, cfg.keep), work / "chosen",
        KeeperKernel(cfg.threshold, n_new, cfg.chains), by="group", order_by=["rank"],
    )  # fmt: skip
    decided = relations.decide(rows, groups, chosen, chains=cfg.chains)
    decided = written(engine, decided, work / "decided", ["node"])
    engine.write(
        relations.verdicts(decided, cfg.threshold), work / "verdicts", order_by=["shard", "id"],
        n_shards=len(embedded.shards),
    )  # fmt: skip
    if cfg.write_index:
        write_index(engine, rows, decided, documents, out, identity, has_quality="quality" in carry)
    return {**clusters, **counts, **_report(engine, decided, indexes, n_new, out)}


def _report(
    engine: Engine, decided: ir.Table, indexes: list[SemanticIndex], n_new: int, out: Path
) -> dict[str, Any]:
    """Write ``pairs.parquet``; return which sources lost how many documents to which."""
    from puna.data.semantic.relations import matches

    pairs = matches(decided)
    folder = out / WORK_DIR / "pairs"
    engine.write(pairs, folder, order_by=["kept_id", "dropped_id"])
    (folder / shard_name(0)).replace(out / PAIRS_FILE)
    by_sources = pairs.group_by("kept_source", "dropped_source").agg(docs=pairs.count())
    counted = engine.collect(by_sources, ["kept_source", "dropped_source"]).to_pylist()
    n_known = engine.count(decided.filter(decided.keeper >= n_new)) if indexes else 0
    return {
        "dropped_for_index": n_known,
        "dropped_between": [
            {"kept": row["kept_source"], "dropped": row["dropped_source"], "docs": row["docs"]}
            for row in counted
        ],
    }
