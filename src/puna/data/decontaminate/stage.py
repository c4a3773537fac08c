"""The steps of stage ``data.decontaminate``: index the examples, look for them, report, remove."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from puna.core.config import Execution
from puna.core.errors import PunaError
from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.progress import say
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import before
from puna.data.decontaminate.examples import EvalSetConfig, sets_state
from puna.data.engine import Engine, EngineConfig, open_engine
from puna.data.engine.base import ROWS_DIR
from puna.data.reasons import register_reasons
from puna.data.schema import shard_name
from puna.data.stagework import SCRATCH_DIR, WORK_DIR, documents_of, require_documents, step_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    import ibis.expr.types as ir

    from puna.data.decontaminate.examples import Example

HITS_FILE = "hits.parquet"

register_reasons(
    {
        "decontaminate.match": "it has a share of an evaluation example's words in common with it "
        "that is at least `min_coverage`; the detail is set#record",
        "decontaminate.meaning": "the embedding of a part of it has a cosine with that of an "
        "evaluation example that is at least `threshold`; the detail is set#record",
        "decontaminate.pieces": "after evaluation examples were cut out, it fell into more than "
        "`max_pieces` pieces; the detail is set#record",
        "decontaminate.emptied": "after evaluation examples were cut out, fewer bytes were left "
        "than `min_left_bytes`; the detail is set#record",
    }
)


class DecontaminateConfig(EngineConfig):
    """Which evaluation sets are looked for, and what is done with documents that hold them."""

    sets: tuple[EvalSetConfig, ...] = Field(min_length=1)
    """The evaluation sets; each has its own name."""
    method: str = "ngrams"
    """How examples are found: `ngrams` (words, exact), `embedding` (the same in other words), both
    (`ngrams+embedding`) or a matcher of a plugin."""
    embedder: str = ""
    """embedding: folder of the embedder, a static one (`puna data embedder distil`) or a
    sentence-transformers encoder."""
    digest: str | None = None
    """embedding: digest that the embedder must have; by default any."""
    device: Execution[str] = "auto"
    """embedding: where an encoder runs: `cpu`, `cuda`, `mps`; `auto`: a GPU if there is one."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """embedding: cosine of a hit; by default found with `negatives`, for each example."""
    negatives: tuple[str, ...] = ()
    """embedding: places of texts that hold no example (files, or folders of stages, as for
    `puna data classifier`); they set the threshold."""
    false_positives: float = Field(default=0.01, gt=0, lt=1)
    """embedding: share of the negatives that may be hit (ours)."""
    ngram: int = Field(default=13, ge=2, le=64)
    """Words of an n-gram (GPT-3: 8 to 13; datatrove: 12)."""
    short_words: int = Field(default=8, ge=2, le=64)
    """Examples and fields with fewer words than `ngram`, but at least so many, are looked for as a
    whole (GPT-3: 8); shorter examples are not looked for, and counted as `too_short`."""
    max_shared: int = Field(default=10, ge=1)
    """N-grams that more examples share are instructions or templates and not looked for (ours)."""
    min_different: int = Field(default=4, ge=1)
    """N-grams with fewer different words, such as rows of zeros, are not looked for (ours)."""
    max_docs: int = Field(default=0, ge=0)
    """N-grams that stand in more documents are common phrases and no hit; 0: no limit. GPT-3: 10,
    which also hides an example that was copied that often; costs one more pass."""
    min_coverage: float = Field(default=0.0, ge=0, le=1)
    """Share of an example's words that a document must have in common with it; 0: one n-gram is
    enough (GPT-3). Hits below are in the report, and nothing is done."""
    action: Literal["drop", "cut"] = "drop"
    """Drop the document, or cut what it has in common with the example out of it."""
    window_chars: int = Field(default=200, ge=0)
    """Characters cut before and behind each piece in common (GPT-3: 200)."""
    min_piece_chars: int = Field(default=200, ge=0)
    """Pieces between two cuts that are shorter are cut, too (GPT-3: 200)."""
    max_pieces: int = Field(default=10, ge=1)
    """Documents that fall into more pieces are dropped (GPT-3: 10)."""
    min_left_bytes: int = Field(default=200, ge=0)
    """Documents of which fewer bytes are left after a cut are dropped (ours)."""

    @field_validator("sets")
    @classmethod
    def _distinct_names(cls, sets: tuple[EvalSetConfig, ...]) -> tuple[EvalSetConfig, ...]:
        for name, count in Counter(one.name for one in sets).items():
            if count > 1:
                raise ValueError(f"{count} sets are called {name!r}; give each its own `name`")
        return sets

    @model_validator(mode="after")
    def _known_method(self) -> DecontaminateConfig:
        if self.short_words > self.ngram:
            raise ValueError(f"short_words ({self.short_words}) is above ngram ({self.ngram})")
        by_meaning = self.method in ("embedding", "ngrams+embedding")
        if by_meaning != bool(self.embedder):
            raise ValueError(
                "a method with embedding and `embedder` go together; give both or none"
            )
        if self.embedder and (self.threshold is None) != bool(self.negatives):
            raise ValueError("give a `threshold` of the cosine, or `negatives` that set it")
        return self


def external_state(cfg: DecontaminateConfig) -> dict[str, Any]:
    """Tell what the sets' files hold now, so that a rerun can say that they have changed."""
    state = sets_state(cfg.sets)
    if not cfg.embedder:
        return state
    from puna.data.semantic.embedder import digest_of

    try:
        return {**state, "embedder": digest_of(Path(cfg.embedder))}
    except PunaError as error:
        return {"unavailable": error.message}


@stage(
    "data.decontaminate",
    needs={"documents": before("data.decontaminate")},
    resumable=True,
    external_state=external_state,
)
def decontaminate(
    cfg: DecontaminateConfig, inputs: Artifacts, out: Path, events: Ledger
) -> Metrics:
    """Remove documents, or passages, that are in the evaluation sets too.

    Writes ``documents/``, ``rejected/`` and ``hits.parquet``: a row for each document and example
    with something in common, also where nothing was done (``counts`` is false), with the text of
    both.

    After GPT-3 (Brown et al. 2020, appendix C).

    Raises:
        PunaError: A set's file is missing, damaged, or has a record without the field.
    """
    from puna.data.decontaminate.both import BothKernel
    from puna.data.decontaminate.examples import read_examples
    from puna.data.decontaminate.matching import MATCHERS, DecontaminateKernel
    from puna.data.decontaminate.meaning import MeaningKernel

    started_s = time.monotonic()
    documents, work = documents_of(inputs["documents"]), out / WORK_DIR
    remove_tree(work / "index")
    (work / "index").mkdir(parents=True)
    examples = [example for one in cfg.sets for example in read_examples(one)]
    matcher = MATCHERS.get(cfg.method)(cfg)
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        kernel, sets = matcher.prepare(examples, work / "index", engine, documents)
        _require_indexed(cfg, sets)
        scanned = engine.annotate(
            "data.decontaminate: search",
            documents,
            work / "matches",
            kernel,
            carry=("source", "path"),
        )
        require_documents(scanned.rows_in, "data.decontaminate", "the stage before it")
        hits = _write_hits(engine, engine.read(work / "matches" / ROWS_DIR), examples, work)
        judge = DecontaminateKernel(
            cfg.action, cfg.window_chars, cfg.min_piece_chars,
            cfg.max_pieces, cfg.min_left_bytes,
        )  # fmt: skip
        manifest = engine.judge(
            "data.decontaminate", documents, out, judge, side=work / "matches" / ROWS_DIR
        )
        for row in _hits_by_set(engine, hits):
            sets[row.pop("set")].update(row)
    os.replace(work / "hits" / shard_name(0), out / HITS_FILE)
    remove_tree(work)
    kernel = kernel.meaning if isinstance(kernel, BothKernel) else kernel
    found = {"threshold": kernel.threshold} if isinstance(kernel, MeaningKernel) else {}
    return {**step_metrics(manifest, started_s, events), **found, "sets": sets}


def _require_indexed(cfg: DecontaminateConfig, sets: dict[str, dict[str, int]]) -> None:
    """Refuse a set of which nothing can be looked for; say how much of the others cannot be."""
    for name, counts in sets.items():
        counts |= {"contaminated": 0, "partly": 0, "docs": 0}
        if not counts["indexed"]:
            raise PunaError(
                f"evaluation set {name!r}: none of its {counts['examples']:,} examples can be "
                f"looked for: {counts}",
                f"name more of its `fields`, or lower `short_words` (now {cfg.short_words})",
            )
        lost = counts["examples"] - counts["indexed"] - counts.get("same", 0)
        if lost:
            say(f"  evaluation set {name}: {lost:,} of {counts['examples']:,} examples are too "
                "short or unspecific, and are not looked for")  # fmt: skip


def _write_hits(
    engine: Engine, matches: ir.Table, examples: Sequence[Example], work: Path
) -> ir.Table:
    """Write one row per document and example, with the text of both."""
    import pyarrow as pa

    from puna.data.decontaminate.matching import HIT_TYPE

    rows = matches.select("id", "source", "path", hit=matches.hits.unnest())
    names = tuple(field.name for field in HIT_TYPE)
    rows = rows.select("id", "source", "path", **{name: rows.hit[name] for name in names})
    table = pa.table({
        "set": pa.array([one.set_name for one in examples], pa.string()),
        "example": pa.array([one.index for one in examples], pa.int64()),
        "example_text": pa.array(["\n".join(one.parts) for one in examples], pa.string()),
    })  # fmt: skip
    rows = rows.left_join(engine.put(table, work / "examples"), ["set", "example"])
    rows = rows.select("id", "source", "path", *names, "example_text")
    engine.write(rows, work / "hits", order_by=["set", "example", "id"])
    return engine.read(work / "hits")


def _hits_by_set(engine: Engine, hits: ir.Table) -> list[dict[str, Any]]:
    """Count contaminated examples, those hit without counting, and documents, per set."""
    per_example = hits.group_by(["set", "example"]).agg(counts=hits.counts.any())
    examples = per_example.group_by("set").agg(
        contaminated=per_example.counts.cast("int64").sum(),
        partly=(~per_example.counts).cast("int64").sum(),
    )
    counted = hits.filter(hits.counts)
    docs = counted.group_by("set").agg(docs=counted.id.nunique())
    found = {row["set"]: row for row in engine.collect(examples, ["set"]).to_pylist()}
    for row in engine.collect(docs, ["set"]).to_pylist():
        found[row["set"]] |= row
    return list(found.values())
