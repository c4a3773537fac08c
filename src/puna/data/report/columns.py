"""Signals that a stage has written down: columns of documents, pairs, hits, rejected values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puna.data.report.folders import DataStage
from puna.data.report.histogram import histogram
from puna.data.report.measured import Check, Signal
from puna.data.report.sample import Sample

_PAIRS = (
    ("pairs.parquet", "similarity", "duplicate.near",
     "similarity of each dropped document and the one kept for it"),
    ("pairs.parquet", "cosine", "",
     "cosine of each dropped document and the one kept for it"),
    ("hits.parquet", "coverage", "decontaminate.match",
     "share of an evaluation example's words that a document holds, for each hit"),
)  # fmt: skip
_LIMITS = {"similarity": "near", "cosine": "threshold", "coverage": "min_coverage"}


def columns_of(stage: DataStage) -> list[str]:
    """Name the columns that :func:`column_signals` reads."""
    if stage.name == "data.quality":
        wanted = [*stage.artifact.config["scorers"], "detail"]
    elif stage.name == "data.lines":
        wanted = ["n_bytes", "lines_cut", "bytes_cut"]
    else:
        wanted = ["detail"] if stage.name == "data.safety" else []
    known = {*stage.columns("kept"), *stage.columns("rejected")}
    return [name for name in wanted if name in known]


def column_signals(stage: DataStage, sample: Sample) -> list[Signal]:
    """Return the signals that stand in the columns of documents, kept and rejected."""
    if stage.name == "data.quality":
        return _scores(stage, sample)
    if stage.name == "data.lines" and "lines_cut" in sample.rows.column_names:
        return _cut_lines(stage, sample)
    return []


def _scores(stage: DataStage, sample: Sample) -> list[Signal]:
    sources = np.asarray(sample.rows["source"].to_pylist(), str)
    signals = []
    for name, use in stage.artifact.config["scorers"].items():
        if name not in sample.rows.column_names:
            continue
        kind = sample.rows.schema.field(name).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            continue
        summary = stage.artifact.metrics["scorers"][name]
        values, checks = sample.column(name), []
        concerned = np.isin(sources, use["sources"]) if use["sources"] else values == values
        for key, fails in (("min", "below"), ("max", "above")):
            if use[key] is not None:
                limit = np.where(concerned, float(use[key]), np.nan)
                checks.append(_check(values, limit, fails))
        shares = summary.get("share_thresholds") or {}
        if shares:
            for_all = shares.get("", np.nan)
            limits = np.array([shares.get(one, for_all) for one in sources.tolist()], float)
            fails = "above" if summary["task"] == "bits" else "below"
            checks.append(_check(values, np.where(concerned, limits, np.nan), fails))
        if use["pareto_alpha"] is not None:
            nothing = np.full(len(values), np.nan)
            reasons = np.asarray(sample.rows["reason"].to_pylist(), object)
            checks.append(Check("quality.sampled", None, nothing, reasons == "quality.sampled"))
        signals.append(Signal(name, values, checks, title=name, detail=name))
    return signals


def _check(values: np.ndarray, limit: np.ndarray, fails: Any) -> Check:
    failed = values < limit if fails == "below" else values > limit
    return Check("quality.low" if fails == "below" else "quality.high", fails, limit, failed)


def _cut_lines(stage: DataStage, sample: Sample) -> list[Signal]:
    """Bytes left of documents that lost lines; the share that was cut from those that are kept."""
    n_bytes, cut = sample.column("n_bytes"), sample.column("bytes_cut")
    lines, kept = sample.column("lines_cut"), sample.kept
    left = np.where(kept, n_bytes, n_bytes - cut)  # rejected documents keep the text as it came
    before = np.where(kept, n_bytes + cut, n_bytes)
    least = float(stage.artifact.config["min_left_bytes"])
    touched = lines > 0
    left = np.where(touched, left, np.nan)
    check = Check(
        "lines.emptied", "below", np.where(touched, least, np.nan), touched & (left < least)
    )
    share = np.where(touched, cut / np.maximum(before, 1), np.nan)
    return [
        Signal("bytes left", left, [check]),
        Signal("share cut", share, [], title="share of bytes cut, where lines were cut"),
    ]


def table_charts(stage: DataStage) -> list[dict[str, Any]]:
    """Count the numbers in the tables beside the documents: pairs of duplicates, hits."""
    charts = []
    for file, column, reason, title in _PAIRS:
        path = stage.artifact.path / file
        if not path.is_file() or column not in pq.read_schema(path).names:
            continue
        names = [column, *(["counts"] if file == "hits.parquet" else [])]
        table = pq.read_table(path, columns=names)
        values = table[column].cast(pa.float64()).to_numpy()
        acted = np.ones(len(values), bool)
        if "counts" in names:
            acted = np.asarray(table["counts"].to_numpy(), bool)
        config = stage.artifact.config
        limit = config.get(
            {"similarity": "near", "cosine": "threshold"}.get(column, "min_coverage")
        )
        marks = [float(limit)] if limit else []
        counted = histogram({"rejected": values[acted], "kept": values[~acted]}, marks)
        if counted is not None:
            charts.append({"title": title, "file": file, "reason": reason or None,
                           "thresholds": marks, "n": int(np.isfinite(values).sum()),
                           "histogram": counted})  # fmt: skip
    return charts


def rejected_chart(
    reason: str, values: np.ndarray, thresholds: Sequence[float]
) -> dict[str, Any] | None:
    """Count the values of everything rejected for a reason; None where they tell nothing."""
    finite = values[np.isfinite(values)]
    if not len(finite) or (finite == finite[0]).all():
        return None
    marks = sorted(set(thresholds))
    few = marks if len(marks) <= 4 else []
    counted = histogram({"rejected": values}, few)
    return {"title": reason, "file": "rejected/", "reason": reason, "thresholds": few,
            "n": len(finite), "histogram": counted}  # fmt: skip
