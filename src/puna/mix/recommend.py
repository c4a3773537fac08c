"""The recommendation: the best mix, how sure that is, and when it is not known.

The optimum of a fitted surface is an optimist: of many mixes the one whose error is luckiest wins.
So the mix that is taken is the mean of the optima of many draws of the runs (bagging, Breiman
1996); its chance to beat each baseline counts the spread of the fit and its misfit on unseen runs;
and it stays a candidate until fresh runs have confirmed it (:mod:`.confirm`).

Shapes: N runs, T targets, K sources, M mixes, R replicates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64

from puna.mix.regressors.choose import Surrogate
from puna.mix.sources import named
from puna.mix.task import Task

LEVEL = 0.9
SURE = 0.9
"""A mix is recommended when it beats every baseline with this probability."""
_POOL, _LOCAL, _ROUNDS, _SHORTLIST = 3500, 1000, 4, 1000
_NEAR = 0.1
"""Distance of two mixes from which on their errors are taken for independent."""


@dataclass(frozen=True)
class Duel:
    """The recommended mix against a baseline."""

    name: str
    shares_K: Float64[np.ndarray, " K"]
    value: float
    gain: float
    """Value of the baseline minus that of the mix; positive when the mix is better."""
    gain_low: float
    gain_high: float
    probability: float
    """That the mix is better."""


@dataclass(frozen=True)
class Recommendation:
    """A mix, its intervals and the verdict."""

    task: Task
    shares_K: Float64[np.ndarray, " K"]
    low_K: Float64[np.ndarray, " K"]
    high_K: Float64[np.ndarray, " K"]
    flat_low_K: Float64[np.ndarray, " K"]
    flat_high_K: Float64[np.ndarray, " K"]
    value: float
    value_sd: float
    loss_T: Float64[np.ndarray, " T"]
    loss_sd_T: Float64[np.ndarray, " T"]
    duels: list[Duel]
    flat_share: float
    """Share of the mixes looked at that are as good within one standard deviation."""
    verdict: str
    known: bool
    doubts: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; losses are in the units of the objective."""
        names, task = self.task.sources, self.task
        manifest = task.manifest
        epochs = None if manifest is None else named(manifest.epochs(self.shares_K), names)
        return {
            "mix": named(self.shares_K, names), "epochs": epochs,
            "interval": {"level": LEVEL, "low": named(self.low_K, names),
                         "high": named(self.high_K, names)},
            "flat_region": {"share": self.flat_share, "low": named(self.flat_low_K, names),
                            "high": named(self.flat_high_K, names)},
            "caps": named(task.caps_K, names), "value": self.value, "value_sd": self.value_sd,
            "losses": {
                target: {"loss": float(loss * factor), "sd": float(sd * factor)}
                for target, loss, sd, factor in zip(
                    task.targets, self.loss_T, self.loss_sd_T, task.factor_T, strict=True
                )
            },
            "baselines": [
                {"name": duel.name, "mix": named(duel.shares_K, names), "value": duel.value,
                 "gain": duel.gain, "gain_low": duel.gain_low, "gain_high": duel.gain_high,
                 "probability": duel.probability}
                for duel in self.duels
            ],
            "verdict": self.verdict, "known": self.known, "doubts": self.doubts,
        }  # fmt: skip


def recommend(
    task: Task, found: Surrogate, *, seed_sd_T: Float64[np.ndarray, " T"] | None = None,
    n_replicates: int = 40, seed: int = 0,
) -> Recommendation:  # fmt: skip
    """Look for the best mix.

    Args:
        task: What is looked for.
        found: The fitted regressor.
        seed_sd_T: Noise of a seed on each target; it is taken out of the misfit.
        n_replicates: Bootstrap draws.
        seed: Seed of the search and of the draws.
    """
    observed = found.shares_NK
    pool = _search(task, found, seed)
    natural = task.effective(task.natural_K[None])
    mixes = dict(task.baselines)
    measured = task.value(found.y_TN, observed, found.predict(natural)[:, 0])
    mixes["best observed run"] = observed[int(np.argmin(measured))]

    def look(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return losses and values: of the replicates, and of the fit."""
        both = np.concatenate([shares, task.natural_K[None]])
        drawn = found.replicate_losses(task.effective(both), n_replicates, seed)
        point = found.predict(task.effective(both))
        values = task.value(drawn, both, drawn[..., -1])
        return drawn, values, point, task.value(point, both, point[:, -1])

    seen = look(pool)
    winners = pool[np.argmin(seen[1], axis=1)]
    centre = task.allowed(winners.mean(axis=0, keepdims=True))
    compared = np.concatenate([centre, np.array(list(mixes.values()))])
    parts = zip(look(compared), seen, strict=True)
    losses, values, point, value = (  # the centre, the pool, the baselines
        np.concatenate([few[..., :1], many[..., :-1], few[..., 1:-1]], axis=-1)
        for few, many in parts
    )
    every = np.concatenate([centre, pool, compared[1:]])
    n_pool, best = 1 + len(pool), 0
    spread = values.std(axis=0)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(winners, [tail, 100 - tail], axis=0)
    misfit = _misfit(task, found, seed_sd_T)
    gap_sd = (values[:, :n_pool] - values[:, [best]]).std(axis=0)
    as_good = value[:n_pool] - value[best] <= np.hypot(gap_sd, misfit)
    flat = every[:n_pool][as_good]
    duels = []
    for offset, (name, shares) in enumerate(mixes.items()):
        at = n_pool + offset
        gains = values[:, at] - values[:, best]
        close = float(np.linalg.norm(shares - every[best]))
        noise = np.sqrt(2) * misfit * min(close / _NEAR, 1.0) + 1e-12
        sure = np.mean([_normal(gain / noise) for gain in gains])
        reach = 1.645 * float(np.hypot(gains.std(), noise))
        gain = float(value[at] - value[best])
        duels.append(
            Duel(name, shares, float(value[at]), gain, gain - reach, gain + reach, float(sure))
        )
    doubts = _doubts(task, every[best], observed, found)
    if seed_sd_T is None:
        doubts.insert(
            0, "no mix was run with two seeds, so nothing tells a better mix from a lucky run"
        )
    known, verdict = _verdict(duels, doubts, float(as_good.mean()))
    return Recommendation(
        task, every[best], low, high, flat.min(axis=0), flat.max(axis=0), float(value[best]),
        float(np.hypot(spread[best], misfit)), point[:, best],
        np.hypot(losses[..., best].std(axis=0), found.rmse_T), duels, float(as_good.mean()),
        verdict, known, doubts,
    )  # fmt: skip


def _search(task: Task, found: Surrogate, seed: int) -> Float64[np.ndarray, "M K"]:
    """Return a shortlist of mixes: the best of several rounds, and others for comparison."""
    rng = np.random.default_rng(seed)
    k = len(task.sources)

    def score(mixes: np.ndarray) -> np.ndarray:
        both = np.concatenate([mixes, task.natural_K[None]])
        losses = found.predict(task.effective(both))
        return task.value(losses, both, losses[:, -1])[:-1]

    prior = 0.5 * task.natural_K + 0.5 / k
    strength = np.exp(rng.uniform(np.log(0.2), np.log(5.0), _POOL))
    centres = np.where(rng.random(_POOL)[:, None] < 0.5, prior * k, np.ones(k))
    drawn = rng.standard_gamma(np.maximum(centres * strength[:, None], 1e-3)) + 1e-12
    seen = np.concatenate([found.shares_NK, np.array(list(task.baselines.values()))])
    pool = task.allowed(np.concatenate([drawn, seen]))
    value = score(pool)
    n_before = 0
    for step in range(_ROUNDS + 1):
        top = pool[np.argsort(value)[:24]]
        centre = top[rng.integers(len(top), size=_LOCAL)]
        other = top[rng.integers(len(top), size=_LOCAL)]
        blend = rng.random((_LOCAL, 1))
        width = np.full((_LOCAL, 1), 0.5 / 2**step)
        if step == _ROUNDS:  # far and near: a draw of the runs may put its optimum anywhere here
            width = np.exp(rng.uniform(np.log(0.05), np.log(1.5), (_LOCAL, 1)))
        factor = np.exp(width * rng.standard_normal((_LOCAL, k)))
        local = task.allowed((blend * centre + (1 - blend) * other) * factor + 1e-12)
        n_before = len(pool)
        pool = np.concatenate([pool, local])
        value = np.concatenate([value, score(local)])
    order = np.argsort(value)
    good = _SHORTLIST // 4
    spread = n_before + rng.permutation(_LOCAL)[: _SHORTLIST // 2]
    rest = rng.permutation(order[good : len(order) // 2])[: _SHORTLIST // 4]
    return pool[np.unique(np.concatenate([order[:good], spread, rest]))]


def _misfit(task: Task, found: Surrogate, seed_sd_T: np.ndarray | None) -> float:
    """Return the error of the objective on unseen runs, without the noise of their seeds."""
    left = found.out_of_fold_TN - found.y_TN
    scale = task.weight_T * task.factor_T
    if task.worst:
        scale = np.where(task.weight_T > 0, task.factor_T, 0.0)
        variance = float(np.max(scale**2 * np.mean(left**2, axis=1)))
        noise = 0.0 if seed_sd_T is None else float(np.max((scale * seed_sd_T) ** 2))
    else:
        variance = float(np.mean((scale @ left) ** 2))
        noise = 0.0 if seed_sd_T is None else float(np.sum((scale * seed_sd_T) ** 2))
    return float(np.sqrt(max(variance - noise, 0.05 * variance)))


def _normal(z: float) -> float:
    from math import erf, sqrt

    return 0.5 * (1 + erf(z / sqrt(2)))


def _doubts(task: Task, best: np.ndarray, observed: np.ndarray, found: Surrogate) -> list[str]:
    doubts = []
    distance = np.linalg.norm(observed[:, None] - observed[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    usual = float(np.percentile(distance.min(axis=1), 95))
    away = float(np.linalg.norm(observed - best, axis=1).min())
    if away > max(usual, 0.02):
        doubts.append(
            f"the mix is farther from every run ({away:.2f}) than runs are from each other "
            f"({usual:.2f}): it is extrapolated"
        )
    beyond = [
        f"{name} {best[j]:.0%} (runs went to {observed[:, j].max():.0%})"
        for j, name in enumerate(task.sources)
        if best[j] > observed[:, j].max() + 0.02
    ]
    if beyond:
        doubts.append(f"shares above those of all runs: {', '.join(beyond)}")
    chosen = next(one for one in found.scores if one.name == found.name)
    weak = [
        t for t, rho, w in zip(task.targets, chosen.spearman_T, task.weight_T, strict=True)
        if w > 0 and not rho > 0.5
    ]  # fmt: skip
    if weak:
        doubts.append(f"unseen runs are ranked badly (Spearman under 0.5) on {', '.join(weak)}")
    return doubts


def _verdict(duels: list[Duel], doubts: list[str], flat_share: float) -> tuple[bool, str]:
    worst = min(duels, key=lambda duel: duel.probability)
    if worst.probability < SURE:
        return False, (
            f"Not known: the best mix found beats {worst.name} with a probability of only "
            f"{worst.probability:.0%} (needed: {SURE:.0%}). Keep {worst.name}, or make more runs "
            "near the mixes that look best."
        )
    if doubts:
        return False, (
            f"Not known: the mix would beat every baseline ({worst.name} with "
            f"{worst.probability:.0%}), but {doubts[0]}. Train it before you trust it."
        )
    return True, (
        f"Candidate: expected to beat every baseline, {worst.name} with a probability of "
        f"{worst.probability:.0%}. {flat_share:.0%} of the mixes looked at are as good within the "
        "error. Confirm it with three fresh seeds against the baselines before you use it."
    )
