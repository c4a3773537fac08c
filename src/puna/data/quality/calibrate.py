"""From raw scores to probabilities that mean what they say, fitted on texts of their own.

Two classes: Platt's sigmoid (Platt 1999, with his smoothed targets) or isotonic regression (pool
adjacent violators, interpolated between the blocks). Several classes: a temperature (Guo et al.
2017). Graded scores: a straight line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Method = Literal["platt", "isotonic"]


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return the logistic function without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def fit_platt(margins: np.ndarray, is_positive: np.ndarray) -> dict[str, Any]:
    """Fit p = sigmoid(slope * margin + offset) by Newton's method with backtracking.

    Args:
        margins: float64 [n].
        is_positive: bool [n], or a teacher's probabilities, float64 [n].
    """
    n_pos = float(is_positive.sum())
    n_neg = len(is_positive) - n_pos
    # for a probability: what the two smoothed targets are on average
    high, low = (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2)
    targets = is_positive * high + (1 - is_positive.astype(float)) * low
    centre, scale = float(margins.mean()), float(margins.std()) or 1.0
    x = np.stack([(margins - centre) / scale, np.ones_like(margins)], 1)
    w = np.array([0.0, np.log((n_pos + 1) / (n_neg + 1))])

    def loss(weights: np.ndarray) -> float:
        z = x @ weights
        return float((np.logaddexp(0, z) - targets * z).sum())

    now = loss(w)
    for _ in range(100):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - targets)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        rate = 1.0
        while (new := loss(w - rate * step)) > now and rate > 1e-8:
            rate /= 2
        if now - new < 1e-10 * max(now, 1):
            break
        w, now = w - rate * step, new
    slope = float(w[0]) / scale
    return {"method": "platt", "slope": slope, "offset": float(w[1]) - slope * centre}


def fit_isotonic(margins: np.ndarray, is_positive: np.ndarray) -> dict[str, Any]:
    """Fit the best non-decreasing function; equal margins form one point."""
    x, inverse = np.unique(margins, return_inverse=True)
    weights = np.bincount(inverse).astype(float)
    means = np.bincount(inverse, is_positive.astype(float)) / weights
    blocks: list[list[float]] = []  # mean, weight, first x, last x
    for value, weight, at in zip(means, weights, x, strict=True):
        blocks.append([float(value), float(weight), float(at), float(at)])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            last, before = blocks.pop(), blocks[-1]
            total = before[1] + last[1]
            before[0] = (before[0] * before[1] + last[0] * last[1]) / total
            before[1], before[3] = total, last[3]
    knots = [(x, mean) for mean, _, first, last in blocks for x in sorted({first, last})]
    return {"method": "isotonic", "x": [k[0] for k in knots], "y": [k[1] for k in knots]}


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Fit the temperature that minimises the log loss, by golden-section search on its logarithm.

    Args:
        logits: float64 [n, n_labels].
        targets: int64 [n].
    """

    def loss(log_t: float) -> float:
        p = softmax(logits / np.exp(log_t))[np.arange(len(targets)), targets]
        return float(-np.log(np.maximum(p, 1e-300)).mean())

    low, high, ratio = -4.0, 4.0, (np.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    return {"method": "temperature", "temperature": float(np.exp((low + high) / 2))}


def fit_line(expected: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Fit score = slope * expected + offset by least squares.

    A slope that is not positive, or an input without spread, leaves the expected score as it is.
    """
    variance = float(expected.var())
    slope = float(((expected - expected.mean()) * (scores - scores.mean())).mean() / variance) if (
        variance > 0
    ) else 1.0  # fmt: skip
    if slope <= 0:
        return {"method": "line", "slope": 1.0, "offset": 0.0}
    offset = float(scores.mean()) - slope * float(expected.mean())
    return {"method": "line", "slope": slope, "offset": offset}


def calibrated(margins: np.ndarray, fitted: Mapping[str, Any]) -> np.ndarray:
    """Apply Platt's sigmoid, the isotonic function or the line; float64 [n]."""
    if fitted["method"] == "isotonic":
        return np.interp(margins, fitted["x"], fitted["y"])
    line = fitted["slope"] * margins + fitted["offset"]
    return sigmoid(line) if fitted["method"] == "platt" else line
