"""Fits the constants to measured steps: few constants, priors, bounds, a robust loss.

The residual of a row is log(predicted / measured). Rows count by (rows of their source) ** -0.35,
so that a large table does not drown a small one; the loss is soft-L1, so that an odd row does not
drag the others; each constant is held by its prior. Gauss-Newton with damping (Levenberg 1944,
Marquardt 1963) in the logarithm of the constants; steps are cut off at the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from puna.plan.constants import NAMES, PRIORS, Constants
from puna.plan.step import step_time
from puna.plan.workload import Workload

if TYPE_CHECKING:  # its import takes as long as all of the planner
    from jaxtyping import Float64

SOFT = 0.05
"""Residual from which on a row counts linearly instead of squared."""
SOURCE_POWER = -0.35
PRIOR_WEIGHT = 0.03
"""Weight of a prior: a constant one standard deviation off costs as much as a row 3 % off."""
_STEP = 1e-5

_LOW = np.log([PRIORS[name].low for name in NAMES])
_HIGH = np.log([PRIORS[name].high for name in NAMES])
_START = np.log([PRIORS[name].start for name in NAMES])
_SIGMA = np.array([PRIORS[name].sigma for name in NAMES])


@dataclass(frozen=True)
class Fit:
    """Fitted constants."""

    constants: Constants
    covariance: Float64[np.ndarray, "n_constants n_constants"]
    """Of log(constant), by the curvature at the optimum (Laplace)."""
    n_rows: int
    cost: float


def fit_constants(
    w: Workload, step_s: Float64[np.ndarray, " n"], sources: np.ndarray, n_iterations: int = 60
) -> Fit:
    """Fit the constants to measured step times.

    Args:
        w: The rows, arrays of shape (n,).
        step_s: Measured seconds.
        sources: Source of each row, for the weights.
        n_iterations: At most.
    """
    target = np.log(step_s)
    _, inverse, counts = np.unique(sources, return_inverse=True, return_counts=True)
    weight = counts[inverse] ** SOURCE_POWER
    weight = weight / weight.mean()
    logs, damping = _START.copy(), 1e-2
    values = log_predictions(w, logs[None])[0]
    cost = _cost(values - target, weight, logs)
    hessian = np.eye(len(NAMES))
    for _ in range(n_iterations):
        jacobian = _jacobian(w, logs, values)
        residual = values - target
        rows = weight / np.sqrt(1 + (residual / SOFT) ** 2)
        prior = (PRIOR_WEIGHT / _SIGMA) ** 2
        gradient = jacobian.T @ (rows * residual) + prior * (logs - _START)
        hessian = jacobian.T @ (rows[:, None] * jacobian) + np.diag(prior)
        free = ~((logs <= _LOW) & (gradient > 0) | (logs >= _HIGH) & (gradient < 0))
        gain = 0.0
        for _ in range(8):
            damped = hessian + damping * np.diag(np.diag(hessian))
            step = np.zeros_like(logs)
            step[free] = -np.linalg.solve(damped[np.ix_(free, free)], gradient[free])
            trial = np.clip(logs + np.clip(step, -0.7, 0.7), _LOW, _HIGH)
            trial_values = log_predictions(w, trial[None])[0]
            trial_cost = _cost(trial_values - target, weight, trial)
            if trial_cost < cost:
                gain, logs, values, cost = cost - trial_cost, trial, trial_values, trial_cost
                damping = max(damping / 4, 1e-7)
                break
            damping *= 4
        if gain < 1e-7 * cost:
            break
    variance = cost / len(target)
    return Fit(Constants.from_vector(logs), variance * np.linalg.inv(hessian), len(target), cost)


def log_predictions(
    w: Workload, logs: Float64[np.ndarray, "m n_constants"]
) -> Float64[np.ndarray, "m n"]:
    """Return log(step seconds) of every row under several sets of constants."""
    sets = Constants(*(column[:, None] for column in np.exp(logs).T))
    return np.log(step_time(w, sets).total)


def _jacobian(
    w: Workload, logs: np.ndarray, values: np.ndarray
) -> Float64[np.ndarray, "n n_constants"]:
    moved = log_predictions(w, logs[None] + _STEP * np.eye(len(NAMES)))
    return (moved - values).T / _STEP


def _cost(residual: np.ndarray, weight: np.ndarray, logs: np.ndarray) -> float:
    soft = SOFT**2 * (np.sqrt(1 + (residual / SOFT) ** 2) - 1)
    prior = 0.5 * (PRIOR_WEIGHT * (logs - _START) / _SIGMA) ** 2
    return float((weight * soft).sum() + prior.sum())
