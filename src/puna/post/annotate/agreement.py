"""How far annotators agree beyond chance: Cohen, weighted, Fleiss, Randolph, Krippendorff.

Ratings are a matrix with one row per item and one column per rater; NaN is a rating that is
missing. Where agreement is not defined (nobody rated the same item, or only one category occurs)
the value is NaN, never 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from puna.post.annotate.intervals import Interval, bootstrap

Weights = Literal["none", "linear", "quadratic"]
Level = Literal["nominal", "ordinal", "interval", "ratio"]


def cohen_kappa(table: np.ndarray, weights: Weights = "none") -> float:
    """Return Cohen's kappa of two raters (1960), or the weighted one (1968).

    Args:
        table: ``[n_categories, n_categories]`` counts, rows the first rater, columns the second.
        weights: Disagreement of categories i and j: all alike, ``|i-j|`` or its square.
    """
    table = np.asarray(table, float)
    total = table.sum()
    if not total:
        return math.nan
    shares = table / total
    expected = np.outer(shares.sum(1), shares.sum(0))
    distance = np.abs(np.subtract.outer(np.arange(len(table)), np.arange(len(table))))
    cost = {"none": (distance > 0) * 1.0, "linear": distance * 1.0, "quadratic": distance**2.0}
    chance = float((cost[weights] * expected).sum())
    return 1 - float((cost[weights] * shares).sum()) / chance if chance else math.nan


def categories_of(ratings: np.ndarray) -> np.ndarray:
    """Return the categories of ratings: whole numbers without gaps, or the values that occur.

    A category that nobody chose still lies between its neighbours, which weighted kappas mind.
    """
    values = np.unique(ratings[np.isfinite(ratings)])
    if len(values) and (values == np.round(values)).all() and values[-1] - values[0] < 100:
        return np.arange(values[0], values[-1] + 1)
    return values


def table_of(
    first: np.ndarray, second: np.ndarray, categories: np.ndarray | None = None
) -> np.ndarray:
    """Count pairs of ratings of two raters.

    Args:
        first: Ratings of the first, NaN where missing.
        second: Those of the second.
        categories: All categories in order; :func:`categories_of` both when not given.
    """
    both = np.isfinite(first) & np.isfinite(second)
    if categories is None:
        categories = categories_of(np.concatenate([first[both], second[both]]))
    table = np.zeros((len(categories), len(categories)))
    at = np.searchsorted(categories, first[both]), np.searchsorted(categories, second[both])
    np.add.at(table, at, 1)
    return table


def counts_of(ratings: np.ndarray) -> np.ndarray:
    """Return how often each item got each category that occurs, ``[n_items, n_categories]``."""
    ratings = np.asarray(ratings, float)
    values = np.unique(ratings[np.isfinite(ratings)])
    return (ratings[:, :, None] == values).sum(1)


def fleiss_kappa(counts: np.ndarray, method: Literal["fleiss", "randolph"] = "fleiss") -> float:
    """Return the kappa of many raters with fixed (Fleiss, 1971) or free margins (Randolph, 2005).

    Args:
        counts: ``[n_items, n_categories]``; every item has equally many ratings, two at least.
        method: Chance agreement from the shares of the categories, or one over their number.

    Raises:
        ValueError: The items have different numbers of ratings, or fewer than two.
    """
    counts = np.asarray(counts, float)
    n_ratings = counts.sum(1)
    if not len(counts) or n_ratings[0] < 2 or (n_ratings != n_ratings[0]).any():
        raise ValueError("Fleiss' kappa needs equally many ratings per item, at least two")
    m = n_ratings[0]
    observed = float(((counts * (counts - 1)).sum(1) / (m * (m - 1))).mean())
    shares = counts.sum(0) / counts.sum()
    chance = float((shares**2).sum()) if method == "fleiss" else 1 / counts.shape[1]
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def fleiss_z(counts: np.ndarray) -> float:
    """Return Fleiss' kappa over its standard error under chance (Fleiss, Nee and Landis, 1979)."""
    counts = np.asarray(counts, float)
    n, m = len(counts), counts[0].sum()
    share = counts.sum(0) / counts.sum()
    both = share * (1 - share)
    spread = both.sum() ** 2 - (both * (1 - 2 * share)).sum()
    return fleiss_kappa(counts) / math.sqrt(2 * spread / (both.sum() ** 2 * n * m * (m - 1)))


def krippendorff_alpha(ratings: np.ndarray, level: Level = "nominal") -> float:
    """Return Krippendorff's alpha (2011), which allows for missing ratings.

    Args:
        ratings: ``[n_items, n_raters]``, NaN where missing; items with one rating do not count.
        level: What differences mean. ``ratio`` wants values above zero.
    """
    ratings = np.asarray(ratings, float)
    values = np.unique(ratings[np.isfinite(ratings)])
    counts = (ratings[:, :, None] == values).sum(1).astype(float)
    n_ratings = counts.sum(1)
    counts, n_ratings = counts[n_ratings > 1], n_ratings[n_ratings > 1]
    if not len(counts):
        return math.nan
    scaled = counts / (n_ratings - 1)[:, None]
    coincidences = scaled.T @ counts - np.diag(scaled.sum(0))
    totals = coincidences.sum(1)
    cost = _squared_distances(values, totals, level)
    chance = float((np.outer(totals, totals) * cost).sum()) / (totals.sum() - 1)
    return 1 - float((coincidences * cost).sum()) / chance if chance else math.nan


def _squared_distances(values: np.ndarray, totals: np.ndarray, level: Level) -> np.ndarray:
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "ordinal":
        # Between two ranks lie all ratings in between and half of those at either end.
        ranks = np.cumsum(totals) - totals / 2
        return np.subtract.outer(ranks, ranks) ** 2
    distance = np.subtract.outer(values, values)
    if level == "interval":
        return distance**2
    sums = np.add.outer(values, values)
    return np.divide(distance, sums, out=np.zeros_like(distance), where=sums != 0) ** 2


def alpha_interval(
    ratings: np.ndarray, level: Level = "nominal", n_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return Krippendorff's alpha with the 95 % interval over resampled items."""
    statistic: Callable[[np.ndarray], float] = partial(krippendorff_alpha, level=level)
    return bootstrap(statistic, np.asarray(ratings, float), n_resamples, seed=seed)


def kappa_interval(
    ratings: np.ndarray, weights: Weights = "none", n_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return Cohen's kappa of two columns with the 95 % interval over resampled items."""
    ratings = np.asarray(ratings, float)
    categories = categories_of(ratings)

    def kappa(rows: np.ndarray) -> float:
        return cohen_kappa(table_of(rows[:, 0], rows[:, 1], categories), weights)

    return bootstrap(kappa, ratings, n_resamples, seed=seed)


def fleiss_interval(counts: np.ndarray, n_resamples: int = 1000, seed: int = 0) -> Interval:
    """Return Fleiss' kappa with the 95 % interval over resampled items."""
    return bootstrap(fleiss_kappa, np.asarray(counts, float), n_resamples, seed=seed)
