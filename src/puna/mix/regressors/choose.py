"""Choice of a regressor by repeated cross-validation, and what is known about its errors.

Nothing here sees held-out mixes: all choices are made on the runs that are fitted. What comes back
can be asked for predictions, for their spread (the bootstrap over runs where a fit is quick, the
grouped jackknife over the folds of the cross-validation where it is not; Efron and Tibshirani 1993,
chapters 6 and 11) and for its error on runs that it had not seen.

Shapes: N runs, T targets, K sources, M mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError
from puna.mix.metrics import spearman
from puna.mix.regressors.models import Fitted, FittedMean, Regressor, regressors

N_FOLDS = 5
_REUSE_FROM_RUNS = 200
"""From so many runs on hyperparameters found once serve all folds: a fold hardly moves them."""
AVERAGED = ("returns", "gp", "trees")
PREFERENCE = ("returns", "average", "stack", "law+trees", "gp", "trees", "efftok", "loglinear",
              "linear")  # fmt: skip
"""Among models that cross-validation cannot tell apart the first is taken: a law keeps its ranking
of mixes best when the models grow."""
TIE = 0.05
"""An error that is larger by so much is not worth a model that extrapolates worse."""


@dataclass(frozen=True)
class Score:
    """Errors on runs that were left out, of one regressor."""

    name: str
    spearman_T: Float64[np.ndarray, " T"]
    relative_rmse_T: Float64[np.ndarray, " T"]
    """Root mean squared error over the standard deviation of the losses."""
    behind: float
    """Mean squared relative error minus that of the best regressor."""
    behind_se: float
    """Standard error of that difference over runs."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; a target whose rank correlation is undefined has None."""
        rho = float(np.nanmean(self.spearman_T)) if np.isfinite(self.spearman_T).any() else None
        return {
            "name": self.name, "spearman": rho, "behind": self.behind, "behind_se": self.behind_se,
            "relative_rmse": float(self.relative_rmse_T.mean()),
        }  # fmt: skip


@dataclass(frozen=True)
class Surrogate:
    """The chosen regressor, fitted to all runs."""

    name: str
    fitted: Fitted
    scores: list[Score]
    out_of_fold_TN: Float64[np.ndarray, "T N"]
    y_TN: Float64[np.ndarray, "T N"]
    shares_NK: Float64[np.ndarray, "N K"]
    weights: dict[str, float]
    """Regressors inside and their shares."""
    members: dict[str, Fitted]
    _folds: dict[str, list[Fitted]] = field(default_factory=dict)
    _regressors: dict[str, Regressor] = field(default_factory=dict)
    _drawn: dict[tuple[str, int, int], list[Fitted]] = field(default_factory=dict)

    @property
    def rmse_T(self) -> Float64[np.ndarray, " T"]:
        """Error of each target on left-out runs, noise of the runs included."""
        return np.sqrt(np.mean((self.out_of_fold_TN - self.y_TN) ** 2, axis=1))

    def predict(self, shares_MK: Float64[np.ndarray, "M K"]) -> Float64[np.ndarray, "T M"]:
        """Return the expected loss of each target at each mix."""
        return self.fitted.predict(shares_MK)

    def replicate_losses(
        self, shares_MK: Float64[np.ndarray, "M K"], n: int = 30, seed: int = 0
    ) -> Float64[np.ndarray, "n T M"]:
        """Return ``n`` versions of the predictions, as other draws of the runs would give them."""
        rng = np.random.default_rng(seed)
        n_runs = len(self.shares_NK)
        draws = rng.multinomial(n_runs, np.full(n_runs, 1 / n_runs), n).astype(np.float64)
        made = np.zeros((n, len(self.y_TN), len(shares_MK)))
        for name, share in self.weights.items():
            how, full = self._regressors[name], self.members[name]
            if how.quick:
                key = (name, n, seed)
                if key not in self._drawn:
                    self._drawn[key] = [
                        how.fit(self.shares_NK, self.y_TN, weight, near=full) for weight in draws
                    ]
                made += share * np.array([one.predict(shares_MK) for one in self._drawn[key]])
            else:
                folds = np.array([one.predict(shares_MK) for one in self._folds[name]])
                moves = np.sqrt(N_FOLDS - 1.0) * (folds - folds.mean(axis=0))
                made += share * (full.predict(shares_MK) + moves[rng.integers(len(folds), size=n)])
        return made

    def std(
        self, shares_MK: Float64[np.ndarray, "M K"], n: int = 20, seed: int = 0
    ) -> Float64[np.ndarray, "T M"]:
        """Return the standard deviation of predictions: spread of the fit, and its misfit."""
        spread = self.replicate_losses(shares_MK, n, seed).std(axis=0)
        return np.sqrt(spread**2 + self.rmse_T[:, None] ** 2)


def choose(
    shares: Float64[np.ndarray, "N K"],
    y: Float64[np.ndarray, "T N"],
    *,
    candidates: Sequence[Regressor] | None = None,
    only: str | None = None,
    n_repeats: int | None = None,
    seed: int = 0,
) -> Surrogate:
    """Fit every regressor that the runs allow and take the best by cross-validation.

    Args:
        shares: Mixes of the runs.
        y: Losses of the runs; no NaN.
        candidates: Regressors; default all of :func:`.models.regressors`.
        only: Name of the one to take, whatever cross-validation says.
        n_repeats: Times that the runs are split anew; by default so often that about 500 left-out
            predictions decide, 1 to 3 times.
        seed: Seed of the splits.

    Returns:
        The regressor whose squared error on left-out runs is lowest, or the first of
        ``PREFERENCE`` that is within one standard error, or 5 % of the error, of it.

    Raises:
        PunaError: There are too few runs, or ``only`` is no name.
    """
    n, k = shares.shape
    known = list(regressors() if candidates is None else candidates)
    known = [one for one in known if one.name == only] or known
    usable = [one for one in known if one.n_fewest(k) <= int(n * (1 - 1 / N_FOLDS))]
    if not usable:
        fewest = min(one.n_fewest(k) for one in known)
        need = int(np.ceil(fewest * N_FOLDS / (N_FOLDS - 1)))
        raise PunaError(
            f"{n} runs are too few for {k} sources: the smallest regressor has {fewest} "
            f"parameters, and cross-validation leaves out every fifth run",
            f"make at least {need} runs (better {4 * k}), or merge sources",
        )
    scale = y.std(axis=1, keepdims=True)
    scale = np.where(scale > 0, scale, 1.0)
    folds = _splits(n, n_repeats or min(max(round(512 / n), 1), 3), seed)
    members, parts, unseen = {}, {}, {}
    for one in usable:
        full = one.fit(shares, y, seed=seed)
        members[one.name] = full
        parts[one.name], unseen[one.name] = _cross_validate(one, full, shares, y, folds)
    mixed = _averages(unseen, y / scale, folds, scale)
    every = {**unseen, **{name: predicted for name, (predicted, _) in mixed.items()}}
    scores = _scores(every, y, scale)
    name = _pick(scores, only)
    weights = mixed[name][1] if name in mixed else {name: 1.0}
    weights = {one: share for one, share in weights.items() if share > 0}
    fitted = FittedMean([members[one] for one in weights], np.array(list(weights.values())))
    return Surrogate(
        name, fitted, scores, every[name].mean(axis=0), y, shares, weights,
        {one: members[one] for one in weights}, {one: parts[one] for one in weights},
        {one.name: one for one in usable if one.name in weights},
    )  # fmt: skip


def _splits(n: int, n_repeats: int, seed: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n_repeats):
        order = rng.permutation(n)
        made.append([np.sort(order[fold::N_FOLDS]) for fold in range(N_FOLDS)])
    return made


def _cross_validate(
    how: Regressor, full: Fitted, shares: np.ndarray, y: np.ndarray, folds: list[list[np.ndarray]]
) -> tuple[list[Fitted], np.ndarray]:
    """Return the fit of each fold and repeats x targets x runs of predictions of left-out runs."""
    near = full if how.quick or len(shares) >= _REUSE_FROM_RUNS else None
    unseen = np.empty((len(folds), *y.shape))
    fits: list[Fitted] = []
    for repeat, split in enumerate(folds):
        for out in split:
            kept = np.setdiff1d(np.arange(len(shares)), out)
            fit = how.fit(shares[kept], y[:, kept], near=near)
            unseen[repeat][:, out] = fit.predict(shares[out])
            fits.append(fit)
    return fits, unseen


def _averages(
    unseen: dict[str, np.ndarray], relative_y: np.ndarray, folds: list[list[np.ndarray]],
    scale: np.ndarray,
) -> dict[str, tuple[np.ndarray, dict[str, float]]]:  # fmt: skip
    """Return the plain average and the stack, whose weights no run helps to find for itself."""
    made: dict[str, tuple[np.ndarray, dict[str, float]]] = {}
    plain = [name for name in AVERAGED if name in unseen]
    if len(plain) > 1:
        mean = np.mean([unseen[name] for name in plain], axis=0)
        made["average"] = mean, {name: 1 / len(plain) for name in plain}
    names = list(unseen)
    if len(names) > 1:
        values = np.array([unseen[name] for name in names]) / scale
        stacked = np.empty_like(unseen[names[0]])
        for repeat, split in enumerate(folds):
            mine = values[:, repeat]
            for out in split:
                kept = np.setdiff1d(np.arange(mine.shape[2]), out)
                share = _stack(mine[:, :, kept], relative_y[:, kept])
                stacked[repeat][:, out] = np.tensordot(share, mine[:, :, out], 1) * scale
        share = _stack(values.mean(axis=1), relative_y)
        share = np.where(share < 0.02, 0.0, share)
        made["stack"] = stacked, dict(zip(names, (share / share.sum()).tolist(), strict=True))
    return made


def _stack(values: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return shares, at least 0 and summing to 1, with the least squared error (Breiman 1996)."""
    errors = (values - y).reshape(len(values), -1)
    gram = errors @ errors.T / errors.shape[1]
    share = np.full(len(values), 1 / len(values))
    rate = 1.0 / np.trace(gram)
    for _ in range(500):
        step = np.exp(-20 * rate * (gram @ share - share @ gram @ share))
        share = share * step / (share @ step)
    return share


def _scores(every: dict[str, np.ndarray], y: np.ndarray, scale: np.ndarray) -> list[Score]:
    squares = {
        name: np.mean(((predicted - y) / scale) ** 2, axis=(0, 1))
        for name, predicted in every.items()
    }
    best = min(squares.values(), key=lambda one: float(one.mean()))
    made = []
    for name, predicted in every.items():
        rho = [
            np.mean([spearman(one[t], y[t]) for one in predicted]) for t in range(len(y))
        ]  # fmt: skip
        error = np.sqrt(np.mean(((predicted - y) / scale) ** 2, axis=(0, 2)))
        gap = squares[name] - best
        se = float(gap.std(ddof=1) / np.sqrt(len(gap)))
        made.append(Score(name, np.array(rho), error, float(gap.mean()), se))
    return made


def _pick(scores: list[Score], only: str | None) -> str:
    by_name = {one.name: one for one in scores}
    if only is not None:
        if only not in by_name:
            raise PunaError(
                f"regressor {only!r} cannot be used here", f"use one of {', '.join(by_name)}"
            )
        return only
    order = {name: index for index, name in enumerate(PREFERENCE)}
    best = min(float(np.mean(one.relative_rmse_T**2)) for one in scores)
    slack = best * ((1 + TIE) ** 2 - 1)
    tied = [one.name for one in scores if one.behind <= max(one.behind_se, slack)]
    return min(tied, key=lambda name: order.get(name, len(order)))
