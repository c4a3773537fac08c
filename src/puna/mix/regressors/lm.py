"""Many small robust least-squares problems at once: Levenberg-Marquardt on a batch.

Cross-validation, the bootstrap, the starts and the targets of a mixing law are one batch: they
share the mixes and differ in losses and in the weight of each run. Solving them side by side in
numpy is far faster than one call of a general minimiser each.

Shapes: B problems, N runs, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

Batch = Float64[np.ndarray, "B N"]
Theta = Float64[np.ndarray, "B P"]
Model = Callable[[Theta], tuple[Batch, Float64[np.ndarray, "B N P"]]]
"""Parameters -> predictions and their derivatives."""

_FIRST_DAMPING = 1e-2
_MOST_DAMPING = 1e10
_SMALL = 1e-12
_SMALLEST_GAIN = 1e-7


def huber(residual: Batch, delta: float) -> Batch:
    """Return Huber's loss: squared half below ``delta``, straight above."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def solve(
    model: Model,
    theta_BP: Theta,
    y_BN: Batch,
    weight_BN: Batch,
    *,
    delta: float,
    penalty_PP: Float64[np.ndarray, "P P"],
    low_P: Float64[np.ndarray, " P"],
    high_P: Float64[np.ndarray, " P"],
    n_steps: int = 60,
) -> tuple[Theta, Float64[np.ndarray, " B"]]:
    """Minimise mean Huber loss plus a quadratic penalty, inside a box.

    Args:
        model: Predictions and derivatives of a batch of parameters.
        theta_BP: Where to start.
        y_BN: What was measured.
        weight_BN: Weight of each run: 0 leaves it out, 2 counts it twice.
        delta: Where Huber's loss becomes straight, in units of ``y``.
        penalty_PP: Matrix Q of the penalty theta' Q theta.
        low_P: Smallest parameters.
        high_P: Largest parameters.
        n_steps: Most steps.

    Returns:
        Parameters, and the value reached by each problem.
    """
    theta = np.clip(theta_BP, low_P, high_P)
    share = weight_BN / weight_BN.sum(axis=1, keepdims=True)
    damping = np.full(len(theta), _FIRST_DAMPING)
    value, gradient, curve = _quadratic(model, theta, y_BN, share, delta, penalty_PP)
    active = np.arange(len(theta))
    still = np.zeros(len(theta), dtype=int)
    for _ in range(n_steps):
        grad, hess = _free(theta[active], gradient[active], curve[active], low_P, high_P)
        scale = np.maximum(np.diagonal(hess, axis1=1, axis2=2), _SMALL)
        shifted = hess + (damping[active, None] * scale + _SMALL)[:, :, None] * np.eye(
            theta.shape[1]
        )
        step = np.linalg.solve(shifted, grad[:, :, None])[:, :, 0]
        tried = np.clip(theta[active] - step, low_P, high_P)
        found = _quadratic(model, tried, y_BN[active], share[active], delta, penalty_PP)
        better = found[0] < value[active]
        gain = np.where(better, (value[active] - found[0]) / (value[active] + _SMALL), 0.0)
        taken = active[better]
        theta[taken], value[taken] = tried[better], found[0][better]
        gradient[taken], curve[taken] = found[1][better], found[2][better]
        damping[active] *= np.where(better, 0.3, 4.0)
        damping[active] = np.maximum(damping[active], 1e-9)
        still[active] = np.where(better & (gain < _SMALLEST_GAIN), still[active] + 1, 0)
        active = active[(still[active] < 2) & (damping[active] < _MOST_DAMPING)]
        if not len(active):
            break
    return theta, value


def _free(
    theta: Theta, gradient: np.ndarray, curve: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hold parameters that stand on a bound and want to cross it."""
    held = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    curve = np.where(held[:, :, None] | held[:, None, :], 0.0, curve)
    return gradient, curve


def _quadratic(
    model: Model, theta: Theta, y: Batch, share: Batch, delta: float, penalty: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    predicted, jacobian = model(theta)
    residual = predicted - y
    pull = theta @ penalty
    value = np.sum(share * huber(residual, delta), axis=1) + np.sum(pull * theta, axis=1)
    soft = share * np.minimum(1.0, delta / np.maximum(np.abs(residual), _SMALL))
    weighted = jacobian * soft[:, :, None]
    gradient = np.einsum("bnp,bn->bp", weighted, residual) + 2 * pull
    curve = np.matmul(weighted.transpose(0, 2, 1), jacobian) + 2 * penalty
    bad = ~np.isfinite(value)
    value = np.where(bad, np.inf, value)
    return value, np.nan_to_num(gradient), np.nan_to_num(curve)
