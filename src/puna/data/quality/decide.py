"""Kernels of the stage: score every document, then keep or drop it by its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.data.engine.shards import VERDICT_FIELDS
from puna.data.kernels.buffers import texts_from, texts_of
from puna.data.quality.balance import draws
from puna.data.quality.classifier import Classifier, Task, load_classifier

if TYPE_CHECKING:
    import pyarrow as pa

    from puna.data.engine.base import Shard

LOW, HIGH, SAMPLED, BALANCE = "quality.low", "quality.high", "quality.sampled", "domain.balance"


@dataclass(frozen=True)
class Use:
    """A classifier of the stage; its path is no part of its identity, its content is."""

    name: str
    digest: str
    path: str = field(repr=False)
    positive: str | None

    def load(self) -> Classifier:
        """Return the classifier (kept in memory by the process)."""
        return load_classifier(Path(self.path), self.positive)


@dataclass(frozen=True)
class ScoreKernel:
    """Scores documents.

    Attributes:
        uses: The classifiers.
    """

    uses: tuple[Use, ...]
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the columns of all classifiers."""
        import pyarrow as pa

        return pa.schema([one for use in self.uses for one in use.load().columns(use.name)])

    def prepare(self) -> None:
        """Load and compile."""
        texts = texts_from(["some words to compile with"])
        for use in self.uses:
            use.load().score(texts)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row of scores per document."""
        import pyarrow as pa

        texts = texts_of(batch.column("text"))
        values = [column for use in self.uses for column in use.load().score(texts)]
        schema = self.adds()
        arrays = [pa.array(column, f.type) for column, f in zip(values, schema, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


@dataclass(frozen=True)
class Rule:
    """When a score drops a document.

    Attributes:
        name: Column of the score (or of the label).
        task: What the classifier gives.
        sources: Sources that the rule is for; empty for all.
        min: Lowest score that is kept.
        max: Highest score that is kept.
        share_thresholds: Source (or ``""`` for all) -> the threshold that keeps the wanted share.
        pareto_alpha: Shape of Pareto sampling.
        probabilities: Label -> keep probability.
        seed: Seed of the draws.
    """

    name: str
    task: Task
    sources: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    share_thresholds: Mapping[str, float] = field(default_factory=dict)
    pareto_alpha: float | None = None
    probabilities: Mapping[str, float] | None = None
    seed: int = 0

    @property
    def lower_is_better(self) -> bool:
        """Tell whether documents with low scores are the wanted ones."""
        return self.task == "bits"


@dataclass
class _Verdicts:
    reason: np.ndarray
    value: np.ndarray
    threshold: np.ndarray
    detail: np.ndarray

    @classmethod
    def keep_all(cls, n: int) -> _Verdicts:
        return cls(*(np.full(n, None, object) for _ in range(4)))

    def drop(
        self, is_dropped: np.ndarray, reason: str, value: np.ndarray, threshold: Any, name: str
    ) -> None:
        """Write a finding into the documents that no earlier one has dropped."""
        rows = np.flatnonzero(is_dropped & (self.reason == None))  # noqa: E711 - element by element
        self.reason[rows], self.detail[rows] = reason, name
        self.value[rows] = value[rows]
        self.threshold[rows] = np.broadcast_to(threshold, len(value))[rows]


@dataclass(frozen=True)
class DecisionKernel:
    """Applies rules to scores from the side table; the first rule that a document fails counts.

    Attributes:
        rules: In order.
        added: Columns of the side table to append to the documents: name and Arrow type.
    """

    rules: tuple[Rule, ...]
    added: tuple[tuple[str, str], ...]
    columns: tuple[str, ...] = field(default=("id", "source"), repr=False)

    def adds(self) -> pa.Schema:
        """Return the verdict columns and the scores."""
        import pyarrow as pa

        fields = [pa.field(name, pa.type_for_alias(kind)) for name, kind in self.added]
        return pa.schema([*VERDICT_FIELDS, *fields])

    def prepare(self) -> None:
        """Nothing to compile."""

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one verdict per document."""
        import pyarrow as pa

        verdicts = _Verdicts.keep_all(batch.num_rows)
        sources = np.asarray(batch.column("source").to_pylist(), object)
        ids = batch.column("id").to_pylist()
        for rule in self.rules:
            column = batch.column(rule.name)
            concerned = np.full(batch.num_rows, True)
            if rule.sources:
                concerned = np.isin(sources.astype(str), list(rule.sources))
            if rule.task == "labels":
                _judge_label(rule, column.to_pylist(), ids, concerned, verdicts)
            else:
                scores = column.to_numpy(zero_copy_only=False)
                _judge_score(rule, scores, sources, ids, concerned, verdicts)
        schema = self.adds()
        given = (verdicts.reason, verdicts.value, verdicts.threshold, verdicts.detail)
        arrays = [pa.array(list(v), f.type) for v, f in zip(given, VERDICT_FIELDS, strict=True)]
        arrays += [batch.column(name) for name, _ in self.added]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _judge_score(
    rule: Rule,
    scores: np.ndarray,
    sources: np.ndarray,
    ids: list[str],
    concerned: np.ndarray,
    verdicts: _Verdicts,
) -> None:
    if rule.min is not None:
        verdicts.drop(concerned & (scores < rule.min), LOW, scores, rule.min, rule.name)
    if rule.max is not None:
        verdicts.drop(concerned & (scores > rule.max), HIGH, scores, rule.max, rule.name)
    if rule.share_thresholds:
        for_all = rule.share_thresholds.get("", np.nan)
        limits = np.array([rule.share_thresholds.get(one, for_all) for one in sources], float)
        if rule.lower_is_better:
            verdicts.drop(concerned & (scores > limits), HIGH, scores, limits, rule.name)
        else:
            verdicts.drop(concerned & (scores < limits), LOW, scores, limits, rule.name)
    if rule.pareto_alpha is not None:
        # numpy's pareto, by inversion: GPT-3 keeps a document when the draw exceeds 1 - score.
        drawn = (1.0 - draws(ids, rule.name, rule.seed)) ** (-1.0 / rule.pareto_alpha) - 1.0
        verdicts.drop(concerned & (drawn <= 1.0 - scores), SAMPLED, scores, 1.0 - drawn, rule.name)


def _judge_label(
    rule: Rule, labels: list[str], ids: list[str], concerned: np.ndarray, verdicts: _Verdicts
) -> None:
    if rule.probabilities is not None:
        limits = np.array([rule.probabilities.get(label, 0.0) for label in labels], float)
        drawn = draws(ids, rule.name, rule.seed)
        verdicts.drop(concerned & (drawn >= limits), BALANCE, drawn, limits, rule.name)
