"""Signals measured anew over a sample: what every check of a stage says of kept documents, too.

As ``puna data label`` and ``puna data try`` do it: no document is dropped, so every check sees
every document, and filters that rewrite hand their text on to those behind them, as in the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa

from puna.data.filter import FilterStageConfig
from puna.data.filters.base import FilterConfig, Finding
from puna.data.filters.batch import TextBatch
from puna.data.filters.profiles import name_of
from puna.data.filters.rules import Rules
from puna.data.kernels.buffers import texts_of
from puna.data.report.folders import DataStage
from puna.data.report.sample import Sample, texts_of_sample
from puna.data.safety.config import SafetyConfig
from puna.data.safety.stage import make_kernel

Side = Literal["above", "below"]
_BATCH_ROWS = 1024


@dataclass
class Check:
    """One comparison with a threshold.

    Attributes:
        reason: Code under which it rejects; empty for a number that nothing is rejected for.
        fails: The side of the threshold on which documents are rejected.
        threshold: Per document of the sample; NaN where there is none.
        failed: Documents that fail it, whether an earlier check has rejected them or not.
    """

    reason: str
    fails: Side | None
    threshold: np.ndarray
    failed: np.ndarray


@dataclass
class Signal:
    """What one number says about the documents of a sample.

    Attributes:
        group: What measures it: a filter, a scorer, or the stage.
        values: Per document of the sample; NaN where it was not measured.
        checks: What the number is compared with.
        title: What it is called when it has no check.
        detail: Name by which rejections tell it from other signals with the same reasons.
    """

    group: str
    values: np.ndarray
    checks: list[Check]
    title: str = ""
    detail: str | None = None

    @property
    def reasons(self) -> list[str]:
        """Codes of the checks."""
        return [check.reason for check in self.checks]


@dataclass
class Measured:
    """Signals of a stage.

    Attributes:
        signals: In the order in which they are checked.
        first_failed: The reason of the first check that each document fails, None for none.
    """

    signals: list[Signal]
    first_failed: list[str | None]


@dataclass
class _Collected:
    """Findings of one place in the order of checks, put together from batches and sources."""

    n: int
    reason: str
    group: str
    values: np.ndarray = field(init=False)
    threshold: np.ndarray = field(init=False)
    failed: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.values, self.threshold = np.full(self.n, np.nan), np.full(self.n, np.nan)
        self.failed = np.zeros(self.n, bool)

    def add(self, where: np.ndarray, finding: Finding) -> None:
        self.values[where] = finding.value
        self.failed[where] = finding.failed
        if np.isfinite(finding.threshold):
            self.threshold[where] = finding.threshold

    def signal(self) -> Signal:
        side = _side(self.values, self.threshold, self.failed)
        return Signal(
            self.group, self.values, [Check(self.reason, side, self.threshold, self.failed)]
        )


def _side(values: np.ndarray, threshold: np.ndarray, failed: np.ndarray) -> Side | None:
    """Tell on which side of the threshold documents fail, by those that do, else that pass."""
    above, below = values > threshold, values < threshold
    if failed.any():
        return "above" if above[failed].sum() >= below[failed].sum() else "below"
    if np.isnan(threshold).all():
        return None
    return "above" if below.sum() >= above.sum() else "below"


def measure_filters(stage: DataStage, sample: Sample) -> Measured:
    """Measure what the filters of ``data.filter`` compare.

    Args:
        stage: A finished ``data.filter``.
        sample: Documents that came to it.

    Raises:
        PunaError: A filter of a plugin is not installed here.
    """
    cfg = FilterStageConfig.model_validate(stage.artifact.config)
    made = {name: rules.make() for name, rules in cfg.sources.items()}
    default, n = cfg.default.make(), sample.rows.num_rows
    found: dict[tuple[str, str, int], _Collected] = {}
    first_failed: list[str | None] = [None] * n
    for where, table in texts_of_sample(stage, sample):
        sources = np.asarray(table["source"].to_pylist(), object)
        for source in sorted(set(sources.tolist())):
            rows = np.flatnonzero(sources == source)
            for low in range(0, len(rows), _BATCH_ROWS):
                part = table.take(pa.array(rows[low : low + _BATCH_ROWS]))
                places = where[rows[low : low + _BATCH_ROWS]]
                for name, order, finding in _findings(made.get(source, default), part):
                    key = (name, finding.reason, order)
                    one = found.setdefault(key, _Collected(n, finding.reason, name))
                    one.add(places, finding)
                    for place in places[finding.failed].tolist():
                        first_failed[place] = first_failed[place] or finding.reason
    return Measured(_joined(one.signal() for one in found.values()), first_failed)


def _findings(rules: Rules, table: pa.Table) -> Iterator[tuple[str, int, Finding]]:
    """Yield filter, how often the reason came before in this filter, and the finding."""
    docs = TextBatch(
        table["text"].combine_chunks().cast(pa.large_string()), table["path"].to_pylist()
    )
    for position, one in enumerate(rules.filters):
        name, seen = _name(one, rules.filters[:position]), dict[str, int]()
        for finding in one.judge(docs):
            yield name, seen.get(finding.reason, 0), finding
            seen[finding.reason] = seen.get(finding.reason, 0) + 1


def _name(one: FilterConfig, earlier: tuple[FilterConfig, ...]) -> str:
    """Name a filter; the second of the same kind in a list is another one."""
    name = name_of(one)
    n = sum(name_of(other) == name for other in earlier)
    return name if n == 0 else f"{name} ({n + 1})"


def _joined(signals: Iterable[Signal]) -> list[Signal]:
    """Join checks of one number from both sides (fewer than, more than) to one signal."""
    joined: list[Signal] = []
    for signal in signals:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.group == signal.group
            and len(last.checks) == 1
            and {last.checks[0].fails, signal.checks[0].fails} == {"above", "below"}
            and np.array_equal(last.values, signal.values, equal_nan=True)
            and not np.array_equal(last.checks[0].threshold, signal.checks[0].threshold)
        ):
            last.checks += signal.checks
        else:
            joined.append(signal)
    return joined


def measure_safety(stage: DataStage, sample: Sample) -> Measured:
    """Measure the terms and classifiers of ``data.safety``; personal data is not looked for.

    Raises:
        PunaError: A list or a model that the stage has used is gone.
    """
    kernel = make_kernel(SafetyConfig.model_validate(stage.artifact.config))
    n = sample.rows.num_rows
    found = {check.reason: _Collected(n, check.reason, check.reason) for check in kernel.terms}
    models = {one.name: _Collected(n, "safety.model", one.name) for one in kernel.models}
    if not found and not models:
        return Measured([], [None] * n)
    for where, table in texts_of_sample(stage, sample):
        texts = texts_of(table["text"])
        sources = np.asarray(table["source"].to_pylist(), str)
        for check in kernel.terms:
            terms = check.terms.measure(texts)
            failed = (terms.per_1000 > check.max_per_1000) & (
                terms.n_distinct >= check.min_distinct
            )
            failed &= ~np.isin(sources, list(check.except_sources))
            finding = Finding(check.reason, terms.per_1000, check.max_per_1000, failed)
            found[check.reason].add(where, finding)
        for model in kernel.models:
            scores = model.scores(texts)
            failed = (scores > model.use.max) & ~np.isin(sources, list(model.use.except_sources))
            models[model.name].add(where, Finding("safety.model", scores, model.use.max, failed))
    signals = [one.signal() for one in found.values()]
    signals += [replace(one.signal(), detail=name) for name, one in models.items()]
    return Measured(signals, [None] * n)
