"""Reads the data stages of a run into the JSON value that ``puna data report`` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.data.chain import DATA_STAGES
from puna.data.engine.base import add_flow, empty_flow
from puna.data.engine.shards import shard_flow
from puna.data.flow import Count, FlowRow, Funnel, flow_rows, funnel
from puna.data.reasons import meaning_of
from puna.data.report.cases import Rejected, complete, kept_beside
from puna.data.report.columns import column_signals, columns_of, rejected_chart, table_charts
from puna.data.report.corpus import Corpus, length_chart
from puna.data.report.folders import PLACES, DataStage, Place, open_run, unfinished
from puna.data.report.histogram import histogram
from puna.data.report.measured import Check, Measured, Signal, measure_filters, measure_safety
from puna.data.report.sample import Sample, draw

SCHEMA_VERSION = 1
_MAX_THRESHOLDS = 6
_MEASURE = {"data.filter": measure_filters, "data.safety": measure_safety}


@dataclass(frozen=True)
class Settings:
    """How much is looked at.

    Attributes:
        sample: Documents per stage whose signals are measured.
        margin: Documents shown on each side of a threshold.
        seed: Of the sample.
        documents: Folder of the documents that the run's first data stage read, when it is not in
            the run.
    """

    sample: int = 20_000
    margin: int = 3
    seed: int = 0
    documents: Path | None = None


def collect_data(
    run_dir: Path, settings: Settings, *, on_step: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Gather everything that the page on a run's data shows.

    Args:
        run_dir: Folder of the run; stages that are not finished are left out and named.
        settings: How much is looked at.
        on_step: Told what is looked at next.

    Returns:
        JSON values; equal for equal documents, in whatever shards and by however many workers the
        run was made.

    Raises:
        PunaError: There is no such run, or no data stage of it is finished.
    """
    stages = open_run(run_dir, settings.documents)
    flow = funnel(run_dir)
    sections = []
    for stage in stages:
        on_step(stage.name)
        sections.append(_stage(stage, flow, run_dir, settings))
    on_step("before and after")
    return {
        "data_report_schema_version": SCHEMA_VERSION,
        "run": run_dir.resolve().name,
        "sample": settings.sample,
        "margin": settings.margin,
        "seed": settings.seed,
        "stages": sections,
        "unfinished": unfinished(run_dir, DATA_STAGES),
        "bytes_per_token": flow.bytes_per_token,
        "corpus": _corpora(stages, settings),
    }


def _stage(stage: DataStage, flow: Funnel, run_dir: Path, settings: Settings) -> dict[str, Any]:
    rows = [row for row in flow.rows if row.stage == stage.name] or _counted(stage)
    rejected = Rejected(stage, settings.margin, settings.seed, settings.sample)
    sample = draw(stage, settings.sample, settings.seed, columns=columns_of(stage))
    measured, notes = _measured(stage, sample)
    cases: list[tuple[str, dict[str, Any]]] = []
    signals = [_signal(one, sample, settings, cases) for one in measured.signals if sample]
    reasons = _reasons(rows, rejected, cases)
    complete(stage, run_dir, cases)
    covered = {reason for signal in measured.signals for reason in signal.reasons}
    charts = table_charts(stage)
    covered |= {chart["reason"] for chart in charts if chart["reason"]}
    for reason, table in rejected.values.items():
        if reason not in covered and table is not None:
            values, limits = table["value"].to_numpy(), table["threshold"].drop_null()
            chart = rejected_chart(reason, values, limits.unique().to_pylist())
            charts += [chart] if chart is not None else []
    return {
        "stage": stage.name,
        "flow": [_row(row) for row in rows],
        "total": _row(_total(stage.name, rows)),
        "reasons": reasons,
        "languages": _languages(stage),
        "sample": None if sample is None else _about(stage, sample, measured),
        "signals": signals,
        "charts": charts,
        "notes": notes,
    }


def _measured(stage: DataStage, sample: Sample | None) -> tuple[Measured, list[str]]:
    """Measure signals; tell why there are none when lists, models or plugins are gone."""
    nothing = Measured([], [])
    if sample is None:
        return nothing, ["No document came to this stage."]
    if stage.name not in _MEASURE:
        return Measured(column_signals(stage, sample), []), []
    try:
        return _MEASURE[stage.name](stage, sample), []
    except PunaError as error:
        why = error.message
    except ValidationError as error:  # a filter of a plugin that is not installed here
        why = error.errors(include_url=False)[0]["msg"]
    return nothing, [f"Signals could not be measured: {why}"]


def _about(stage: DataStage, sample: Sample, measured: Measured) -> dict[str, Any]:
    """Describe the sample; tell whether measuring anew gave the verdicts of the run."""
    reasons = sample.rows["reason"].to_pylist()
    about: dict[str, Any] = {
        "docs": sample.rows.num_rows,
        "of": sample.n_docs,
        "kept": int(sample.kept.sum()),
        "texts_as_given": stage.given is not None,
        "same_verdict": None,
    }
    if stage.name == "data.filter" and measured.signals:
        same = sum(a == b for a, b in zip(reasons, measured.first_failed, strict=True))
        about["same_verdict"] = same
    return about


def _signal(
    signal: Signal, sample: Sample, settings: Settings, cases: list[tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    kept = sample.kept
    reasons = np.asarray(sample.rows["reason"].to_pylist(), object)
    here = np.isin(reasons.astype(str), signal.reasons) & ~kept
    if signal.detail is not None and "detail" in sample.rows.column_names:
        here &= np.asarray(sample.rows["detail"].to_pylist(), object) == signal.detail
    other = ~kept & ~here
    limits = [_thresholds(check, sample) for check in signal.checks]
    marks = [one["value"] for found in limits for one in found]
    groups = {"kept": kept, "rejected_here": here, "rejected_otherwise": other}
    counted = histogram(
        {name: signal.values[rows] for name, rows in groups.items()}, marks[:_MAX_THRESHOLDS]
    )
    return {
        "group": signal.group,
        "title": signal.title or signal.group,
        "n": int(np.isfinite(signal.values).sum()),
        "checks": [
            {
                "reason": check.reason,
                "meaning": meaning_of(check.reason),
                "fails": check.fails,
                "thresholds": found[:_MAX_THRESHOLDS],
                "n_thresholds": len(found),
                "n_failed": int(check.failed.sum()),
                "n_below": int((signal.values < check.threshold).sum()),
                "n_at": int((signal.values == check.threshold).sum()),
                "n_above": int((signal.values > check.threshold).sum()),
                "kept": _kept(signal, check, sample, settings.margin, cases),
            }
            for check, found in zip(signal.checks, limits, strict=True)
        ],
        "histogram": counted,
    }


def _kept(
    signal: Signal, check: Check, sample: Sample, k: int, cases: list[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    if check.fails is None:
        return []
    found = kept_beside(signal, check, sample, k)
    cases += [(check.reason, case) for case in found]
    return found


def _thresholds(check: Check, sample: Sample) -> list[dict[str, Any]]:
    """Return the thresholds with the sources that have them (all: None)."""
    sources = np.asarray(sample.rows["source"].to_pylist(), str)
    values = sorted(set(check.threshold[np.isfinite(check.threshold)].tolist()))
    found = []
    for value in values:
        of = sorted(set(sources[check.threshold == value].tolist()))
        found.append({"value": value, "sources": None if len(of) == len(set(sources)) else of})
    return found


def _reasons(
    rows: list[FlowRow], rejected: Rejected, cases: list[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Reasons with counts, the most frequent first, and the documents nearest to the threshold."""
    total = _total("", rows)
    found = []
    for reason in sorted(total.rejected, key=lambda one: (-total.rejected[one].docs, one)):
        count = total.rejected[reason]
        shown = rejected.cases(reason)
        cases += [(reason, case) for case in shown]
        table = rejected.values.get(reason)
        limits = [] if table is None else table["threshold"].drop_null().unique().to_pylist()
        found.append(
            {
                "reason": reason,
                "meaning": meaning_of(reason),
                "docs": count.docs,
                "bytes": count.n_bytes,
                "share": count.docs / total.in_docs if total.in_docs else 0.0,
                "by_source": {
                    row.source: row.rejected[reason].docs for row in rows if reason in row.rejected
                },
                "thresholds": sorted(limits)[:_MAX_THRESHOLDS],
                "rejected": shown,
            }
        )
    return found


def _counted(stage: DataStage) -> list[FlowRow]:
    """Count a stage whose metrics have no flow."""
    total: dict[str, Any] = {}
    for place in PLACES:
        for _, _, table in stage.tables(place, ["source", "n_bytes", "reason"]):
            nothing = table.slice(0, 0)
            rejected = table if place == "rejected" else None
            narrow = table.select(["source", "n_bytes"])
            kept = narrow if place == "kept" else nothing.select(["source", "n_bytes"])
            if rejected is None:
                rejected = nothing.append_column("reason", nothing["source"])
            for source, part in shard_flow(narrow, kept, rejected).items():
                add_flow(total.setdefault(source, empty_flow()), part)
    return flow_rows(stage.name, {"flow": total})


def _total(stage: str, rows: list[FlowRow]) -> FlowRow:
    return Funnel([FlowRow(stage, *_rest(row)) for row in rows], 1.0).total(stage)


def _rest(row: FlowRow) -> tuple[str, int, int, int, int, dict[str, Count]]:
    return row.source, row.in_docs, row.in_bytes, row.kept_docs, row.kept_bytes, row.rejected


def _row(row: FlowRow) -> dict[str, Any]:
    rejected_bytes = sum(count.n_bytes for count in row.rejected.values())
    return {
        "source": row.source,
        "in_docs": row.in_docs,
        "in_bytes": row.in_bytes,
        "kept_docs": row.kept_docs,
        "kept_bytes": row.kept_bytes,
        "rejected_docs": row.rejected_docs,
        "rejected_bytes": rejected_bytes,
        "conserved": row.in_docs == row.kept_docs + row.rejected_docs,
    }


def _languages(stage: DataStage) -> list[dict[str, Any]]:
    """Count documents by the language that ``data.filter`` has named; "" where it named none."""
    counts: dict[Place, Counter[str]] = {place: Counter() for place in PLACES}
    sizes: Counter[str] = Counter()
    if "language" not in stage.columns("kept"):
        return []
    for place in PLACES:
        for _, _, table in stage.tables(place, ["language", "n_bytes"]):
            if "language" not in table.column_names:
                continue
            sums = table.group_by("language").aggregate([("n_bytes", "sum"), ("n_bytes", "count")])
            for row in sums.to_pylist():
                counts[place][row["language"] or ""] += row["n_bytes_count"]
                if place == "kept":
                    sizes[row["language"] or ""] += row["n_bytes_sum"]
    names = sorted({*counts["kept"], *counts["rejected"]},
                   key=lambda one: (-counts["kept"][one], one))  # fmt: skip
    return [
        {"language": name, "kept_docs": counts["kept"][name], "kept_bytes": sizes[name],
         "rejected_docs": counts["rejected"][name]}
        for name in names
    ]  # fmt: skip


def _corpora(stages: list[DataStage], settings: Settings) -> dict[str, Any]:
    """Describe what came to the first stage that judges, and what the last one kept.

    When the documents that came are not there, they are what the stage kept, as it left them, and
    what it rejected.
    """
    first, last = stages[0], stages[-1]
    places: tuple[Place, ...] = PLACES
    if first.given is not None or first.name == DATA_STAGES[0]:
        first, places = first.given or first, ("kept",)

    def described(stage: DataStage, of: tuple[Place, ...]) -> Corpus:
        return Corpus(stage, of, draw(stage, settings.sample, settings.seed, places=of))

    before = described(first, places)
    after = described(last, ("kept",)) if (last, ("kept",)) != (first, places) else None
    return {
        "before_stage": first.name,
        "before_as_given": places == ("kept",),
        "after_stage": last.name,
        "before": before.to_json(),
        "after": None if after is None else after.to_json(before),
        "lengths": length_chart(before, after),
    }
