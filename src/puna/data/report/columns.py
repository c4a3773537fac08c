"""Signals that a stage has written down: columns of documents, pairs, hits, rejected values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from puna.data.report.folders import DataStage
from puna.data.report.histogram import histogram
from puna.data.report.measured import Check, Signal
from puna.data.report.sample import Sample

_PAIRS = (
    ("similarity", "near", "duplicate.near",
     "similarity of each dropped document and the one kept for it"),
    ("cosine", "threshold", None,
     "cosine of each dropped document and the one kept for it"),
)  # fmt: skip
_HITS = {
    "ngrams": "share of an evaluation example's words that a document holds, for each hit",
    "embedding": "cosine of an evaluation example and a passage, for each hit",
}
_MAX_MARKS = 8
"""Thresholds that a chart shows; those set for every example by itself are not drawn."""


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
    return [*_pair_charts(stage), *_hit_charts(stage)]


def _pair_charts(stage: DataStage) -> Iterator[dict[str, Any]]:
    path = stage.artifact.path / "pairs.parquet"
    names = pq.read_schema(path).names if path.is_file() else []
    for column, limit, reason, title in _PAIRS:
        if column in names:
            values = pq.read_table(path, columns=[column])[column].cast(pa.float64()).to_numpy()
            marks = [float(stage.artifact.config[limit])]
            yield from _chart(path.name, title, reason, {"rejected": values}, marks)


def _hit_charts(stage: DataStage) -> Iterator[dict[str, Any]]:
    from puna.data.decontaminate.matching import reason_of

    path = stage.artifact.path / "hits.parquet"
    if not path.is_file():
        return
    table = pq.read_table(path, columns=["coverage", "counts", "method", "threshold"])
    for method in sorted(table["method"].unique().to_pylist()):
        hits = table.filter(pc.call_function("equal", [table["method"], pa.scalar(method)]))
        values = hits["coverage"].to_numpy()
        acted = np.asarray(hits["counts"].to_numpy(), bool)
        marks = sorted(set(hits["threshold"].drop_null().to_pylist()))
        title = _HITS.get(method, f"what {method} measured, for each hit")
        parts = {"rejected": values[acted], "kept": values[~acted]}
        shown = marks if len(marks) <= _MAX_MARKS else []
        yield from _chart(path.name, title, reason_of(method), parts, shown)


def _chart(
    file: str, title: str, reason: str | None, parts: dict[str, np.ndarray], marks: list[float]
) -> Iterator[dict[str, Any]]:
    counted = histogram(parts, marks)
    if counted is not None:
        n_values = sum(int(np.isfinite(values).sum()) for values in parts.values())
        yield {"title": title, "file": file, "reason": reason, "thresholds": marks,
               "n": n_values, "histogram": counted}  # fmt: skip


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
