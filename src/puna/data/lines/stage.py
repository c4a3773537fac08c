"""The steps of stage ``data.lines``: count, find what is frequent, cut, report.

1. One pass over the text: the hash of every line (with its bucket of documents), counted per batch;
   counts of tokens per source.
2. Counts are added up by the data engine, which spills to disk; only the hashes above the threshold
   become a table that workers map into memory: 32 to 64 bytes for each of them.
3. A second pass cuts lines and judges documents.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import before
from puna.data.engine import Engine, EngineConfig, open_engine
from puna.data.engine.base import ROWS_DIR
from puna.data.reasons import register_reasons
from puna.data.schema import DOCUMENTS_DIR
from puna.data.stagework import SCRATCH_DIR, WORK_DIR, documents_of, require_documents, step_metrics

register_reasons(
    {
        "lines.emptied": "after frequent or repetitive lines were cut, fewer bytes were left than "
        "`min_left_bytes`",
        "lines.ngram_coverage": "share of characters in word n-grams that occurred before is above "
        "`doc_coverage`",
        "lines.kl_outlier": "divergence of its words from those of its source, in nats, is above "
        "`kl_max_nats`",
    }
)


class LinesConfig(EngineConfig):
    """Which lines are cut out of documents, and which documents are outliers."""

    units: tuple[Literal["line", "paragraph"], ...] = ("line",)
    """What is deduplicated: `line`, `paragraph` (lines between blank lines), both, or nothing."""
    max_count: int = Field(default=6, ge=1)
    """Lines that occur more often in a bucket are cut (Llama 3: 6)."""
    bucket_docs: int = Field(default=30_000_000, ge=1)
    """Documents of a bucket, in the order of the corpus (Llama 3: 30 million)."""
    keep_first: bool = False
    """Leave the first occurrence, in the order of the corpus, of each line (Llama 3: cut all)."""
    min_bytes: int = Field(default=1, ge=1)
    """Shorter lines are not deduplicated; blank ones never are."""
    ignore: tuple[Literal["case", "digits", "space"], ...] = ("space",)
    """What makes no difference between two lines: letter case (ASCII), which digits, how much white
    space (ours: only the latter)."""
    skip_sources: tuple[str, ...] = ()
    """Sources that are left as they are, program code for example, where lines repeat by nature."""
    ngram_words: Literal[0, 5, 6, 7, 8, 9, 10] = 5
    """Words of the n-grams whose repetition inside a line is measured (ours: 5); 0: none."""
    line_min_bytes: int = Field(default=200, ge=20)
    """Shorter lines are not measured for repetition (ours)."""
    line_coverage: float = Field(default=0.5, gt=0, le=1)
    """Lines are cut that have a larger share of characters in n-grams that occurred before in the
    line: logs, error messages (ours; 1: none)."""
    doc_coverage: float = Field(default=1.0, gt=0, le=1)
    """Documents are dropped that have a larger share (1: none; the filter `repetition` of
    `data.filter` measures the same before lines are cut)."""
    min_left_bytes: int = Field(default=100, ge=0)
    """Documents are dropped of which fewer bytes are left, if anything was cut (ours)."""
    kl_max_nats: float = Field(default=5.0, ge=0)
    """Documents are dropped whose word distribution diverges more from that of their source
    (Kullback-Leibler, nats; ours; 0: not measured)."""
    kl_min_words: int = Field(default=50, ge=1)
    """Documents with fewer words are not measured (ours)."""
    kl_prior_words: int = Field(default=100, ge=1)
    """Words of the source's distribution that are added to every document, so that short documents
    are no outliers (ours)."""

    @model_validator(mode="after")
    def _distinct(self) -> LinesConfig:
        for name in ("units", "ignore"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: an entry stands there twice: {getattr(self, name)}")
        return self


@stage("data.lines", needs={"documents": before("data.lines")}, resumable=True)
def rewrite_lines(cfg: LinesConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Cut frequent and repetitive lines out of documents; drop those with outlier words.

    Writes ``documents/`` (texts without those lines; columns ``lines_cut``, ``ngram_lines_cut``
    and ``bytes_cut``) and ``rejected/`` (texts as they were read).

    After Llama 3 (Dubey et al. 2024, section 3.1.1), which gives the count and the bucket of line
    deduplication and names the other two measures without thresholds.
    """
    from puna.data.lines.counts import top_lines, write_frequent, write_tokens
    from puna.data.lines.passes import CountKernel, CutKernel, CutRule, LineRule

    started_s = time.monotonic()
    documents, work = documents_of(inputs["documents"]), out / WORK_DIR
    rule = LineRule(
        tuple(sorted(cfg.units)), tuple(sorted(cfg.ignore)), cfg.min_bytes, cfg.bucket_docs,
        tuple(sorted(cfg.skip_sources)),
    )  # fmt: skip
    names = tuple(CutRule.__dataclass_fields__)
    cut = CutRule(*(getattr(cfg, name) for name in names))
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        counted = engine.annotate(
            "data.lines: counts", documents, work / "counts",
            CountKernel(rule, with_tokens=cfg.kl_max_nats > 0), carry=("source",),
        )  # fmt: skip
        require_documents(counted.rows_in, "data.lines", "the stage before it")
        counts, tables = engine.read(work / "counts" / ROWS_DIR), work / "tables"
        tables.mkdir(exist_ok=True)
        frequent = write_frequent(engine, counts, cfg.max_count, work / "frequent", tables)
        sources = write_tokens(engine, counts, tables)
        kernel = CutKernel(rule, cut, hash_tables(tables), tables)
        manifest = engine.judge("data.lines", documents, out, kernel)
        metrics = {
            **step_metrics(manifest, started_s, events),
            "frequent_lines": engine.count(frequent),
            "sources_measured": sources,
            "cut": _cut_by_source(engine, out / DOCUMENTS_DIR),
            "top_lines": top_lines(engine, frequent, documents, rule),
        }
    remove_tree(work)
    return metrics


def hash_tables(folder: Path) -> str:
    """Return a digest of the tables that the second pass uses."""
    from puna.core.fsio import hash_file, hash_json

    return hash_json({path.name: hash_file(path) for path in sorted(folder.glob("*.npy"))})


def _cut_by_source(engine: Engine, documents: Path) -> dict[str, dict[str, Any]]:
    """Add up what was cut from the kept documents of each source."""
    rows = engine.read(documents)
    touched = (rows.lines_cut > 0).cast("int64").sum()
    sums = rows.group_by("source").agg(
        docs=touched,
        lines=rows.lines_cut.sum(),
        ngram_lines=rows.ngram_lines_cut.sum(),
        bytes=rows.bytes_cut.sum(),
    )
    table = engine.collect(sums, ["source"])
    return {row.pop("source"): row for row in table.to_pylist()}
