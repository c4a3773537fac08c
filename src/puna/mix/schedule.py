"""Schedules of two phases, and what an annealing trial of a small source is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError
from puna.mix.sources import Manifest, shares_of
from puna.train.mixture import SCHEMA


@dataclass(frozen=True)
class Phase:
    """Shares over some of the tokens.

    Attributes:
        name: ``stable`` or ``anneal``.
        n_tokens: Tokens of the phase.
        shares: Share of each source.
    """

    name: str
    n_tokens: float
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Schedule:
    """Phases in their order."""

    phases: tuple[Phase, ...]

    @property
    def n_tokens(self) -> float:
        """Tokens of all phases."""
        return sum(phase.n_tokens for phase in self.phases)

    def mix(self) -> dict[str, float]:
        """Return the share of each source in all tokens."""
        total: dict[str, float] = {}
        for phase in self.phases:
            for name, share in phase.shares.items():
                total[name] = total.get(name, 0.0) + share * phase.n_tokens / self.n_tokens
        return total

    def features(self, names: list[str]) -> Float64[np.ndarray, " K2"]:
        """Return 2 K features for a regressor: tokens of each source in each phase, as shares."""
        return np.concatenate([
            [phase.shares.get(name, 0.0) * phase.n_tokens / self.n_tokens for name in names]
            for phase in self.phases
        ])  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the values of a schedule file, which ``mix`` of ``[train.pretrain]`` names."""
        return {
            "schema": SCHEMA, "n_tokens": self.n_tokens,
            "phases": [
                {"name": one.name, "n_tokens": one.n_tokens, "shares": dict(one.shares)}
                for one in self.phases
            ],
        }  # fmt: skip

    def to_recipe(self, seq_len: int, global_batch: int) -> dict[str, Any]:
        """Return what a recipe's loader takes: weights from a step on.

        Args:
            seq_len: Tokens of a row.
            global_batch: Rows of a step.
        """
        per_step = seq_len * global_batch
        first, phases, tokens = self.phases[0], [], 0.0
        for phase in self.phases[1:]:
            tokens += self.phases[len(phases)].n_tokens
            step = round(tokens / per_step)
            phases.append({"first_step": step, "weights": dict(phase.shares)})
        return {"weights": dict(first.shares), "phases": phases,
                "steps": round(self.n_tokens / per_step)}  # fmt: skip


def two_phases(
    manifest: Manifest, stable: Mapping[str, float], anneal: Mapping[str, float],
    anneal_share: float = 0.1,
) -> Schedule:  # fmt: skip
    """Make a schedule and check it against the limits on repetition.

    Raises:
        PunaError: Shares are no shares, or a source is read more often than allowed over both
            phases.
    """
    if not 0 < anneal_share < 1:
        raise PunaError(f"anneal_share is {anneal_share}", "use a number between 0 and 1")
    names, total = manifest.names, manifest.objective.n_tokens
    parts = []
    for name, shares, part in (
        ("stable", stable, 1 - anneal_share), ("anneal", anneal, anneal_share)
    ):  # fmt: skip
        vector = shares_of(dict(shares), names, name)
        kept = {n: float(s) for n, s in zip(names, vector, strict=True) if s > 0}
        parts.append(Phase(name, part * total, kept))
    made = Schedule(tuple(parts))
    mix = made.mix()
    vector = np.array([mix.get(name, 0.0) for name in names])
    for source, epochs in zip(manifest.source, manifest.epochs(vector), strict=True):
        if epochs > source.max_epochs * (1 + 1e-9):
            raise PunaError(
                f"{source.name} would be read {epochs:.2f} times over both phases, "
                f"at most {source.max_epochs:g} are allowed",
                "lower its share, or train on fewer tokens",
            )
    return made


@dataclass(frozen=True)
class AnnealValue:
    """What a small source brings when it is added to the last tokens of a training.

    Attributes:
        limit: Gain that more tokens approach.
        rate: ``gain(D) = limit * (1 - (1 + D / scale)^-1)``; this is ``scale``, in tokens.
        at_target: Gain at the budget asked for.
        low: Lower end, from the noise of the trials.
        high: Upper end.
    """

    limit: float
    rate: float
    at_target: float
    low: float
    high: float


def anneal_value(
    n_tokens: Float64[np.ndarray, " P"], gain: Float64[np.ndarray, " P"],
    gain_sd: Float64[np.ndarray, " P"], target_tokens: float, *, n_draws: int = 200, seed: int = 0,
) -> AnnealValue:  # fmt: skip
    """Fit the curve of gain over annealing budgets; one budget does not rank sources.

    Args:
        n_tokens: Budget of each trial.
        gain: Loss of the trial without the source minus with it.
        gain_sd: Noise of each gain.
        target_tokens: Where the gain is wanted.
        n_draws: Draws for the interval.
        seed: Their seed.

    Raises:
        PunaError: There are fewer than two budgets.
    """
    if len(np.unique(n_tokens)) < 2:
        raise PunaError(
            "one annealing budget does not tell how a gain grows: ranks of sources change with it",
            "run the trial at two budgets at least, better three",
        )
    rng = np.random.default_rng(seed)
    best = _saturating(n_tokens, gain)
    drawn = [_saturating(n_tokens, gain + gain_sd * rng.standard_normal(len(gain)))
             for _ in range(n_draws)]  # fmt: skip
    values = [_gain(one, target_tokens) for one in drawn]
    low, high = np.percentile(values, [5, 95])
    return AnnealValue(best[0], best[1], _gain(best, target_tokens), float(low), float(high))


def _saturating(n_tokens: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    scales = np.geomspace(n_tokens.min() / 30, n_tokens.max() * 30, 200)
    shape = n_tokens[None] / (n_tokens[None] + scales[:, None])
    limit = (shape @ gain) / (shape**2).sum(axis=1)
    error = ((gain - limit[:, None] * shape) ** 2).sum(axis=1)
    at = int(np.argmin(error))
    return float(limit[at]), float(scales[at])


def _gain(one: tuple[float, float], tokens: float) -> float:
    return one[0] * tokens / (tokens + one[1])
