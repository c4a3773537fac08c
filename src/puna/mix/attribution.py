"""Who helps whom: transfer rates, what leaving a source out costs, Shapley values on a fit.

Shapes: T targets, K sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from puna.mix.regressors.laws import fit_law, transfer_rates
from puna.mix.runs import Runs

Predict = Callable[[Float64[np.ndarray, "M K"]], Float64[np.ndarray, "T M"]]
_EXACT_SOURCES = 8
_SAME = 2e-3
"""Shares that differ by less are taken for the same mix."""


@dataclass(frozen=True)
class Attribution:
    """What each source does for each target.

    Attributes:
        transfer_TK: Tokens of the target that a token of the source is worth, the best source 1.
        left_out_TK: Loss without the source minus loss of the mix, as fitted; positive: it helps.
        measured_TK: The same as measured, from runs of kind ``without`` beside the natural mix;
            NaN where no such run was made.
        shapley_TK: Share of the source in what the mix gains over an empty one.
    """

    transfer_TK: Float64[np.ndarray, "T K"]
    left_out_TK: Float64[np.ndarray, "T K"]
    measured_TK: Float64[np.ndarray, "T K"]
    shapley_TK: Float64[np.ndarray, "T K"]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; what was not measured is None."""
        measured = np.where(np.isfinite(self.measured_TK), self.measured_TK, np.nan)
        return {
            "transfer": self.transfer_TK.tolist(), "left_out": self.left_out_TK.tolist(),
            "left_out_measured": [
                [None if np.isnan(value) else value for value in row] for row in measured.tolist()
            ],
            "shapley": self.shapley_TK.tolist(),
        }  # fmt: skip


def attribute(
    runs: Runs, predict: Predict, mix_K: Float64[np.ndarray, " K"],
    natural_K: Float64[np.ndarray, " K"], *, seed: int = 0,
) -> Attribution:  # fmt: skip
    """Attribute losses to sources.

    Args:
        runs: The runs, for the law of transfer and for measured differences.
        predict: The fit, for mixes without a source.
        mix_K: The mix that is looked at.
        natural_K: The natural mix, of which runs without one source may have been made.
        seed: Seed of sampled orders.
    """
    theta = fit_law("returns", runs.shares_NK, runs.loss_TN)
    k = len(runs.sources)
    return Attribution(
        transfer_rates("returns", theta, k), left_out(predict, mix_K),
        measured_left_out(runs, natural_K), shapley(predict, mix_K, seed=seed),
    )  # fmt: skip


def left_out(predict: Predict, mix_K: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, "T K"]:
    """Return what the loss gains when a source's share goes to the others in proportion."""
    k = len(mix_K)
    mixes = [mix_K]
    for j in range(k):
        rest = mix_K.copy()
        rest[j] = 0.0
        mixes.append(rest / rest.sum() if rest.sum() > 0 else mix_K)
    losses = predict(np.array(mixes))
    return losses[:, 1:] - losses[:, :1]


def measured_left_out(
    runs: Runs, natural_K: Float64[np.ndarray, " K"]
) -> Float64[np.ndarray, "T K"]:
    """Return the same as measured: natural mix, and this mix without one source."""
    found = np.full((len(runs.targets), len(runs.sources)), np.nan)

    def like(shares: np.ndarray) -> np.ndarray:
        return np.abs(runs.shares_NK - shares).max(axis=1) < _SAME

    whole = like(natural_K)
    for j in range(len(runs.sources)):
        rest = natural_K.copy()
        rest[j] = 0.0
        without = like(rest / rest.sum()) & (runs.shares_NK[:, j] == 0)
        if whole.any() and without.any():
            gap = runs.loss_TN[:, without].mean(axis=1) - runs.loss_TN[:, whole].mean(axis=1)
            found[:, j] = gap
    return found


def shapley(
    predict: Predict, mix_K: Float64[np.ndarray, " K"], *, n_orders: int = 200, seed: int = 0
) -> Float64[np.ndarray, "T K"]:
    """Return the Shapley value of each source (Shapley 1953): its mean gain over all orders.

    A coalition is worth the loss of its sources in the proportions of the mix; the empty one is
    worth the mean loss of single sources. Exact up to 8 sources, else over sampled orders. The sum
    over sources is the loss of the empty coalition minus that of the mix.
    """
    k = len(mix_K)
    used = np.flatnonzero(mix_K > 0)
    rng = np.random.default_rng(seed)
    orders = _orders(used, n_orders, rng)
    coalitions = {tuple(sorted(order[:m])) for order in orders for m in range(1, len(used) + 1)}
    keys = sorted(coalitions)
    mixes = np.zeros((len(keys) + len(used), k))
    for row, members in enumerate(keys):
        mixes[row, list(members)] = mix_K[list(members)] / mix_K[list(members)].sum()
    mixes[len(keys) + np.arange(len(used)), used] = 1.0
    losses = predict(mixes)
    worth = {members: losses[:, row] for row, members in enumerate(keys)}
    empty = losses[:, len(keys) :].mean(axis=1)
    found = np.zeros((len(losses), k))
    for order in orders:
        before = empty
        for m, source in enumerate(order):
            after = worth[tuple(sorted(order[: m + 1]))]
            found[:, source] += before - after
            before = after
    return found / len(orders)


def _orders(used: np.ndarray, n: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    import itertools
    import math

    sources = [int(one) for one in used]
    if len(sources) <= _EXACT_SOURCES and math.factorial(len(sources)) <= 50 * n:
        return list(itertools.permutations(sources))
    made = []
    for _ in range(n // 2):  # an order and its reverse: less variance
        order = tuple(int(one) for one in rng.permutation(sources))
        made += [order, order[::-1]]
    return made
