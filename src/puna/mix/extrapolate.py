"""From small models to large ones: the mixing law with size and tokens in it.

``L(N, D, r) = E + A N^-alpha + k (D z(r))^-beta`` with z the effective tokens of the target per
token (:mod:`.regressors.laws`): at one size the mixing law, of one mix Chinchilla's. Runs of
several sizes or lengths fit all of it; which mix is best then depends on the size only through
what is measured.

The rank of mixes at a large size is told from small ones with this, and beside it by their rank at
the largest size that was run alone, which DataDecide (Magnusson et al. 2025) found hard to beat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError
from puna.mix.regressors.laws import HUBER
from puna.mix.regressors.lm import solve
from puna.mix.runs import Runs

_EPSILON = 1e-6
_L2 = 3e-5


@dataclass(frozen=True)
class Extrapolation:
    """A fitted law of mix, size and tokens, one row of parameters per target."""

    theta_TP: Float64[np.ndarray, "T P"]
    n_params_unit: float
    n_tokens_unit: float

    def predict(
        self, shares_MK: Float64[np.ndarray, "M K"], n_params: float, n_tokens: float
    ) -> Float64[np.ndarray, "T M"]:
        """Return the expected loss of each target."""
        logs = np.log([n_params / self.n_params_unit, n_tokens / self.n_tokens_unit])
        many = np.broadcast_to(logs, (len(shares_MK), 2))
        return _Law(shares_MK, many[:, 0], many[:, 1])(self.theta_TP)[0]


class _Law:
    """Parameters: E, log A, log alpha, log k, log beta, log s of each source, log g."""

    def __init__(self, shares: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> None:
        self.shares, self.log_n, self.log_d = shares, log_n, log_d
        self.log_shares = np.log(np.maximum(shares, 1e-6))

    def __call__(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        k = self.shares.shape[1]
        alpha, beta = np.exp(theta[:, 2:3]), np.exp(theta[:, 4:5])
        g = np.exp(theta[:, -1:])
        size = np.exp(np.clip(theta[:, 1:2] - alpha * self.log_n, -60, 60))
        tokens = np.exp(theta[:, None, 5 : 5 + k] + g[:, :, None] * self.log_shares[None])
        tokens = tokens * (self.shares > 0)[None]
        z = tokens.sum(axis=2) + _EPSILON
        log_all = self.log_d + np.log(z)
        data = np.exp(np.clip(theta[:, 3:4] - beta * log_all, -60, 60))
        jac = np.empty((*z.shape, theta.shape[1]))
        jac[..., 0] = 1.0
        jac[..., 1] = size
        jac[..., 2] = -size * alpha * self.log_n
        jac[..., 3] = data
        jac[..., 4] = -data * beta * log_all
        by_s = np.multiply((-data * beta / z)[..., None], tokens, out=jac[..., 5 : 5 + k])
        jac[..., -1] = np.einsum("bnk,nk->bn", by_s, self.log_shares) * g
        return theta[:, :1] + size + data, jac


def fit_extrapolation(runs: Runs) -> Extrapolation:
    """Fit the law to runs of several sizes or lengths.

    Raises:
        PunaError: Runs do not tell their size and tokens, or have one size and one length only.
    """
    if (runs.n_params_N <= 0).any() or (runs.n_tokens_N <= 0).any():
        raise PunaError(
            "the table of runs has no n_params or n_tokens for some runs",
            "add both columns: they are needed to extrapolate",
        )
    if len(runs.scales()) < 2:
        raise PunaError(
            "all runs have one size and one length: nothing tells what a larger model does",
            "run some of the mixes at another size or with more tokens",
        )
    unit_n, unit_d = np.exp(np.log(runs.n_params_N).mean()), np.exp(np.log(runs.n_tokens_N).mean())
    log_n, log_d = np.log(runs.n_params_N / unit_n), np.log(runs.n_tokens_N / unit_d)
    law = _Law(runs.shares_NK, log_n, log_d)
    k, y = len(runs.sources), runs.loss_TN
    penalty = np.zeros((6 + k, 6 + k))
    penalty[5 : 5 + k, 5 : 5 + k] = _L2 / k * (np.eye(k) - 1.0 / k)
    penalty[-1, -1] = penalty[2, 2] = penalty[4, 4] = _L2 / k
    low = np.array([-5.0, -12.0, -4.0, -12.0, -4.0] + [-12.0] * k + [-1.6])
    high = np.array([20.0, 5.0, 1.0, 8.0, 1.0] + [6.0] * k + [0.7])
    if np.ptp(log_n) == 0:  # one size does not tell its exponent: the term is left out
        low[1] = high[1] = -12.0
    starts = []
    for share, beta in ((0.5, 0.3), (0.7, 0.5), (0.3, 0.15)):
        c = share * y.min(axis=1)
        rest = np.maximum(y.mean(axis=1) - c, 1e-3)
        columns = [c, np.log(0.3 * rest), np.full(len(y), np.log(0.35)), np.log(0.4 * rest),
                   np.full(len(y), np.log(beta))]  # fmt: skip
        pull = np.array([[np.corrcoef(runs.shares_NK[:, j], one)[0, 1] for j in range(k)]
                         for one in y])  # fmt: skip
        starts.append(np.column_stack([*columns, -1 - 2 * np.nan_to_num(pull), np.zeros(len(y))]))
    found = [
        solve(law, one, y, np.ones_like(y), delta=HUBER, penalty_PP=penalty, low_P=low,
              high_P=high, n_steps=120)
        for one in starts
    ]  # fmt: skip
    best = np.argmin([value for _, value in found], axis=0)
    theta = np.array([found[best[t]][0][t] for t in range(len(y))])
    return Extrapolation(theta, float(unit_n), float(unit_d))
