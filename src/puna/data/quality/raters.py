"""Several ratings of one text: what they are merged to, and how well raters agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from puna.data.quality.examples import Example


def merge_ratings(group: Sequence[Example]) -> Example | None:
    """Merge the ratings of one text.

    Scores become their mean, labels the one with most weight; weights are averaged.

    Args:
        group: The ratings, at least one.

    Returns:
        The merged example, or None when two labels have the same weight.
    """
    weights = np.array([item.weight for item in group])
    weight = float(weights.mean())
    if not group[0].label:
        scores = np.array([item.score for item in group])
        return replace(group[0], score=float(np.average(scores, weights=weights)), weight=weight)
    votes: Counter[str] = Counter()
    for item in group:
        votes[item.label] += item.weight  # type: ignore[assignment] # weights are fractions
    (label, most), *others = votes.most_common()
    if others and others[0][1] >= most:
        return None
    return replace(group[0], label=label, weight=weight)


def agreement(groups: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """Measure how well raters agree, on the texts with at least two ratings.

    Returns:
        ``texts``, ``ratings``; ``alpha`` (Krippendorff 1970: 1 is full agreement, 0 what chance
        gives; squared differences of scores, or equality of labels; null when all ratings are the
        same); and for scores ``mean_absolute_difference`` of two ratings of a text, for labels
        ``same_label``, the share of pairs of ratings that agree.
    """
    rated = [group for group in groups if len(group) > 1]
    n = sum(len(group) for group in rated)
    report: dict[str, Any] = {"texts": len(rated), "ratings": n}
    if not rated:
        return report
    if rated[0][0].label:
        seen = [np.array(list(Counter(item.label for item in group).values())) for group in rated]
        apart = [len(g) ** 2 - int((c**2).sum()) for g, c in zip(rated, seen, strict=True)]
        total = Counter(item.label for group in rated for item in group)
        expected = float(n * n - sum(count**2 for count in total.values()))
        pairs = sum(len(group) * (len(group) - 1) for group in rated)
        report["same_label"] = 1 - sum(apart) / pairs
    else:
        scores = [np.array([item.score for item in group]) for group in rated]
        apart = [2 * len(one) ** 2 * float(one.var()) for one in scores]
        expected = 2 * n**2 * float(np.concatenate(scores).var())
        gaps = [np.abs(one[:, None] - one)[np.triu_indices(len(one), 1)] for one in scores]
        report["mean_absolute_difference"] = float(np.concatenate(gaps).mean())
    observed = sum(one / (len(g) - 1) for one, g in zip(apart, rated, strict=True)) / n
    expected /= n * (n - 1)
    report["alpha"] = 1 - observed / expected if expected > 0 else None
    return report
