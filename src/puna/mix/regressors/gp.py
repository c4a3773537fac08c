"""A Gaussian process on the square roots of the shares, one length scale per source.

Kernel: variance x Matern-5/2 + white noise (Rasmussen and Williams 2006, sections 4.2 and 5.4), the
hyperparameters at the maximum of the marginal likelihood. scikit-learn has the same process, but
its gradient builds an array of runs x runs x sources: minutes for 512 runs, where the two matrix
products used here take a second. The two agree (benchmarks/bench_mix.py).

Shapes: N runs, M mixes, K sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from puna.mix.extra import minimize

_JITTER = 1e-8
_LOG_LENGTH = (np.log(0.05), np.log(50.0))
_LOG_VARIANCE = (np.log(1e-2), np.log(1e4))
_LOG_NOISE = (np.log(1e-6), np.log(2.0))
_PRIOR_SD = 1.5  # of log length scales; holds those of sources that few runs vary
_PRIOR_MEAN = np.log(1.5)


@dataclass(frozen=True)
class Process:
    """Logarithms of length scales, variance and noise; losses have mean 0 and variance 1."""

    log_length_K: Float64[np.ndarray, " K"]
    log_variance: float
    log_noise: float


@dataclass(frozen=True)
class Posterior:
    """A process and what it has seen."""

    process: Process
    x_NK: Float64[np.ndarray, "N K"]
    alpha_N: Float64[np.ndarray, " N"]
    chol_NN: Float64[np.ndarray, "N N"]
    mean: float
    scale: float

    def predict(self, shares_MK: Float64[np.ndarray, "M K"]) -> Float64[np.ndarray, " M"]:
        """Return expected values at mixes."""
        return self.mean + self.scale * (self._cross(shares_MK) @ self.alpha_N)

    def std(self, shares_MK: Float64[np.ndarray, "M K"]) -> Float64[np.ndarray, " M"]:
        """Return the standard deviation of the noiseless value at mixes."""
        half = np.linalg.solve(self.chol_NN, self._cross(shares_MK).T)
        left = np.exp(self.process.log_variance) - np.sum(half**2, axis=0)
        return self.scale * np.sqrt(np.maximum(left, 0.0))

    def _cross(self, shares: np.ndarray) -> np.ndarray:
        length = np.exp(self.process.log_length_K)
        distance = _distances(np.sqrt(shares) / length, self.x_NK / length)
        return np.exp(self.process.log_variance) * _matern(distance)[0]


def fit_process(
    shares_NK: Float64[np.ndarray, "N K"],
    y_N: Float64[np.ndarray, " N"],
    *,
    n_steps: int = 60,
    start: Process | None = None,
) -> Process:
    """Find hyperparameters by the marginal likelihood (with a weak prior on the length scales)."""
    x = np.sqrt(shares_NK)
    k = x.shape[1]
    y = (y_N - y_N.mean()) / (y_N.std() or 1.0)
    theta = np.concatenate([np.full(k, _PRIOR_MEAN), [np.log(4.0), np.log(1e-2)]])
    if start is not None:
        theta = np.concatenate([start.log_length_K, [start.log_variance, start.log_noise]])
    bounds = [_LOG_LENGTH] * k + [_LOG_VARIANCE, _LOG_NOISE]
    found = minimize(_evidence, theta, args=(x, y), bounds=bounds, n_steps=n_steps)
    return Process(found[:k], float(found[k]), float(found[k + 1]))


def condition(
    process: Process,
    shares_NK: Float64[np.ndarray, "N K"],
    y_N: Float64[np.ndarray, " N"],
    weight_N: Float64[np.ndarray, " N"] | None = None,
) -> Posterior:
    """Show runs to a process.

    Args:
        process: Hyperparameters.
        shares_NK: Shares of the runs.
        y_N: Their losses.
        weight_N: How often each run counts (of a bootstrap draw); runs of weight 0 are left out.
    """
    weight = np.ones(len(y_N)) if weight_N is None else weight_N
    kept = weight > 0
    x, y, weight = np.sqrt(shares_NK[kept]), y_N[kept], weight[kept]
    mean, scale = float(y.mean()), float(y.std() or 1.0)
    length = np.exp(process.log_length_K)
    kernel = np.exp(process.log_variance) * _matern(_distances(x / length, x / length))[0]
    kernel[np.diag_indices(len(y))] += np.exp(process.log_noise) / weight + _JITTER
    chol = np.linalg.cholesky(kernel)
    half = np.linalg.solve(chol, (y - mean) / scale)
    return Posterior(process, x, np.linalg.solve(chol.T, half), chol, mean, scale)


def _evidence(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    n, k = x.shape
    scaled = x / np.exp(theta[:k])
    base, slope = _matern(_distances(scaled, scaled))
    variance, noise = np.exp(theta[k]), np.exp(theta[k + 1])
    kernel = variance * base
    kernel[np.diag_indices(n)] += noise + _JITTER
    try:
        chol = np.linalg.cholesky(kernel)
    except np.linalg.LinAlgError:
        return 1e10, np.zeros_like(theta)
    inverse_half = np.linalg.inv(chol)
    inverse = inverse_half.T @ inverse_half
    alpha = inverse @ y
    value = 0.5 * y @ alpha + np.log(np.diag(chol)).sum() + 0.5 * n * np.log(2 * np.pi)
    pull = inverse - np.outer(alpha, alpha)
    # d kernel / d log length_j = variance * slope * (x_ij - x_kj)^2 / length_j^2
    w = pull * slope * variance
    rows = w.sum(axis=1)
    by_length = 2 * (rows @ scaled**2 - np.einsum("nk,nk->k", scaled, w @ scaled))
    gradient = np.empty_like(theta)
    gradient[:k] = 0.5 * by_length
    gradient[k] = 0.5 * variance * np.sum(pull * base)
    gradient[k + 1] = 0.5 * noise * np.trace(pull)
    off = (theta[:k] - _PRIOR_MEAN) / _PRIOR_SD
    gradient[:k] += off / _PRIOR_SD
    return float(value + 0.5 * off @ off), gradient


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0.0))


def _matern(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Matern-5/2 and the factor of its derivative by log length (times d_j^2)."""
    far = np.sqrt(5.0) * distance
    decay = np.exp(-far)
    return (1 + far + far**2 / 3) * decay, (5.0 / 3.0) * (1 + far) * decay
