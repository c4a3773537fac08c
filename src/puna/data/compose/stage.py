"""Stage ``data.compose``: how much of each source, language or domain is trained on, how often.

It stands behind ``data.split``, not before it: the held-out side is chosen from the documents as
they are and stays what it is, so that two compositions are measured on the same text, and nothing
that is done here can put a document, or a copy of one, on that side. Only training documents are
sampled and repeated; whole clusters are on one side already.

Repetition is a column (``repeat``), not copies of rows: every document stays one row, so documents
in = kept + rejected holds, ids stay unique, and ``tokens.encode`` encodes each once. The loader
reads a document ``repeat`` times in every pass over its source.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from puna.core.config import Config, Seed
from puna.core.errors import PunaError
from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.progress import say
from puna.core.stage import Artifacts, Metrics, stage
from puna.core.units import format_count
from puna.data.engine import EngineConfig, open_engine
from puna.data.engine.base import ROWS_DIR
from puna.data.reasons import register_reasons
from puna.data.stagework import SCRATCH_DIR, WORK_DIR, documents_of, require_documents, step_metrics

if TYPE_CHECKING:
    from puna.data.compose.solve import Part
    from puna.data.split import TokenCounter

register_reasons(
    {
        "compose.sampled_out": "the document's part of the composition is thinned out: its random "
        "draw (the value, a hash of the id or the cluster) is not below the threshold"
    }
)

REST = "all others"
TOKENS_COLUMN, REPEAT_COLUMN = "n_tokens", "repeat"
SHARE_TOLERANCE = 0.005
"""A share counts as reached when it is not further off than this (ours)."""


class GroupRule(Config):
    """What is wanted of the training documents that have some values."""

    match: dict[str, str] = Field(min_length=1)
    """Column -> value, for columns that `by` names: `{ source = "web", language = "de" }`."""
    share: float | None = Field(default=None, ge=0, le=1)
    """Share of all tokens that training reads in one pass."""
    rate: float | None = Field(default=None, ge=0, le=1)
    """Share of these documents that is kept, whatever that gives in tokens."""
    repeat: float | None = Field(default=None, ge=1)
    """How often each is read: 1.5 reads all of them once and half of them twice."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Repetition limit of these documents; by default the stage's."""

    @model_validator(mode="after")
    def _one_wish(self) -> GroupRule:
        given = [name for name in ("share", "rate", "repeat") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of share, rate and repeat, not {' and '.join(given)}")
        return self

    @property
    def fixed(self) -> float | None:
        """Asked factor that does not depend on other parts."""
        return self.rate if self.rate is not None else self.repeat


class ComposeConfig(EngineConfig):
    """The composition of the training side; by default all documents, each once."""

    by: tuple[str, ...] = ("source",)
    """Columns that make the groups: `source`, `language`, a label of a classifier (`domain`), or
    `metadata.KEY` for a key of the metadata."""
    groups: tuple[GroupRule, ...] = ()
    """Rules; a document belongs to the first that it matches. What no rule matches shares what is
    left of the budget in proportion to its tokens."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """Tokens that training reads in one pass, copies counted; by default as many as there are."""
    max_epochs: float = Field(default=4.0, gt=0)
    """A document is read at most this often on average: up to four passes are worth nearly as much
    as new text (Muennighoff et al. 2023)."""
    shortfall: Literal["fill", "shrink"] = "fill"
    """When there is too little of a part for its share: `fill`, the others take over and the budget
    is met; `shrink`, everything becomes smaller and the shares are met."""
    strict: bool = False
    """A share or budget that cannot be reached is an error."""
    whole_clusters: bool = False
    """Draw for clusters of similar documents (of data.dedup) rather than for documents."""
    bytes_per_token: float = Field(default=4.0, gt=0)
    """UTF-8 bytes per token, for documents that `tokens.count` has not counted."""
    seed: Seed = 0
    """Seed of the draws, which depend on nothing else but the document's id (or cluster)."""

    @model_validator(mode="after")
    def _consistent(self) -> ComposeConfig:
        if not self.by or len(set(self.by)) != len(self.by):
            raise ValueError("by must name at least one column, and none twice")
        for rule in self.groups:
            unknown = sorted(set(rule.match) - set(self.by))
            if unknown:
                raise ValueError(
                    f"groups: {unknown[0]!r} is not among by = {list(self.by)}; add it there"
                )
            limit = rule.max_epochs or self.max_epochs
            if rule.fixed is not None and rule.fixed > limit:
                raise ValueError(
                    f"groups: repeat {rule.fixed:g} of {_name(rule)} is above its repetition limit "
                    f"{limit:g}; raise max_epochs if you mean it"
                )
        total = sum(rule.share or 0.0 for rule in self.groups)
        if total > 1 + 1e-9:
            raise ValueError(f"groups: the shares add up to {total:g}, which is more than 1")
        return self


@stage("data.compose", needs={"documents": "tokens.count|data.split"}, resumable=True)
def compose_documents(cfg: ComposeConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Sample and repeat the training documents of each group by shares, rates and a budget.

    Writes ``documents/`` (with a column ``repeat``: how often a pass over the source reads the
    document; 1 for held-out ones) and ``rejected/``.

    Raises:
        PunaError: A column of ``by`` is missing, a rule matches nothing, the shares exceed the
            budget, or, when ``strict``, cannot be reached.
    """
    from puna.data.compose.kernels import ComposeKernel, GroupKernel
    from puna.data.compose.measure import fixed_reads, group_sums, part_thresholds, reached

    started_s = time.monotonic()
    documents, work = documents_of(inputs["documents"]), out / WORK_DIR
    count = _counter(cfg, documents)
    _check_columns(cfg, documents)
    kernel = GroupKernel(
        cfg.by, tuple(tuple(sorted(rule.match.items())) for rule in cfg.groups), cfg.seed,
        "cluster" if cfg.whole_clusters else "id", count,
    )  # fmt: skip
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        placed = engine.annotate("data.compose: groups", documents, work / "groups", kernel)
        require_documents(placed.rows_in, "data.compose", "data.split")
        rows = engine.read(work / "groups" / ROWS_DIR)
        sums = group_sums(engine, rows, len(cfg.by))
        factors = {i: rule.fixed for i, rule in enumerate(cfg.groups) if rule.fixed is not None}
        parts = _solve(cfg, sums, fixed_reads(engine, rows, factors, work / "fixed"))
        missed = _missed(cfg, parts)
        base, threshold = part_thresholds(engine, rows, parts, work / "parts")
        manifest = engine.judge(
            "data.compose", documents, out, ComposeKernel(base, threshold),
            side=work / "groups" / ROWS_DIR,
        )  # fmt: skip
        table = engine.read(work / "parts")
        found = reached(engine, rows, table, engine.read(out / "documents"), len(cfg.by))
    remove_tree(work)
    result = _report(cfg, parts, threshold, sums, found)
    return {
        **step_metrics(manifest, started_s, events),
        "by": list(cfg.by),
        "token_counts": "tokenizer" if _is_counted(documents) else "estimate",
        "bytes_per_token": None if _is_counted(documents) else cfg.bytes_per_token,
        **result,
        "unreached": missed,
    }


def _columns_of(documents: Path) -> list[str]:
    from puna.data.engine.shards import list_shards
    from puna.data.engine.shardwork import open_schema

    return open_schema(list_shards(documents)[0].path).names


def _is_counted(documents: Path) -> bool:
    return TOKENS_COLUMN in _columns_of(documents)


def _counter(cfg: ComposeConfig, documents: Path) -> TokenCounter:
    from puna.data.compose.measure import CountedTokens
    from puna.data.split import ByteEstimate

    return CountedTokens() if _is_counted(documents) else ByteEstimate(cfg.bytes_per_token)


def _check_columns(cfg: ComposeConfig, documents: Path) -> None:
    from puna.data.compose.kernels import read_by

    names = _columns_of(documents)
    if "split" not in names:
        raise PunaError(
            f"data.compose: the documents in {documents} have no column 'split'",
            "let it read from data.split",
        )
    missing = [name for name in read_by(cfg.by) if name not in names]
    if missing:
        raise PunaError(
            f"data.compose.by names the column {missing[0]!r}, which the documents do not have",
            f"columns here: {', '.join(names)}; `metadata.KEY` reads the metadata",
        )
    if cfg.whole_clusters and "cluster" not in names:
        raise PunaError(
            "data.compose.whole_clusters: the documents have no column `cluster`",
            "add [data.dedup] to the recipe",
        )
    if REPEAT_COLUMN in names:
        raise PunaError(
            f"data.compose: the documents have a column {REPEAT_COLUMN!r} already",
            "let it read from data.split",
        )


def _name(rule: GroupRule) -> str:
    return ", ".join(f"{column}={value}" for column, value in rule.match.items())


def _solve(cfg: ComposeConfig, sums: list[dict[str, Any]], reads: Mapping[int, int]) -> list[Part]:
    """Make the parts of the rules and find their factors.

    Raises:
        PunaError: A rule matches no training document, or the wishes exceed the budget.
    """
    from puna.data.compose.solve import Part, solve
    from puna.data.split import TRAIN

    train = [row for row in sums if row["split"] == TRAIN]
    tokens = [sum(row["tokens"] for row in train if row["part"] == index)
              for index in range(len(cfg.groups) + 1)]  # fmt: skip
    for rule, n_tokens in zip(cfg.groups, tokens, strict=False):
        if not n_tokens:
            known = sorted({", ".join(row["values"]) for row in train})[:20]
            raise PunaError(
                f"data.compose: no training document matches {_name(rule)} (or an earlier rule "
                "takes all of them)",
                f"values of {', '.join(cfg.by)} here: {'; '.join(known)}",
            )
    parts = [
        Part(
            _name(rule),
            tokens[index],
            rule.share,
            rule.fixed,
            reads.get(index),
            rule.max_epochs or cfg.max_epochs,
        )
        for index, rule in enumerate(cfg.groups)
    ]
    parts.append(Part(REST, tokens[-1], limit=cfg.max_epochs))
    return solve(parts, cfg.budget_tokens, cfg.shortfall)


def _report(
    cfg: ComposeConfig,
    parts: list[Part],
    threshold: tuple[float, ...],
    sums: list[dict[str, Any]],
    found: dict[tuple[str, int, tuple[str, ...]], dict[str, int]],
) -> dict[str, Any]:
    """Put asked and reached beside each other, per part and per group."""
    from puna.data.split import TRAIN

    none: dict[str, int] = {"docs": 0, "tokens": 0}
    groups: list[dict[str, Any]] = []
    for row in sums:
        got = found.get((row["split"], row["part"], row["values"]), none)
        groups.append({
            "values": dict(zip(cfg.by, row["values"], strict=True)), "split": row["split"],
            "part": parts[row["part"]].name, "in_docs": row["docs"], "in_tokens": row["tokens"],
            "docs": got["docs"], "tokens": got["tokens"],
            "epochs": got["tokens"] / row["tokens"] if row["tokens"] else 0.0,
        })  # fmt: skip
    train = [group for group in groups if group["split"] == TRAIN]
    total = sum(group["tokens"] for group in train)
    rows = []
    for part, limit in zip(parts, threshold, strict=True):
        mine = [group for group in train if group["part"] == part.name]
        if not mine:
            continue
        n_tokens = sum(group["tokens"] for group in mine)
        rows.append({
            "name": part.name, "asked_share": part.share, "asked_factor": part.fixed,
            "reached_share": n_tokens / total if total else 0.0, "factor": part.factor,
            "epochs": n_tokens / part.n_tokens if part.n_tokens else 0.0,
            "max_epochs": part.limit, "is_limited": part.factor >= part.limit * (1 - 1e-9),
            "threshold": limit, "in_docs": sum(group["in_docs"] for group in mine),
            "in_tokens": part.n_tokens, "docs": sum(group["docs"] for group in mine),
            "tokens": n_tokens,
        })  # fmt: skip
    return {
        "budget_tokens": cfg.budget_tokens, "train_tokens": total, "parts": rows, "groups": groups,
        "headline": f"{format_count(total)} training tokens a pass, "
        f"{sum(group['docs'] for group in train):,} documents",
    }  # fmt: skip


def _missed(cfg: ComposeConfig, parts: list[Part]) -> list[str]:
    """Name the wishes that the repetition limits do not allow.

    Raises:
        PunaError: There are some, and the composition is to be strict.
    """
    planned = sum(part.target for part in parts)
    missed = []
    for part in parts:
        share = part.target / planned if planned else 0.0
        if part.share is not None and abs(share - part.share) > SHARE_TOLERANCE:
            limited = part.factor >= part.limit * (1 - 1e-9)
            why = (f"its {format_count(part.n_tokens)} tokens are read {part.limit:g} times at most"
                   if limited else "other parts are at their limits")  # fmt: skip
            missed.append(f"{part.name}: share {share:.1%} instead of {part.share:.1%}; {why}")
    if cfg.budget_tokens is not None and planned < cfg.budget_tokens * (1 - SHARE_TOLERANCE):
        missed.append(f"{format_count(planned)} of {format_count(cfg.budget_tokens)} tokens of the "
                      "budget: the repetition limits allow no more")  # fmt: skip
    if missed and cfg.strict:
        raise PunaError(
            f"data.compose: {missed[0]}",
            "bring more documents, lower the share or the budget, raise max_epochs, or leave out "
            "`strict`",
        )
    for line in missed:
        say(f"  not reached: {line}")
    return missed
