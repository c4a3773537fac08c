"""The steps of stage ``data.substrings``: which windows of bytes stand elsewhere, cut, report.

A byte of a document is cut when it is in a window of ``min_bytes`` bytes that also stands in an
earlier document. That is what a suffix array over all texts finds (Lee et al. 2022), without one:

1. Every window is represented by a fingerprint that its own bytes choose
   (:mod:`puna.data.substrings.winnow`). Fingerprints are counted by the data engine, which spills
   to disk; those that occur once are done with.
2. The others' blocks of windows are hashed (128 bits). Equal blocks stand where the first of them
   stands. One of each kind of block that differs from another with its fingerprint is fetched, and
   those of a fingerprint are compared window by window, byte for byte.
3. What stands in an earlier document is joined to spans. Documents of which too little is left are
   rejected. What they alone had before others may not be lost with them: they are put last in the
   order, and step 2 (its relations, not its passes) is done again without them before the others.
4. A last pass cuts.

The work is linear in the text, also for a passage that is in every document.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from puna.core.fsio import hash_file, hash_json, remove_tree
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import before
from puna.data.dedup.keep import Keep
from puna.data.engine import Engine, EngineConfig, open_engine
from puna.data.engine.base import ROWS_DIR
from puna.data.engine.shards import list_shards
from puna.data.reasons import register_reasons
from puna.data.schema import DOCUMENTS_DIR
from puna.data.stagework import SCRATCH_DIR, WORK_DIR, documents_of, require_documents, step_metrics

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.substrings.passes import WindowRule

STAGE = "data.substrings"
PASSAGES_FILE = "passages.parquet"

register_reasons(
    {
        "substring.mostly_duplicate": "share of its bytes in passages that earlier documents have "
        "is above `max_share`",
        "substring.emptied": "without the passages that earlier documents have, fewer bytes were "
        "left than `min_left_bytes`",
    }
)


class SubstringsConfig(EngineConfig):
    """Which passages are cut out of documents, and which documents are dropped."""

    min_bytes: int = Field(default=200, ge=8, le=2000)
    """Shortest passage that is cut when an earlier document has it (Lee et al. 2022: 50 tokens; at
    about 4 bytes a token, 200 bytes)."""
    within: bool = False
    """Cut, too, what a document itself has said before, if the two do not overlap (a suffix array
    over all texts finds these, too)."""
    keep: Keep = "quality"
    """The document that keeps its copy: the one with the best `quality` (a column, when the
    documents have it), then the smallest id; the one with most bytes, then the smallest id; or the
    smallest id."""
    border: Literal["character", "word", "line"] = "word"
    """What is cut begins and ends with a whole character, word or line inside the passage (ours:
    words, so that no half of one is left)."""
    max_share: float = Field(default=0.8, gt=0, le=1)
    """Documents are dropped that have a larger share of their bytes in such passages (ours)."""
    min_left_bytes: int = Field(default=100, ge=0)
    """Documents are dropped of which fewer bytes are left, if anything was found (ours)."""
    skip_sources: tuple[str, ...] = ()
    """Sources that are neither compared nor changed, program code for example, where passages
    repeat by nature."""


@stage(STAGE, needs={"documents": before(STAGE)}, resumable=True)
def cut_substrings(cfg: SubstringsConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Cut passages that another document has already out of documents, wherever they stand in it.

    Writes ``documents/`` (texts without those passages; columns ``passages_cut`` and
    ``passage_bytes_cut``), ``rejected/`` (texts as they were read) and ``passages.parquet``, the
    most frequent passages: hash, occurrences, n_bytes, first_id, excerpt.

    After Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better".

    Raises:
        PunaError: There is no document, ids are not unique, or a document has 2**30 bytes or more.
    """
    from puna.data.dedup.stage import carried_columns, written
    from puna.data.substrings.passes import CutKernel, WindowRule
    from puna.data.substrings.relations import verdicts_of
    from puna.data.substrings.report import passages_of, write_passages

    started_s = time.monotonic()
    documents, work = documents_of(inputs["documents"]), out / WORK_DIR
    rule = WindowRule(cfg.min_bytes, tuple(sorted(cfg.skip_sources)))
    carry = carried_columns(documents, STAGE)
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        found = _find_blocks(engine, documents, rule, carry, work)
        spans, ranks, rejected = _decide(cfg, engine, found, work)
        engine.write(
            verdicts_of(found.documents, spans, rejected), work / "verdicts",
            order_by=["shard", "id"], n_shards=found.n_shards,
        )  # fmt: skip
        manifest = engine.judge(
            STAGE, documents, out, CutKernel(cfg.border), side=work / "verdicts"
        )
        passages = written(
            engine, passages_of(spans), work / "passages", ["first_place", "n_bytes"]
        )
        write_passages(engine, passages, found.documents, ranks, documents, out / PASSAGES_FILE)
        metrics = {
            **step_metrics(manifest, started_s, events),
            "passages": engine.count(passages),
            "cut": _cut_by_source(engine, out / DOCUMENTS_DIR),
        }
    remove_tree(work)
    return metrics


class _Found(NamedTuple):
    """What the passes over the text have found; see :mod:`puna.data.substrings.relations`."""

    documents: ir.Table
    blocks: ir.Table
    several: ir.Table
    texts: ir.Table
    n_shards: int


def _find_blocks(
    engine: Engine, documents: Path, rule: WindowRule, carry: list[str], work: Path
) -> _Found:
    """Read the text three times: count fingerprints, describe blocks, fetch their bytes."""
    from puna.data.dedup.stage import require_unique_ids, written
    from puna.data.lines.counts import write_frequent
    from puna.data.lines.stage import hash_tables
    from puna.data.substrings import relations
    from puna.data.substrings.passes import BlockKernel, FingerprintKernel, TextKernel

    counted = engine.annotate(
        f"{STAGE}: fingerprints", documents, work / "counts", FingerprintKernel(rule), carry=carry
    )
    require_documents(counted.rows_in, STAGE, "the stage before it")
    rows, n_shards = engine.read(work / "counts" / ROWS_DIR), len(counted.shards)
    require_unique_ids(engine, rows, counted.rows_in, STAGE)
    nodes = written(engine, relations.documents_of_rows(rows), work / "nodes", ["node"])
    tables = work / "tables"
    tables.mkdir(exist_ok=True)
    write_frequent(engine, rows.select("node", lines="counts"), 1, work / "frequent", tables)
    kernel = BlockKernel(rule, hash_tables(tables), tables)
    engine.annotate(f"{STAGE}: blocks", documents, work / "blocks", kernel)
    blocks = relations.blocks_of(engine, work / "blocks" / ROWS_DIR)
    several = written(engine, relations.several_of(blocks), work / "several", ["key"])
    engine.write(
        relations.wanted_of(blocks, several, nodes), work / "wanted",
        order_by=["shard", "node", "start"], n_shards=n_shards,
    )  # fmt: skip
    digest = hash_json([hash_file(shard.path) for shard in list_shards(work / "wanted")])
    fetch = TextKernel(rule.size, digest, work / "wanted")
    engine.annotate(f"{STAGE}: texts", documents, work / "texts", fetch)
    texts = relations.texts_of_blocks(engine, work / "texts" / ROWS_DIR)
    return _Found(nodes, blocks, several, texts, n_shards)


def _decide(
    cfg: SubstringsConfig, engine: Engine, found: _Found, work: Path
) -> tuple[ir.Table, ir.Table, ir.Table]:
    """Find what is cut and who is rejected: spans, ranks and rejected documents."""
    from puna.data.dedup.stage import written
    from puna.data.substrings import relations

    ranks = written(engine, relations.ranks_of(found.documents, cfg.keep), work / "ranks", ["node"])
    spans = _find_spans(cfg, engine, found, ranks, work / "all")
    rejected = relations.rejected_of(found.documents, spans, cfg.max_share, cfg.min_left_bytes)
    rejected = written(engine, rejected, work / "rejected", ["node"])
    if not engine.count(rejected):
        return spans, ranks, rejected
    last = relations.moved_last(ranks, rejected)
    ranks = written(engine, last, work / "ranks-kept", ["node"])
    others = _find_spans(cfg, engine, found, ranks, work / "kept").anti_join(rejected, "node")
    both = others.union(spans.semi_join(rejected, "node"))
    return both, ranks, rejected


def _find_spans(
    cfg: SubstringsConfig, engine: Engine, found: _Found, ranks: ir.Table, folder: Path
) -> ir.Table:
    """Find what stands in a document that comes earlier in the order of the ranks."""
    from puna.data.dedup.stage import written
    from puna.data.substrings import relations
    from puna.data.substrings.compare import CompareKernel
    from puna.data.substrings.spans import SpanKernel

    size = cfg.min_bytes
    blocks = relations.placed(found.blocks, ranks)
    firsts = written(engine, relations.firsts_of(blocks), folder / "firsts", list(relations.KEY))
    compared = engine.groups(
        found.texts.inner_join(firsts.drop("n_windows"), list(relations.KEY)),
        folder / "compared", CompareKernel(size), by="key", order_by=["place"],
    )  # fmt: skip
    windows = relations.found_of(blocks, firsts, found.several, compared, size, within=cfg.within)
    return engine.groups(
        windows, folder / "spans", SpanKernel(size, cfg.within), by="node",
        order_by=["start", "begin"],
    )  # fmt: skip


def _cut_by_source(engine: Engine, documents: Path) -> dict[str, dict[str, Any]]:
    """Add up what was cut from the kept documents of each source."""
    rows = engine.read(documents)
    sums = rows.group_by("source").agg(
        docs=(rows.passages_cut > 0).cast("int64").sum(),
        passages=rows.passages_cut.sum(),
        bytes=rows.passage_bytes_cut.sum(),
    )
    return {row.pop("source"): row for row in engine.collect(sums, ["source"]).to_pylist()}
