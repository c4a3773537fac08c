"""How good scores are: ranking, decisions, calibration, bias per source, and their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RELIABILITY_BINS = 10


class Ranking:
    """Binary labels ordered by score, so that resampling needs no sorting.

    Args:
        scores: float64 [n]; higher means more positive.
        is_positive: bool [n].
    """

    def __init__(self, scores: np.ndarray, is_positive: np.ndarray) -> None:
        self._order = np.argsort(-scores, kind="stable")
        ordered = scores[self._order]
        ends = np.flatnonzero(np.concatenate([ordered[1:] != ordered[:-1], [True]]))
        self._ends, self._positive = ends, is_positive[self._order]

    def curves(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return true and false positives at every distinct threshold, the highest first."""
        w = np.ones(len(self._order)) if weights is None else weights[self._order]
        positives = np.cumsum(w * self._positive)[self._ends]
        return positives, np.cumsum(w)[self._ends] - positives

    def auc(self, weights: np.ndarray | None = None) -> float:
        """Return the area under the ROC curve; ties count one half. NaN with one class only."""
        tp, fp = (np.concatenate([[0.0], part]) for part in self.curves(weights))
        if tp[-1] == 0 or fp[-1] == 0:
            return float("nan")
        return float(((fp[1:] - fp[:-1]) * (tp[1:] + tp[:-1])).sum() / 2 / tp[-1] / fp[-1])

    def average_precision(self, weights: np.ndarray | None = None) -> float:
        """Return the sum of precision times gain in recall over all thresholds."""
        tp, fp = self.curves(weights)
        if tp[-1] == 0:
            return float("nan")
        precision = tp / np.maximum(tp + fp, 1e-12)
        return float((np.diff(np.concatenate([[0.0], tp])) * precision).sum() / tp[-1])


def confusion(is_kept: np.ndarray, is_positive: np.ndarray) -> dict[str, int]:
    """Count true and false positives and negatives."""
    return {
        "true_positives": int((is_kept & is_positive).sum()),
        "false_positives": int((is_kept & ~is_positive).sum()),
        "true_negatives": int((~is_kept & ~is_positive).sum()),
        "false_negatives": int((~is_kept & is_positive).sum()),
    }


def reliability(probabilities: np.ndarray, is_true: np.ndarray) -> dict[str, Any]:
    """Compare predicted with observed frequencies in ten bins of equal width.

    Returns:
        The table, and the expected calibration error: the mean gap, weighted by documents.
    """
    bins = np.minimum((probabilities * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    table, error = [], 0.0
    for index in range(RELIABILITY_BINS):
        inside = bins == index
        n = int(inside.sum())
        if n:
            predicted, observed = probabilities[inside].mean(), is_true[inside].mean()
            error += n / len(bins) * abs(predicted - observed)
            table.append({"from": index / RELIABILITY_BINS, "to": (index + 1) / RELIABILITY_BINS,
                          "docs": n, "predicted": float(predicted),
                          "observed": float(observed)})  # fmt: skip
    return {"ece": float(error), "table": table}


def intervals(
    scores: np.ndarray, is_positive: np.ndarray, is_kept: np.ndarray, *, n_resamples: int, seed: int
) -> dict[str, list[float]]:
    """Return 95 % intervals of AUC, average precision and accuracy by the bootstrap (percentiles).

    Documents are drawn with replacement inside each class, so no resample lacks one.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    ranking = Ranking(scores, is_positive)
    is_right = is_kept == is_positive
    classes = [np.flatnonzero(is_positive == value) for value in (False, True)]
    found = []
    for _ in range(n_resamples):
        weights = np.zeros(len(scores))
        for members in classes:
            if len(members):
                drawn = random.integers(0, len(members), len(members))
                weights[members] = np.bincount(drawn, minlength=len(members))
        found.append((ranking.auc(weights), ranking.average_precision(weights),
                      float(weights @ is_right / weights.sum())))  # fmt: skip
    low, high = np.percentile(np.array(found), [2.5, 97.5], axis=0)
    names = ("auc", "average_precision", "accuracy")
    return {name: [float(low[k]), float(high[k])] for k, name in enumerate(names)}


def binary_report(
    scores: np.ndarray,
    is_positive: np.ndarray,
    sources: Sequence[str],
    threshold: float,
    *,
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Measure calibrated scores of two classes.

    Args:
        scores: Probabilities, float64 [n].
        is_positive: bool [n].
        sources: Source of each document, for the bias table.
        threshold: From which score a document is kept.
        n_resamples: Resamples of the bootstrap; 0 leaves the intervals out.
        seed: Its seed.
    """
    ranking, is_kept = Ranking(scores, is_positive), scores >= threshold
    report: dict[str, Any] = {
        "docs": len(scores),
        "positives": int(is_positive.sum()),
        "auc": _json(ranking.auc()),
        "average_precision": _json(ranking.average_precision()),
        "threshold": float(threshold),
        "accuracy": float((is_kept == is_positive).mean()),
        "confusion": confusion(is_kept, is_positive),
        "calibration": reliability(scores, is_positive),
        "sources": by_source(scores, is_positive, sources, threshold),
    }
    if n_resamples and 0 < report["positives"] < len(scores):
        report["intervals_95"] = intervals(
            scores, is_positive, is_kept, n_resamples=n_resamples, seed=seed
        )
    return report


def by_source(
    scores: np.ndarray, is_positive: np.ndarray, sources: Sequence[str], threshold: float
) -> list[dict[str, Any]]:
    """Return, per source, the kept share and both error rates (null without such documents)."""
    names, is_kept = np.asarray(sources, object), scores >= threshold
    rows = []
    for name in sorted(set(sources)):
        inside = names == name
        good, bad = inside & is_positive, inside & ~is_positive
        rows.append({
            "source": name, "docs": int(inside.sum()), "positives": int(good.sum()),
            "kept_share": float(is_kept[inside].mean()), "mean_score": float(scores[inside].mean()),
            "false_negative_rate": float((~is_kept[good]).mean()) if good.any() else None,
            "false_positive_rate": float(is_kept[bad].mean()) if bad.any() else None,
        })  # fmt: skip
    return rows


def threshold_of(scores: np.ndarray, share: float, *, lower_is_better: bool = False) -> float:
    """Return the score of the last document that a share of the best ones reaches.

    A share of 0.07 of 100 documents is 7, though their product is a little more in floating point.
    """
    ordered = np.sort(scores) if lower_is_better else np.sort(scores)[::-1]
    n = int(np.ceil(share * len(ordered) - 1e-6))
    return float(ordered[min(max(n, 1), len(ordered)) - 1])


def share_thresholds(
    scores: np.ndarray, is_positive: np.ndarray, shares: Sequence[float]
) -> list[dict[str, Any]]:
    """Return, for each share of all documents to keep, its threshold and what it costs."""
    rows = []
    for share in shares:
        threshold = threshold_of(scores, share)
        is_kept = scores >= threshold
        rows.append({
            "share": share, "threshold": threshold, "kept_share": float(is_kept.mean()),
            "precision": float(is_positive[is_kept].mean()),
            "recall": float(is_kept[is_positive].mean()) if is_positive.any() else None,
        })  # fmt: skip
    return rows


def best_threshold(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Return the threshold of the highest accuracy; of equally good ones the middle one.

    Half-way between neighbouring scores, so that it does not sit on a document.
    """
    cuts = np.unique(scores)
    positives, negatives = np.sort(scores[is_positive]), np.sort(scores[~is_positive])
    n_kept = len(positives) - np.searchsorted(positives, cuts)
    n_right = n_kept + np.searchsorted(negatives, cuts)
    best = np.flatnonzero(n_right == n_right.max())
    at = int(best[len(best) // 2])
    return float((cuts[at - 1] + cuts[at]) / 2) if at else float(cuts[0])


def label_report(
    probabilities: np.ndarray, targets: np.ndarray, labels: Sequence[str], sources: Sequence[str]
) -> dict[str, Any]:
    """Measure a classifier of several labels.

    Args:
        probabilities: float64 [n, n_labels].
        targets: int64 [n].
        labels: Names of the labels.
        sources: Source of each document.
    """
    chosen, n = probabilities.argmax(1), len(labels)
    table = np.bincount(targets * n + chosen, minlength=n * n).reshape(n, n)
    per_label = []
    for k, name in enumerate(labels):
        n_right, n_true, n_chosen = table[k, k], table[k].sum(), table[:, k].sum()
        per_label.append({
            "label": name, "docs": int(n_true),
            "precision": float(n_right / n_chosen) if n_chosen else None,
            "recall": float(n_right / n_true) if n_true else None,
            "f1": float(2 * n_right / (n_true + n_chosen)) if n_true + n_chosen else None,
        })  # fmt: skip
    f1 = [
        2 * table[k, k] / (table[k].sum() + table[:, k].sum()) for k in range(n) if table[k].any()
    ]
    names = np.asarray(sources, object)
    return {
        "docs": len(targets),
        "accuracy": float((chosen == targets).mean()),
        "macro_f1": float(np.mean(f1)),
        "labels": per_label,
        "confusion": {"rows": list(labels), "columns": list(labels), "docs": table.tolist()},
        "calibration": reliability(probabilities.max(1), chosen == targets),
        "sources": [
            {"source": name, "docs": int((names == name).sum()),
             "accuracy": float((chosen == targets)[names == name].mean())}
            for name in sorted(set(sources))
        ],
    }  # fmt: skip


def score_report(
    predicted: np.ndarray, scores: np.ndarray, sources: Sequence[str], *, keep_from: float
) -> dict[str, Any]:
    """Measure a student of graded scores, in numbers and in whole grades.

    Args:
        predicted: float64 [n].
        scores: The teacher's, float64 [n].
        sources: Source of each document.
        keep_from: Grade from which a document counts as good.
    """
    grades, true_grades = np.rint(predicted), np.rint(scores)
    low, high = int(true_grades.min()), int(true_grades.max())
    n = high - low + 1
    inside = np.clip(grades, low, high).astype(int) - low
    table = np.bincount((true_grades.astype(int) - low) * n + inside, minlength=n * n)
    is_kept, is_good = grades >= keep_from, true_grades >= keep_from
    counts = confusion(is_kept, is_good)
    found = 2 * counts["true_positives"]
    total = found + counts["false_positives"] + counts["false_negatives"]
    names = np.asarray(sources, object)
    return {
        "docs": len(scores),
        "mean_absolute_error": float(np.abs(predicted - scores).mean()),
        "root_mean_squared_error": float(np.sqrt(((predicted - scores) ** 2).mean())),
        "pearson": _json(correlation(predicted, scores)),
        "spearman": _json(correlation(ranks(predicted), ranks(scores))),
        "grade_accuracy": float((grades == true_grades).mean()),
        "grades": {"rows": list(range(low, high + 1)), "columns": list(range(low, high + 1)),
                   "docs": table.reshape(n, n).tolist()},
        "keep_from": keep_from,
        "confusion": counts,
        "f1": found / total if total else None,
        "sources": [
            {"source": name, "docs": int((names == name).sum()),
             "mean_score": float(predicted[names == name].mean()),
             "mean_error": float((predicted - scores)[names == name].mean())}
            for name in sorted(set(sources))
        ],
    }  # fmt: skip


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation; NaN when one side does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def _json(value: float) -> float | None:
    return None if np.isnan(value) else value
