"""Stage ``data.split``: token budgets per source, and a held-out part that nothing leaks into.

Both choices are prefixes of an order that a seeded hash of the id gives, so they are deterministic,
independent of workers and shards, and a larger budget keeps what a smaller one kept. The held-out
part is made of whole near-duplicate clusters: of two similar documents never one is trained on and
the other evaluated on (as far as the clusters of ``data.dedup`` tell).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import Field, model_validator

from puna.core.config import Seed
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

    from puna.data.engine.base import Shard

TRAIN, HELDOUT = "train", "heldout"
MAX_HELDOUT_SHARE = 0.5
"""No more of a source than this is held out, whatever the minimum asks for."""
LARGE_CLUSTER_SHARE = 0.25
"""Clusters above this share of the held-out target are held out only if there are no others."""


class SplitConfig(EngineConfig):
    """How much of each source is used, and how much of that is held out."""

    budget_tokens: dict[str, int] = Field(default_factory=dict)
    """Source -> tokens to use of it (by the estimate below); sources not named are used whole. The
    document in which the budget ends is kept."""
    bytes_per_token: float = Field(default=4.0, gt=0)
    """UTF-8 bytes per token, for the estimate of token counts before there is a tokenizer."""
    heldout_fraction: float = Field(default=0.02, ge=0, le=MAX_HELDOUT_SHARE)
    """Share of each source's tokens that is held out for evaluation."""
    heldout_min_tokens: int = Field(default=0, ge=0)
    """Hold out at least this many tokens of each source (but never more than half of it)."""
    heldout_max_tokens: int = Field(default=2**62, ge=0)
    """Hold out at most about this many tokens of each source."""
    seed: Seed = 0
    """Seed of the order in which documents and clusters are taken."""

    @model_validator(mode="after")
    def _consistent(self) -> SplitConfig:
        if self.heldout_min_tokens > self.heldout_max_tokens:
            raise ValueError(
                f"heldout_min_tokens ({self.heldout_min_tokens}) is above heldout_max_tokens "
                f"({self.heldout_max_tokens})"
            )
        for source, budget in self.budget_tokens.items():
            if budget < 1:
                raise ValueError(f"budget_tokens.{source} is {budget}: it must be at least 1")
        return self


class TokenCounter(Protocol):
    """Counts the tokens of documents; a frozen dataclass, since it travels to worker processes."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it reads."""
        ...

    def __call__(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return the number of tokens of each document, int64 [n_docs]."""
        ...


@dataclass(frozen=True)
class ByteEstimate:
    """Estimates tokens from bytes, without reading the text."""

    bytes_per_token: float
    columns: tuple[str, ...] = ("n_bytes",)

    def __call__(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return bytes divided by bytes per token, rounded up."""
        n_bytes = batch.column("n_bytes").to_numpy(zero_copy_only=False)
        return np.ceil(n_bytes / self.bytes_per_token).astype(np.int64)


@dataclass(frozen=True)
class OrderKernel:
    """Counts tokens and draws the place of each document and of its cluster."""

    seed: int
    count: TokenCounter
    columns: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Read what the counter reads."""
        object.__setattr__(self, "columns", ("cluster", *self.count.columns))

    def adds(self) -> pa.Schema:
        """Return the columns shard, n_tokens, place, cluster_place."""
        import pyarrow as pa

        names = ("n_tokens", "place", "cluster_place")
        return pa.schema([pa.field("shard", pa.int32()), *(pa.field(n, pa.int64()) for n in names)])

    def prepare(self) -> None:
        """Nothing to compile."""

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document."""
        import pyarrow as pa

        n = batch.num_rows
        arrays = [
            np.full(n, shard.index, np.int32),
            np.asarray(self.count(batch), np.int64),
            self._places("document", batch.column("id").to_pylist()),
            self._places("cluster", batch.column("cluster").to_pylist()),
        ]
        return pa.RecordBatch.from_arrays([pa.array(item) for item in arrays], schema=self.adds())

    def _places(self, what: str, names: list[str]) -> np.ndarray:
        import xxhash

        prefix = f"{self.seed}:{what}:"
        hashes = [xxhash.xxh3_64_intdigest(f"{prefix}{name}".encode()) >> 1 for name in names]
        return np.array(hashes, np.int64)


@stage("data.split", needs={"documents": before("data.split")}, resumable=True)
def split_documents(cfg: SplitConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Cut each source to its token budget and hold out whole clusters for evaluation.

    Writes ``documents/`` (with a column ``split``: ``train`` or ``heldout``) and ``rejected/``.
    """
    return split_folder(cfg, documents_of(inputs["documents"]), out, events)


def split_folder(
    cfg: SplitConfig, documents: Path, out: Path, events: Ledger, count: TokenCounter | None = None
) -> Metrics:
    """Do the work of :func:`split_documents` with any counter of tokens.

    Args:
        cfg: The configuration.
        documents: Folder of shards with a column ``cluster``.
        out: Stage folder.
        events: The run's ledger.
        count: Counts tokens; by default the estimate from bytes.

    Raises:
        PunaError: No documents, no clusters, or a budget for a source that is not there.
    """
    from puna.data.dedup.kernels import VerdictKernel

    started_s = time.monotonic()
    work = out / WORK_DIR
    _require_clusters(documents)
    kernel = OrderKernel(cfg.seed, count or ByteEstimate(cfg.bytes_per_token))
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        placed = engine.annotate(
            "data.split: order", documents, work / "order", kernel, carry=("source", "cluster")
        )
        require_documents(placed.rows_in, "data.split", "data.dedup")
        rows = engine.read(work / "order" / ROWS_DIR)
        totals = _totals(engine, rows)
        _check_sources(cfg, totals)
        budgeted = _budgeted(cfg, engine, rows, work / "budgeted")
        targets = {
            source: _heldout_target(cfg, n_tokens)
            for source, n_tokens in _totals(engine, budgeted.filter(budgeted.is_kept)).items()
        }
        heldout = _heldout_clusters(engine, budgeted, targets, work / "heldout")
        decided = _decided(budgeted, heldout)
        engine.write(
            decided.drop("source", "n_tokens"), work / "verdicts", order_by=["shard", "id"],
            n_shards=len(placed.shards),
        )  # fmt: skip
        splits = _split_counts(engine, decided)
        manifest = engine.judge(
            "data.split", documents, out, VerdictKernel(extra=("split",)), side=work / "verdicts"
        )
    remove_tree(work)
    return {
        **step_metrics(manifest, started_s, events),
        "bytes_per_token": cfg.bytes_per_token,
        "splits": splits,
    }


def _require_clusters(documents: Path) -> None:
    from puna.data.engine.shards import list_shards
    from puna.data.engine.shardwork import open_schema

    if "cluster" not in open_schema(list_shards(documents)[0].path).names:
        raise PunaError(
            f"the documents in {documents} have no column `cluster`",
            "let data.split read from data.dedup",
        )


def _totals(engine: Engine, rows: ir.Table) -> dict[str, int]:
    sums = engine.collect(rows.group_by("source").agg(n=rows.n_tokens.sum()), ["source"])
    return dict(zip(sums["source"].to_pylist(), sums["n"].to_pylist(), strict=True))


def _check_sources(cfg: SplitConfig, totals: Mapping[str, int]) -> None:
    unknown = sorted(set(cfg.budget_tokens) - set(totals))
    if unknown:
        raise PunaError(
            f"data.split.budget_tokens names the source {unknown[0]!r}, of which there are no "
            "documents",
            f"sources that have documents: {', '.join(totals)}",
        )


def _heldout_target(cfg: SplitConfig, n_tokens: int) -> int:
    """Return the tokens to hold out of a source that has ``n_tokens``."""
    if cfg.heldout_fraction == 0 and cfg.heldout_min_tokens == 0:
        return 0
    wanted = max(int(n_tokens * cfg.heldout_fraction), cfg.heldout_min_tokens, 1)
    return min(wanted, cfg.heldout_max_tokens, int(n_tokens * MAX_HELDOUT_SHARE))


def _by_source(table: ir.Table, column: str, values: Mapping[str, int]) -> Any:
    """Return an expression that looks up a number per source; null for sources without one."""
    import ibis

    nothing = ibis.null("int64")
    branches = [(table[column] == source, number) for source, number in sorted(values.items())]
    return ibis.cases(*branches, else_=nothing) if branches else nothing


def _running(table: ir.Table, group_by: str, order_by: list[str]) -> Any:
    """Return the sum of ``n_tokens`` over the rows of the group that come before a row."""
    import ibis

    window = ibis.window(group_by=group_by, order_by=order_by, rows=(None, 0))
    return table.n_tokens.sum().over(window) - table.n_tokens


def _budgeted(cfg: SplitConfig, engine: Engine, rows: ir.Table, folder: Path) -> ir.Table:
    """Keep, per source, documents in the order of their places until the budget is used up."""
    table = rows.mutate(
        before=_running(rows, "source", ["place", "id"]),
        budget=_by_source(rows, "source", cfg.budget_tokens),
    )
    table = table.mutate(is_kept=table.budget.isnull() | (table.before < table.budget))
    engine.write(table, folder, order_by=["shard", "id"])
    return engine.read(folder)


def _heldout_clusters(
    engine: Engine, budgeted: ir.Table, targets: Mapping[str, int], folder: Path
) -> ir.Table:
    """Choose whole clusters until each source's target is reached.

    A cluster counts for the source from which most of its tokens come. Small ones come first, in
    the order of their places; at least one cluster of a source stays for training.
    """
    import ibis

    kept = budgeted.filter(budgeted.is_kept)
    parts = kept.group_by("cluster", "source").agg(
        n_tokens=kept.n_tokens.sum(), place=kept.cluster_place.min()
    )
    whole = ibis.window(group_by="cluster")
    order = ibis.window(group_by="cluster", order_by=[ibis.desc("n_tokens"), ibis.asc("source")])
    parts = parts.mutate(home=parts.source.first().over(order), n=parts.n_tokens.sum().over(whole))
    clusters = parts.filter(parts.home == parts.source)
    clusters = clusters.select("cluster", "place", "home", n_tokens="n")
    clusters = clusters.mutate(target=_by_source(clusters, "home", targets))
    clusters = clusters.mutate(
        excess=ibis.greatest(
            clusters.n_tokens - (clusters.target * LARGE_CLUSTER_SHARE).floor().cast("int64"), 0
        )
    )
    keys = ["excess", "place", "cluster"]
    numbered = clusters.mutate(
        before=_running(clusters, "home", keys),
        rank=ibis.row_number().over(ibis.window(group_by="home", order_by=keys)),
        n_clusters=clusters.count().over(ibis.window(group_by="home")),
    )
    chosen = numbered.filter(
        (numbered.before < numbered.target) & (numbered.rank < numbered.n_clusters - 1)
    )
    engine.write(chosen.select("cluster", "home"), folder, order_by=["cluster"])
    return engine.read(folder)


def _decided(budgeted: ir.Table, heldout: ir.Table) -> ir.Table:
    """Give every document its split, or its reason."""
    import ibis

    table = budgeted.left_join(heldout, "cluster").select(
        "shard", "id", "source", "n_tokens", "is_kept", "before", "budget", "home"
    )
    no_text, no_number = ibis.null("string"), ibis.null("float64")
    dropped = ~table.is_kept
    return table.select(
        "shard",
        "id",
        "source",
        "n_tokens",
        reason=ibis.cases((dropped, "budget"), else_=no_text),
        value=ibis.cases((dropped, table.before.cast("float64")), else_=no_number),
        threshold=ibis.cases((dropped, table.budget.cast("float64")), else_=no_number),
        detail=no_text,
        split=ibis.cases((dropped, no_text), (table.home.notnull(), HELDOUT), else_=TRAIN),
    )


def _split_counts(engine: Engine, decided: ir.Table) -> dict[str, dict[str, dict[str, int]]]:
    """Count documents and tokens per source and split."""
    kept = decided.filter(decided.split.notnull())
    sums = kept.group_by("source", "split").agg(docs=kept.count(), tokens=kept.n_tokens.sum())
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for row in engine.collect(sums, ["source", "split"]).to_pylist():
        counts.setdefault(row["source"], {})[row["split"]] = {
            "docs": row["docs"],
            "tokens": row["tokens"],
        }
    return counts
