"""Stage ``data.quality``: scores of classifiers and language models, and what they drop.

1. One pass over the text: the scores of every classifier.
2. Shares to keep become thresholds: exact quantiles of the scores, by relational steps. Target
   shares of domains become keep probabilities.
3. Every document is kept or dropped by its scores; draws are hashes of its id.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from puna.core.config import Config, Seed
from puna.core.errors import PunaError
from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import before
from puna.data.engine import Engine, EngineConfig, open_engine
from puna.data.engine.base import ROWS_DIR
from puna.data.reasons import register_reasons
from puna.data.stagework import SCRATCH_DIR, WORK_DIR, documents_of, require_documents, step_metrics

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.quality.classifier import Task
    from puna.data.quality.decide import Rule, Use

register_reasons(
    {
        "quality.low": "the score is below the threshold, given or set by the share to keep; the "
        "detail names the score",
        "quality.high": "the score is above the highest that is wanted (for bits per byte: the "
        "text is less expected than clean text); the detail names the score",
        "quality.sampled": "the score lost against the document's random draw (Pareto sampling): "
        "documents with low scores are kept rarely",
        "domain.balance": "the document's domain is thinned out to its target share: its random "
        "draw (the value) is not below the domain's keep probability (the threshold)",
    }
)

_COLUMN_NAME = re.compile(r"[a-z][a-z0-9_]*")


class ScorerUse(Config):
    """A classifier, and what its scores drop; without a rule they are only written down."""

    classifier: str
    """Folder that `puna data classifier train` wrote, or a fastText model file (`.bin`)."""
    digest: str | None = None
    """Digest that the classifier must have (it is among the stage's metrics); by default any."""
    positive: str | None = None
    """For a model file with two labels: the label whose probability is the score."""
    sources: tuple[str, ...] = ()
    """Sources whose documents the rules may drop; by default all. All documents are scored."""
    min: float | None = None
    """Drop documents with a lower score."""
    max: float | None = None
    """Drop documents with a higher score (for an n-gram model: more bits per byte)."""
    keep_share: float | None = Field(default=None, gt=0, le=1)
    """Keep this share of the documents: those with the best scores. Equal scores stay together."""
    share_of: Literal["docs", "bytes"] = "docs"
    """What `keep_share` and `shares` count."""
    per_source: bool = False
    """Keep the share of every source rather than of all documents together."""
    pareto_alpha: float | None = Field(default=None, gt=0)
    """Keep a document when a draw from the Pareto distribution exceeds 1 - score: the higher alpha,
    the fewer documents with low scores stay (GPT-3 used 9)."""
    shares: dict[str, float] = Field(default_factory=dict)
    """Domain -> its target share after the stage; what they leave to 1 goes to the others. For a
    classifier of several labels."""

    @model_validator(mode="after")
    def _consistent(self) -> ScorerUse:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        if any(share < 0 for share in self.shares.values()) or sum(self.shares.values()) > 1 + 1e-9:
            raise ValueError("shares must not be negative, and add up to at most 1")
        return self


class QualityConfig(EngineConfig):
    """Which classifiers score the documents, and which documents they drop."""

    scorers: dict[str, ScorerUse] = Field(min_length=1)
    """Name of the column (`quality`, `domain`, `bits_per_byte`) -> classifier and rules, applied in
    this order."""
    seed: Seed = 0
    """Seed of the draws, which depend on nothing else but the document's id."""

    @model_validator(mode="after")
    def _named(self) -> QualityConfig:
        for name in self.scorers:
            if not _COLUMN_NAME.fullmatch(name):
                raise ValueError(
                    f"scorers: {name!r} is no column name; use small letters, digits and _"
                )
        return self


def _classifier_digests(cfg: QualityConfig) -> dict[str, str | None]:
    """Return the digests of the classifiers now; null for one that is gone."""
    from puna.data.quality.classifier import digest_of

    found: dict[str, str | None] = {}
    for name, use in cfg.scorers.items():
        try:
            found[name] = digest_of(Path(use.classifier))
        except PunaError:
            found[name] = None
    return found


@stage(
    "data.quality",
    needs={"documents": before("data.quality")},
    resumable=True,
    external_state=_classifier_digests,
)
def judge_quality(cfg: QualityConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Score documents with classifiers; keep them by threshold, share, sampling or domain.

    Writes ``documents/`` (with a column per score) and ``rejected/``.
    """
    from puna.data.quality.decide import DecisionKernel, ScoreKernel

    started_s = time.monotonic()
    documents, work = documents_of(inputs["documents"]), out / WORK_DIR
    uses = _open(cfg)
    kernel = ScoreKernel(tuple(uses.values()))
    added = tuple((one.name, str(one.type)) for one in kernel.adds())
    _require_new_columns(documents, [name for name, _ in added])
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        scored = engine.annotate(
            "data.quality: scores", documents, work / "scores", kernel, carry=("source", "n_bytes")
        )
        require_documents(scored.rows_in, "data.quality", "the stage before it")
        rows = engine.read(work / "scores" / ROWS_DIR)
        rules = []
        for name, use in cfg.scorers.items():
            rules.append(_rule(cfg, name, use, uses[name].load().task, engine, rows))
        manifest = engine.judge(
            "data.quality", documents, out, DecisionKernel(tuple(rules), added),
            side=work / "scores" / ROWS_DIR,
        )  # fmt: skip
        summary = {
            rule.name: {
                "task": rule.task,
                "digest": uses[rule.name].digest,
                "share_thresholds": dict(rule.share_thresholds),
                "keep_probabilities": rule.probabilities and dict(rule.probabilities),
                "sources": _scores_of_sources(engine, rows, rule),
            }
            for rule in rules
        }
    remove_tree(work)
    return {**step_metrics(manifest, started_s, events), "scorers": summary}


def _open(cfg: QualityConfig) -> dict[str, Use]:
    """Load every classifier and check that its rules suit it.

    Raises:
        PunaError: A classifier is missing, has another digest, or cannot follow a rule.
    """
    from puna.data.quality.decide import Use

    uses = {}
    for name, use in cfg.scorers.items():
        where = f"data.quality.scorers.{name}"
        loaded = Use(name, "", use.classifier, use.positive).load()
        if use.digest is not None and use.digest != loaded.digest:
            raise PunaError(
                f"{where}: {use.classifier} has the digest {loaded.digest}, not {use.digest}",
                "give the right classifier, or correct `digest`",
            )
        _require_fitting(where, use, loaded.task)
        uses[name] = Use(name, loaded.digest, use.classifier, use.positive)
    return uses


def _require_fitting(where: str, use: ScorerUse, task: Task) -> None:
    numeric = {"min": use.min, "max": use.max, "keep_share": use.keep_share}
    given = [key for key, value in numeric.items() if value is not None]
    wrong = None
    if task == "labels" and given:
        wrong = (given[0], "a classifier of several labels has no score; set `shares`")
    if task != "labels" and use.shares:
        wrong = ("shares", "only a classifier of several labels has domains")
    if task != "binary" and use.pareto_alpha is not None:
        wrong = ("pareto_alpha", "Pareto sampling needs a probability, of a binary classifier")
    if wrong:
        raise PunaError(f"{where}.{wrong[0]} does not suit {use.classifier} (task {task})",
                        wrong[1])  # fmt: skip


def _require_new_columns(documents: Path, names: list[str]) -> None:
    from puna.data.engine.shards import list_shards
    from puna.data.engine.shardwork import open_schema

    known = open_schema(list_shards(documents)[0].path).names
    verdict = {"reason", "value", "threshold", "detail", "step"}
    taken = [name for name in names if name in verdict.union(known) or names.count(name) > 1]
    if taken:
        raise PunaError(f"data.quality.scorers: the documents have a column {taken[0]!r} already",
                        "give the scorer another name")  # fmt: skip


def _rule(
    cfg: QualityConfig, name: str, use: ScorerUse, task: Task, engine: Engine, rows: ir.Table
) -> Rule:
    """Resolve shares into thresholds and probabilities."""
    from puna.data.quality.balance import keep_probabilities
    from puna.data.quality.decide import Rule

    if use.sources:
        rows = rows.filter(rows.source.isin(list(use.sources)))
    thresholds: dict[str, float] = {}
    if use.keep_share is not None:
        thresholds = share_thresholds(engine, rows, name, use, lower_is_better=task == "bits")
    probabilities = None
    if use.shares:
        amount = rows.n_bytes.sum() if use.share_of == "bytes" else rows.count()
        table = engine.collect(rows.group_by(domain=rows[name]).agg(n=amount), ["domain"])
        amounts = dict(zip(table["domain"].to_pylist(), table["n"].to_pylist(), strict=True))
        probabilities = keep_probabilities(amounts, use.shares)
    return Rule(
        name, task, use.sources, use.min, use.max, thresholds, use.pareto_alpha, probabilities,
        cfg.seed,
    )  # fmt: skip


def share_thresholds(
    engine: Engine, rows: ir.Table, name: str, use: ScorerUse, *, lower_is_better: bool
) -> dict[str, float]:
    """Return the score of the last document that the share to keep reaches.

    Args:
        engine: The engine.
        rows: Scores with id, source and n_bytes.
        name: Column of the score.
        use: ``keep_share``, ``share_of``, ``per_source``.
        lower_is_better: Best are the lowest scores.

    Returns:
        Source -> threshold, or ``""`` -> threshold over all documents.
    """
    import ibis

    table = rows.select(
        "id",
        group=rows.source if use.per_source else ibis.literal(""),
        score=rows[name],
        amount=rows.n_bytes.cast("int64") if use.share_of == "bytes" else ibis.literal(1, "int64"),
    )
    direction = ibis.asc if lower_is_better else ibis.desc
    window = ibis.window(
        group_by="group", order_by=[direction("score"), ibis.asc("id")], rows=(None, 0)
    )
    table = table.mutate(
        before=table.amount.sum().over(window) - table.amount,
        total=table.amount.sum().over(ibis.window(group_by="group")),
    )
    # 0.07 of 100 documents are 7, though their product is a little more in floating point.
    reached = table.filter(table.before + 1e-6 < table.total * use.keep_share)
    last = reached.score.max() if lower_is_better else reached.score.min()
    found = engine.collect(reached.group_by("group").agg(threshold=last), ["group"])
    return dict(zip(found["group"].to_pylist(), found["threshold"].to_pylist(), strict=True))


def _scores_of_sources(engine: Engine, rows: ir.Table, rule: Rule) -> list[Mapping[str, Any]]:
    """Summarise a score per source: quartiles, or documents and bytes per label."""
    score = rows[rule.name]
    if rule.task == "labels":
        grouped = rows.group_by("source", label=score)
        table = grouped.agg(docs=rows.count(), n_bytes=rows.n_bytes.sum())
        return engine.collect(table, ["source", "label"]).to_pylist()
    table = rows.group_by("source").agg(
        docs=rows.count(), p25=score.quantile(0.25), median=score.median(), p75=score.quantile(0.75)
    )
    return engine.collect(table, ["source"]).to_pylist()
