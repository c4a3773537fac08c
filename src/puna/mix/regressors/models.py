"""The regressors: mixes and losses in, losses of other mixes out, all behind one interface.

Shapes: N runs, T targets, K sources, M mixes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float64

from puna.mix.extra import load
from puna.mix.regressors import gp, laws

Shares = Float64[np.ndarray, "N K"]
Losses = Float64[np.ndarray, "T N"]
Weights = Float64[np.ndarray, " N"]


class Fitted(Protocol):
    """What was learnt from some runs."""

    def predict(self, shares_MK: Float64[np.ndarray, "M K"]) -> Float64[np.ndarray, "T M"]:
        """Return the expected loss of each target at each mix."""
        ...


class Regressor(Protocol):
    """A way to learn losses from mixes."""

    @property
    def name(self) -> str:
        """Short name."""
        ...

    @property
    def quick(self) -> bool:
        """Whether it can be fitted anew for each draw of a bootstrap."""
        ...

    def n_fewest(self, n_sources: int) -> int:
        """Return how many runs it needs at least."""
        ...

    def fit(
        self, shares: Shares, y: Losses, weight: Weights | None = None, near: Any = None,
        seed: int = 0,
    ) -> Fitted:  # fmt: skip
        """Learn.

        Args:
            shares: Mixes of the runs.
            y: Their losses.
            weight: How often each run counts; None for once.
            near: What the same regressor learnt from nearly the same runs, to start from.
            seed: Seed of what is random.
        """
        ...


@dataclass(frozen=True)
class _Plane:
    slopes_TK: np.ndarray

    def predict(self, shares_MK: np.ndarray) -> np.ndarray:
        return self.slopes_TK @ shares_MK.T


@dataclass(frozen=True)
class Linear:
    """A plane through the shares, with a little ridge."""

    name: str = "linear"
    quick: bool = True
    ridge: float = 1e-3

    def n_fewest(self, n_sources: int) -> int:
        """Return how many runs it needs at least."""
        return n_sources + 1

    def fit(
        self, shares: Shares, y: Losses, weight: Weights | None = None, near: Any = None,
        seed: int = 0,
    ) -> Fitted:  # fmt: skip
        """Solve the normal equations; shares sum to 1, so that no constant is needed."""
        w = np.ones(len(shares)) if weight is None else weight
        gram = shares.T @ (w[:, None] * shares) + self.ridge * np.eye(shares.shape[1])
        return _Plane(np.linalg.solve(gram, shares.T @ (w[:, None] * y.T)).T)


@dataclass(frozen=True)
class FittedLaw:
    """Parameters of a law, one row per target."""

    form: laws.Form
    theta_TP: Float64[np.ndarray, "T P"]

    def predict(self, shares_MK: np.ndarray) -> np.ndarray:
        """Return the expected loss of each target at each mix."""
        return laws.predict_law(self.form, self.theta_TP, shares_MK)


@dataclass(frozen=True)
class Law:
    """A mixing law (:mod:`.laws`)."""

    name: laws.Form
    quick: bool = True

    def n_fewest(self, n_sources: int) -> int:
        """Return how many runs it needs at least: more than one and a half per source."""
        return n_sources + 5

    def fit(
        self, shares: Shares, y: Losses, weight: Weights | None = None, near: Any = None,
        seed: int = 0,
    ) -> FittedLaw:  # fmt: skip
        """Fit all targets at once."""
        weight_TN = None if weight is None else np.broadcast_to(weight, y.shape)
        start = near.theta_TP if isinstance(near, FittedLaw) else None
        theta = laws.fit_law(self.name, shares, y, weight_TN, start_BP=start, seed=seed)
        return FittedLaw(self.name, theta)


@dataclass(frozen=True)
class _Forest:
    boosters: list[Any]

    def predict(self, shares_MK: np.ndarray) -> np.ndarray:
        return np.array([one.predict(shares_MK, num_threads=1) for one in self.boosters])


@dataclass(frozen=True)
class Trees:
    """Gradient-boosted trees of LightGBM, one model per target, no early stopping.

    The smallest leaf has 5 runs: with LightGBM's own 20 there is no split at all under 40 runs.
    """

    name: str = "trees"
    quick: bool = False
    n_trees: int = 250
    learning_rate: float = 0.05
    n_leaves: int = 8
    n_smallest_leaf: int = 5

    def n_fewest(self, n_sources: int) -> int:
        """Return how many runs it needs at least: two splits' worth of leaves."""
        return 4 * self.n_smallest_leaf

    def fit(
        self, shares: Shares, y: Losses, weight: Weights | None = None, near: Any = None,
        seed: int = 0,
    ) -> Fitted:  # fmt: skip
        """Grow the trees of each target.

        Raises:
            PunaError: LightGBM is not installed.
        """
        lightgbm = load("lightgbm", "the regressor `trees`")
        settings = {
            "objective": "regression", "learning_rate": self.learning_rate, "num_threads": 1,
            "num_leaves": self.n_leaves, "min_child_samples": self.n_smallest_leaf,
            "verbosity": -1, "seed": seed, "deterministic": True, "force_col_wise": True,
        }  # fmt: skip
        made = [
            lightgbm.train(settings, lightgbm.Dataset(shares, one, weight=weight), self.n_trees)
            for one in y
        ]
        return _Forest(made)


@dataclass(frozen=True)
class FittedProcesses:
    """One process per target."""

    posteriors: list[gp.Posterior]

    def predict(self, shares_MK: np.ndarray) -> np.ndarray:
        """Return the expected loss of each target at each mix."""
        return np.array([one.predict(shares_MK) for one in self.posteriors])

    def std(self, shares_MK: np.ndarray) -> np.ndarray:
        """Return the standard deviation of each expected loss."""
        return np.array([one.std(shares_MK) for one in self.posteriors])


@dataclass(frozen=True)
class Process:
    """A Gaussian process per target (:mod:`.gp`); length scales come from ``n_most`` runs."""

    name: str = "gp"
    quick: bool = False
    n_most: int = 200

    def n_fewest(self, n_sources: int) -> int:
        """Return how many runs it needs at least."""
        return 2 * n_sources

    def fit(
        self, shares: Shares, y: Losses, weight: Weights | None = None, near: Any = None,
        seed: int = 0,
    ) -> FittedProcesses:  # fmt: skip
        """Find the hyperparameters (or keep those of ``near``), then show it all runs."""
        if isinstance(near, FittedProcesses):
            found = [one.process for one in near.posteriors]
        else:
            chosen = np.random.default_rng(seed).permutation(len(shares))[: self.n_most]
            found = [gp.fit_process(shares[chosen], one[chosen]) for one in y]
        pairs = zip(found, y, strict=True)
        return FittedProcesses([gp.condition(one, shares, mine, weight) for one, mine in pairs])


@dataclass(frozen=True)
class FittedSum:
    """A law and what corrects it."""

    law: Fitted
    rest: Fitted

    def predict(self, shares_MK: np.ndarray) -> np.ndarray:
        """Return the expected loss of each target at each mix."""
        return self.law.predict(shares_MK) + self.rest.predict(shares_MK)


@dataclass(frozen=True)
class LawAndRest:
    """A law, and another regressor on what it leaves."""

    law: Regressor
    rest: Regressor
    name: str = "law+trees"
    quick: bool = False

    def n_fewest(self, n_sources: int) -> int:
        """Return how many runs it needs at least."""
        return max(self.law.n_fewest(n_sources), self.rest.n_fewest(n_sources))

    def fit(
        self, shares: Shares, y: Losses, weight: Weights | None = None, near: Any = None,
        seed: int = 0,
    ) -> FittedSum:  # fmt: skip
        """Fit the law, then the rest to its residuals."""
        before = near if isinstance(near, FittedSum) else None
        law = self.law.fit(shares, y, weight, before and before.law, seed)
        left = y - law.predict(shares)
        return FittedSum(law, self.rest.fit(shares, left, weight, before and before.rest, seed))


@dataclass(frozen=True)
class FittedMean:
    """A weighted mean of what several regressors learnt."""

    members: list[Fitted]
    shares: Float64[np.ndarray, " members"]
    names: list[str] = field(default_factory=list)

    def predict(self, shares_MK: np.ndarray) -> np.ndarray:
        """Return the expected loss of each target at each mix."""
        pairs = zip(self.shares, self.members, strict=True)
        return np.sum([share * one.predict(shares_MK) for share, one in pairs], axis=0)


def has_trees() -> bool:
    """Tell whether LightGBM is installed."""
    return importlib.util.find_spec("lightgbm") is not None


def regressors(*, trees: bool | None = None) -> list[Regressor]:
    """Return the regressors that are compared, without averages of them.

    Args:
        trees: Whether to take those that need LightGBM; None when it is installed.
    """
    trees = has_trees() if trees is None else trees
    law = Law("returns")
    made: list[Regressor] = [Linear(), Law("loglinear"), Law("efftok"), law, Process()]
    if trees:
        rest = Trees(n_trees=150)
        made += [Trees(), LawAndRest(law, rest)]
    return made
