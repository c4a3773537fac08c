"""Linear heads: logistic regression and ridge regression on features, in numpy.

Both choose the strength of their penalty themselves: ridge regression by its leave-one-out
residuals, which need no refitting (Allen 1974, PRESS); logistic regression on a tenth of the rows,
before it is fitted to all. Features are scaled to unit variance inside; the weights that come back
are those of the features as given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puna.core.errors import PunaError
from puna.data.quality.calibrate import softmax

PENALTIES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)
"""Penalties that are tried, the strongest first: per row and squared weight of a scaled feature
(ours)."""
HEAD_FILE = "head.safetensors"
_DEAD = 1e-6
"""Deviation below which a feature is rounding noise: encoders have dimensions that are always 0 but
for that (MiniLM three, 5e-9); a weight on them would drown all others once the encoder moves."""


@dataclass(frozen=True)
class Head:
    """A linear head.

    Attributes:
        weights: float32 [n_outputs, n_features].
        bias: float32 [n_outputs].
    """

    weights: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the outputs for features [n, n_features]: float64 [n, n_outputs]."""
        return (features @ self.weights.T + self.bias).astype(np.float64)

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        from safetensors.numpy import save

        return save({"weights": self.weights, "bias": self.bias})


def read_head(path: Path) -> Head:
    """Read a head.

    Raises:
        PunaError: The file is no head.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        head = Head(tensors["weights"], tensors["bias"])
        if head.weights.ndim != 2 or head.bias.shape != head.weights.shape[:1]:
            raise ValueError(f"weights {head.weights.shape}, bias {head.bias.shape}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise PunaError(f"{path} is no head ({error})", "train the classifier anew") from error
    return head


def fit_softmax(x: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[Head, float]:
    """Fit logistic regression to shares of labels.

    Args:
        x: Features, float32 [n, n_features], in an order that says nothing.
        targets: Shares of the labels, rows adding up to 1: float64 [n, n_labels].
        weights: Of the rows, float64 [n], positive.

    Returns:
        The head and the penalty that was chosen.
    """
    scaled, scale, mean = _scaled(x, weights)
    n_held = max(len(x) // 10, 1)
    held, rest = slice(0, n_held), slice(n_held, None)
    tried, start = [], np.zeros((targets.shape[1], x.shape[1] + 1))
    for penalty in PENALTIES:  # each starts where the last, stronger one ended
        start = _minimise(scaled[rest], targets[rest], weights[rest], penalty, start)
        tried.append((_log_loss(scaled[held], targets[held], weights[held], start), penalty))
    penalty = min(tried)[1]
    found = _minimise(scaled, targets, weights, penalty, start)
    return _unscaled(found, scale, mean), penalty


def fit_ridge(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[Head, float]:
    """Fit ridge regression; memory is 24 bytes per feature and row.

    Args:
        x: Features, float32 [n, n_features].
        y: Numbers, float64 [n].
        weights: Of the rows, float64 [n], positive.

    Returns:
        The head (one output) and the penalty that was chosen.
    """
    scaled, scale, mean = _scaled(x, weights)
    root = np.sqrt(weights / weights.mean())
    rows = scaled.astype(np.float64) * root[:, None]
    centre = float(np.average(y, weights=weights))
    wanted = (y - centre) * root
    values, vectors = np.linalg.eigh(rows.T @ rows)
    values = np.maximum(values, 0)
    turned = rows @ vectors
    toward = turned.T @ wanted
    tried = []
    for penalty in PENALTIES:
        inverse = 1 / (values + penalty * len(x))
        residual = wanted - turned @ (inverse * toward)
        # the mean takes a degree of freedom, too
        leverage = (turned * turned) @ inverse + root * root / len(x)
        left_out = residual / np.maximum(1 - leverage, 1e-6)
        tried.append((float(left_out @ left_out), penalty, inverse))
    _, penalty, inverse = min(tried, key=lambda one: one[:2])
    solution = np.append(vectors @ (inverse * toward), centre)
    return _unscaled(solution[None], scale, mean), penalty


def _scaled(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = np.average(x, axis=0, weights=weights)
    scale = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    scale = np.where(scale > _DEAD, scale, 1.0)
    return ((x - mean) / scale).astype(np.float32), scale, mean


def _unscaled(found: np.ndarray, scale: np.ndarray, mean: np.ndarray) -> Head:
    weights = found[:, :-1] / scale
    bias = found[:, -1] - weights @ mean
    return Head(weights.astype(np.float32), bias.astype(np.float32))


def _log_loss(x: np.ndarray, targets: np.ndarray, weights: np.ndarray, w: np.ndarray) -> float:
    p = softmax(x @ w[:, :-1].T + w[:, -1])
    return float(-(weights * (targets * np.log(np.maximum(p, 1e-12))).sum(1)).sum() / weights.sum())


def _minimise(
    x: np.ndarray, targets: np.ndarray, weights: np.ndarray, penalty: float, start: np.ndarray
) -> np.ndarray:
    """Return the weights, bias last, of the smallest penalised log loss: [n_labels, n + 1]."""
    total = float(weights.sum())

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(start.shape)
        logits = x @ w[:, :-1].T + w[:, -1]
        top = logits.max(1, keepdims=True)
        e = np.exp(logits - top)
        sums = e.sum(1, keepdims=True)
        gap = (e / sums - targets) * (weights / total)[:, None]
        value = float((weights * (np.log(sums) + top - (targets * logits).sum(1, keepdims=True))[
            :, 0
        ]).sum()) / total  # fmt: skip
        gradient = np.empty_like(w)
        gradient[:, :-1] = gap.T @ x + penalty * w[:, :-1]
        gradient[:, -1] = gap.sum(0)
        return value + penalty / 2 * float((w[:, :-1] ** 2).sum()), gradient.ravel()

    return lbfgs(loss, start.ravel()).reshape(start.shape)


def lbfgs(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, *,
    memory: int = 10, iterations: int = 200, tolerance: float = 1e-5,
) -> np.ndarray:  # fmt: skip
    """Minimise a smooth convex function (Nocedal 1980), with backtracking.

    Args:
        loss: Point to value and gradient.
        start: float64 [n].
        memory: Steps that are remembered.
        iterations: At most so many.
        tolerance: Largest entry of the gradient at the end.
    """
    at, (value, gradient) = start.astype(np.float64), loss(start.astype(np.float64))
    steps: list[tuple[np.ndarray, np.ndarray, float]] = []
    for _ in range(iterations):
        if np.abs(gradient).max() < tolerance:
            break
        direction = _two_loops(gradient, steps)
        slope = float(direction @ gradient)
        rate = 1.0 if steps else min(1.0, 1.0 / float(np.abs(gradient).sum()))
        while True:
            point = at - rate * direction
            new_value, new_gradient = loss(point)
            if new_value <= value - 1e-4 * rate * slope or rate < 1e-10:
                break
            rate /= 2
        if new_value > value:
            break
        moved, changed = point - at, new_gradient - gradient
        curvature = float(moved @ changed)
        if curvature > 1e-14:
            steps = [*steps[1 - memory :], (moved, changed, 1 / curvature)]
        at, value, gradient = point, new_value, new_gradient
    return at


def _two_loops(
    gradient: np.ndarray, steps: list[tuple[np.ndarray, np.ndarray, float]]
) -> np.ndarray:
    """Return the gradient times the estimate of the inverse Hessian."""
    q, shares = gradient.copy(), []
    for moved, changed, inverse in reversed(steps):
        share = inverse * float(moved @ q)
        q -= share * changed
        shares.append(share)
    if steps:
        moved, changed, inverse = steps[-1]
        q /= inverse * float(changed @ changed)
    for (moved, changed, inverse), share in zip(steps, reversed(shares), strict=True):
        q += (share - inverse * float(changed @ q)) * moved
    return q
