"""Measures of a ranking of mixes: rank correlation, regret, decision accuracy, error."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64


def ranks(values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Return ranks from 1; ties share their mean rank."""
    order = np.argsort(values, kind="stable")
    _, inverse, counts = np.unique(values[order], return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_rank = ends - (counts - 1) / 2
    out = np.empty(len(values))
    out[order] = mean_rank[inverse]
    return out


def spearman(a: Float64[np.ndarray, " n"], b: Float64[np.ndarray, " n"]) -> float:
    """Return Spearman's rank correlation; NaN when one side is constant or has under 3 values."""
    if len(a) < 3:
        return float("nan")
    x, y = ranks(np.asarray(a, float)), ranks(np.asarray(b, float))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else float("nan")


def rmse(predicted: Float64[np.ndarray, " n"], true: Float64[np.ndarray, " n"]) -> float:
    """Return the root of the mean squared error, in units of the loss."""
    return float(np.sqrt(np.mean((predicted - true) ** 2)))


def regret(predicted: Float64[np.ndarray, " n"], true: Float64[np.ndarray, " n"]) -> float:
    """Return how much worse the mix with the lowest prediction is than the best of the pool."""
    return float(true[int(np.argmin(predicted))] - np.min(true))


def decision_accuracy(
    predicted: Float64[np.ndarray, " n"], true: Float64[np.ndarray, " n"]
) -> float:
    """Return the share of pairs whose winner the prediction names (DataDecide, 2025, section 2).

    Pairs that are equal in truth are left out; a prediction that ties counts half.
    """
    i, j = np.triu_indices(len(true), k=1)
    told, real = np.sign(predicted[i] - predicted[j]), np.sign(true[i] - true[j])
    kept = real != 0
    if not kept.any():
        return float("nan")
    return float(np.mean(np.where(told[kept] == 0, 0.5, told[kept] == real[kept])))
