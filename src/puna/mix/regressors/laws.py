"""Three mixing laws with few parameters, fitted to many targets, folds and draws at once.

- ``returns``: ``L(r) = c + k (e + sum_j s_j r_j^g)^-b``: effective tokens with diminishing returns.
  A token of source j is worth s_j tokens of the target, and the second half of a source is worth
  less than its first (g < 1), as documents of one source resemble each other. K + 4 parameters.
- ``efftok``: the same with g = 1. K + 3 parameters.
- ``loglinear``: ``L(r) = c + exp(sum_j t_j r_j)`` (Ye et al. 2024, Data Mixing Laws, equation 6;
  its factor k is part of t because shares sum to 1). K + 1 parameters.

All are fitted with Huber's loss and a small penalty; the gain of g is measured in
benchmarks/bench_mix.py. Shapes: B problems, N runs, K sources, M mixes, P parameters.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float64

from puna.mix.regressors.lm import solve

Form = Literal["returns", "efftok", "loglinear"]
FORMS: tuple[Form, ...] = ("returns", "efftok", "loglinear")

HUBER = 0.03
"""Where a residual stops to count squared, in units of the loss."""
_EPSILON = 1e-6
_SMALLEST_SHARE = 1e-6
_L2 = 3e-5
_LOG_G = (-1.6, 0.7)
_MOST_POWER = 60.0
_BATCH_VALUES = 4_000_000
"""Derivatives held at once."""


class _Law(Protocol):
    def __call__(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def predict(self, theta: np.ndarray) -> np.ndarray: ...
    def bounds(self) -> tuple[np.ndarray, np.ndarray]: ...
    def penalty(self) -> np.ndarray: ...
    def starts(self, y: np.ndarray, weight: np.ndarray, seed: int, n: int) -> np.ndarray: ...


class _Effective:
    """Parameters: c, log k, log b, log s of each source, and log g with diminishing returns."""

    def __init__(self, shares: np.ndarray, returns: bool) -> None:
        self.shares, self.returns = shares, returns
        self.n_sources = shares.shape[1]
        self.log_shares = np.log(np.maximum(shares, _SMALLEST_SHARE))

    def _tokens(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return s_j and r_j^g (one for all problems when g = 1)."""
        s = np.exp(theta[:, 3 : 3 + self.n_sources])
        if not self.returns:
            return s, self.shares[None]
        power = np.exp(np.exp(theta[:, -1])[:, None, None] * self.log_shares[None])
        return s, power * (self.shares > 0)[None]

    def predict(self, theta: np.ndarray) -> np.ndarray:
        s, power = self._tokens(theta)
        z = (s @ power[0].T if len(power) == 1 else np.einsum("bk,bnk->bn", s, power)) + _EPSILON
        exponent = theta[:, 1:2] - np.exp(theta[:, 2:3]) * np.log(z)
        return theta[:, :1] + np.exp(np.clip(exponent, -700, _MOST_POWER))

    def __call__(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s, power = self._tokens(theta)
        tokens = power * s[:, None, :]
        z = tokens.sum(axis=2) + _EPSILON
        b, log_z = np.exp(theta[:, 2:3]), np.log(z)
        part = np.exp(np.clip(theta[:, 1:2] - b * log_z, -700, _MOST_POWER))
        jac = np.empty((*z.shape, theta.shape[1]))
        jac[..., 0] = 1.0
        jac[..., 1] = part
        jac[..., 2] = -part * b * log_z
        by_s = np.multiply((-part * b / z)[..., None], tokens, out=jac[..., 3 : 3 + self.n_sources])
        if self.returns:
            g = np.exp(theta[:, -1:])
            jac[..., -1] = np.einsum("bnk,nk->bn", by_s, self.log_shares) * g
        return theta[:, :1] + part, jac

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        k, more = self.n_sources, self.returns
        low = [-10.0, -12.0, -4.0] + [-12.0] * k + [_LOG_G[0]] * more
        return np.array(low), np.array([20.0, 12.0, 2.0] + [6.0] * k + [_LOG_G[1]] * more)

    def penalty(self) -> np.ndarray:
        k = self.n_sources
        out = np.zeros((3 + k + self.returns,) * 2)
        out[3 : 3 + k, 3 : 3 + k] = _L2 / k * (np.eye(k) - 1.0 / k)
        if self.returns:
            out[-1, -1] = _L2 / k
        return out

    def starts(self, y: np.ndarray, weight: np.ndarray, seed: int, n: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        pull = _correlation(self.shares, y, weight)
        c = 0.6 * np.where(weight > 0, y, np.inf).min(axis=1)
        mean = np.sum(weight * y, axis=1) / weight.sum(axis=1)
        made = []
        for index in range(n):
            b = (0.3, 0.6, 0.15, 1.0)[index % 4]
            shrink = 0.3 if index % 2 else 1.0
            log_s = shrink * (-2 - 3 * pull) + 0.3 * rng.standard_normal(pull.shape)
            z = np.exp(log_s) @ self.shares.T + _EPSILON
            mean_power = np.sum(weight * z**-b, axis=1) / weight.sum(axis=1)
            log_k = np.log(np.maximum(mean - c, 1e-3) / mean_power)
            columns = [c, log_k, np.full(len(y), np.log(b)), log_s]
            made.append(np.column_stack(columns + [np.zeros(len(y))] * self.returns))
        return np.stack(made, axis=1)


class _LogLinear:
    """Parameters: c, and t of each source."""

    def __init__(self, shares: np.ndarray) -> None:
        self.shares = shares

    def _part(self, theta: np.ndarray) -> np.ndarray:
        return np.exp(np.clip(theta[:, 1:] @ self.shares.T, -_MOST_POWER, _MOST_POWER))

    def predict(self, theta: np.ndarray) -> np.ndarray:
        return theta[:, :1] + self._part(theta)

    def __call__(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part = self._part(theta)
        jac = np.empty((*part.shape, theta.shape[1]))
        jac[..., 0] = 1.0
        np.multiply(part[..., None], self.shares[None], out=jac[..., 1:])
        return theta[:, :1] + part, jac

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        k = self.shares.shape[1]
        return np.array([-10.0] + [-40.0] * k), np.array([20.0] + [20.0] * k)

    def penalty(self) -> np.ndarray:
        k = self.shares.shape[1]
        out = np.zeros((k + 1, k + 1))
        out[1:, 1:] = 1e-4 * _L2 / k * (np.eye(k) - 1.0 / k)
        return out

    def starts(self, y: np.ndarray, weight: np.ndarray, seed: int, n: int) -> np.ndarray:
        """Start from ridge regressions of log(y - c), for several c; ``seed`` is not needed."""
        lowest = np.where(weight > 0, y, np.inf).min(axis=1)
        k = self.shares.shape[1]
        gram = np.einsum("bn,nk,nl->bkl", weight, self.shares, self.shares, optimize=True)
        made = []
        for index in range(n):
            c = (0.9, 0.5, 0.75, 0.95)[index % 4] * lowest
            logs = np.log(np.maximum(y - c[:, None], 1e-3))
            right = (weight * logs) @ self.shares
            slopes = np.linalg.solve(gram + 1e-2 * np.eye(k), right[:, :, None])[:, :, 0]
            made.append(np.column_stack([c, slopes]))
        return np.stack(made, axis=1)


def _law(form: Form, shares: np.ndarray) -> _Law:
    return _LogLinear(shares) if form == "loglinear" else _Effective(shares, form == "returns")


def fit_law(
    form: Form,
    shares_NK: Float64[np.ndarray, "N K"],
    y_BN: Float64[np.ndarray, "B N"],
    weight_BN: Float64[np.ndarray, "B N"] | None = None,
    *,
    start_BP: Float64[np.ndarray, "B P"] | None = None,
    n_starts: int = 4,
    seed: int = 0,
) -> Float64[np.ndarray, "B P"]:
    """Fit a law to each row of ``y_BN``.

    Args:
        form: Which law.
        shares_NK: Share of each source in each run.
        y_BN: Loss of each run, one row per problem.
        weight_BN: Weight of each run in each problem (0 leaves it out, 2 counts it twice); None
            for ones.
        start_BP: Parameters to start from (of a fit to nearly the same runs).
        n_starts: Starts tried when there is none.
        seed: Seed of the starts.

    Returns:
        Parameters of the best start of each problem.
    """
    weight = np.ones_like(y_BN) if weight_BN is None else weight_BN
    law = _law(form, shares_NK)
    starts = law.starts(y_BN, weight, seed, n_starts) if start_BP is None else start_BP[:, None, :]
    n_b, n_s, n_p = starts.shape
    low, high = law.bounds()
    theta = np.empty((n_b, n_p))
    rows = max(_BATCH_VALUES // (len(shares_NK) * n_p * n_s), 1)
    for first in range(0, n_b, rows):
        part = slice(first, min(first + rows, n_b))
        n = part.stop - part.start
        found, value = solve(
            law, starts[part].reshape(-1, n_p), np.repeat(y_BN[part], n_s, axis=0),
            np.repeat(weight[part], n_s, axis=0), delta=HUBER, penalty_PP=law.penalty(),
            low_P=low, high_P=high,
        )  # fmt: skip
        best = np.argmin(value.reshape(n, n_s), axis=1)
        theta[part] = found.reshape(n, n_s, n_p)[np.arange(n), best]
    return theta


def predict_law(
    form: Form, theta_BP: Float64[np.ndarray, "B P"], shares_MK: Float64[np.ndarray, "M K"]
) -> Float64[np.ndarray, "B M"]:
    """Return the losses that fitted laws expect of mixes.

    Shares need not sum to 1: a source that is repeated counts as its effective share.
    """
    rows = max(_BATCH_VALUES // max(len(theta_BP) * shares_MK.shape[1], 1), 1)
    parts = [
        _law(form, shares_MK[first : first + rows]).predict(theta_BP)
        for first in range(0, len(shares_MK), rows)
    ]
    return np.concatenate(parts, axis=1)


def transfer_rates(
    form: Form, theta_BP: Float64[np.ndarray, "B P"], n_sources: int
) -> Float64[np.ndarray, "B K"]:
    """Return effective tokens per token of each source; the largest of a target is 1.

    Raises:
        ValueError: The log-linear law has none.
    """
    if form == "loglinear":
        raise ValueError("the log-linear law has no transfer rates")
    log_s = theta_BP[:, 3 : 3 + n_sources]
    return np.exp(log_s - log_s.max(axis=1, keepdims=True))


def _correlation(shares: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    total = weight.sum(axis=1, keepdims=True)
    x_mean = weight @ shares / total
    centred = weight * (y - np.sum(weight * y, axis=1, keepdims=True) / total)
    cross = centred @ shares - x_mean * centred.sum(axis=1, keepdims=True)
    x_var = weight @ shares**2 / total - x_mean**2
    y_var = np.sum(centred * y, axis=1, keepdims=True) / total
    return cross / total / np.sqrt(np.maximum(x_var * y_var, 1e-20))
