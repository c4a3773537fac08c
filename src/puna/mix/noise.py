"""How noisy a target is: the scatter of seeds against the differences that mixes make.

A target whose mixes differ by less than twice the noise of a seed cannot be optimised: the best
mix of such a table is the luckiest. What would do is told: so many seeds per mix, or so many
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.core.errors import PunaError
from puna.mix.metrics import spearman
from puna.mix.runs import Runs

SMALLEST_SNR = 2.0


@dataclass(frozen=True)
class TargetNoise:
    """Noise of one target.

    Attributes:
        target: Its name.
        sd_seed: Standard deviation between seeds of one mix, from replicates.
        sd_seed_low: Lower end of its 90 % interval (chi-squared).
        sd_seed_high: Upper end.
        sd_mix: Standard deviation between mixes, noise taken out.
        seed_rank: Spearman between the first and the second seed; NaN under 3 pairs.
        n_pairs: Replicated mixes.
    """

    target: str
    sd_seed: float
    sd_seed_low: float
    sd_seed_high: float
    sd_mix: float
    seed_rank: float
    n_pairs: int

    @property
    def snr(self) -> float:
        """Scatter of mixes over scatter of seeds."""
        return self.sd_mix / self.sd_seed if self.sd_seed > 0 else float("inf")

    @property
    def best_rank(self) -> float:
        """Best possible rank correlation with one noisy measurement, sqrt(S^2 / (1 + S^2))."""
        s = self.snr
        return 1.0 if np.isinf(s) else float(np.sqrt(s**2 / (1 + s**2)))

    @property
    def seeds_needed(self) -> int:
        """Seeds per mix whose mean has a signal-to-noise of 2; their noise falls as 1/sqrt(n)."""
        s = self.snr
        return 1 if s >= SMALLEST_SNR else int(np.ceil((SMALLEST_SNR / max(s, 1e-3)) ** 2))

    @property
    def fine(self) -> bool:
        """Whether it can be optimised."""
        return self.snr >= SMALLEST_SNR

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        rank = None if np.isnan(self.seed_rank) else self.seed_rank
        return {
            "target": self.target, "sd_seed": self.sd_seed, "sd_seed_low": self.sd_seed_low,
            "sd_seed_high": self.sd_seed_high, "sd_mix": self.sd_mix,
            "snr": None if np.isinf(self.snr) else self.snr, "best_rank": self.best_rank,
            "seed_rank": rank, "n_pairs": self.n_pairs, "seeds_needed": self.seeds_needed,
            "fine": self.fine,
        }  # fmt: skip


def measure_noise(runs: Runs) -> list[TargetNoise] | None:
    """Measure the noise of each target from mixes that were run with several seeds.

    Returns:
        One entry per target; None when no mix was run twice.
    """
    groups = runs.replicates()
    if not groups:
        return None
    freedom = sum(len(rows) - 1 for rows in groups)
    seen = np.unique(np.round(runs.shares_NK, 6), axis=0, return_index=True)[1]
    low, high = _chi_square(freedom)
    made = []
    for name, loss in zip(runs.targets, runs.loss_TN, strict=True):
        squares = sum(float(((loss[rows] - loss[rows].mean()) ** 2).sum()) for rows in groups)
        variance = squares / freedom
        between = float(np.var(loss[seen], ddof=1)) if len(seen) > 1 else 0.0
        first = np.array([loss[rows[0]] for rows in groups])
        second = np.array([loss[rows[1]] for rows in groups])
        made.append(
            TargetNoise(
                name, float(np.sqrt(variance)), float(np.sqrt(squares / high)),
                float(np.sqrt(squares / low)), float(np.sqrt(max(between - variance, 0.0))),
                spearman(first, second), len(groups),
            )
        )  # fmt: skip
    return made


def refuse_noisy(noise: list[TargetNoise], wanted: list[str]) -> None:
    """Refuse targets whose signal-to-noise is under 2.

    Raises:
        PunaError: There is one; the message tells the seeds or tokens that would do.
    """
    weak = [one for one in noise if one.target in wanted and not one.fine]
    if not weak:
        return
    lines = ", ".join(f"{one.target} ({one.snr:.2g})" for one in weak)
    most = max(weak, key=lambda one: one.seeds_needed)
    raise PunaError(
        f"signal-to-noise under {SMALLEST_SNR:g}: {lines}; the best mix of such a target is the "
        "luckiest",
        f"run {most.seeds_needed} seeds per mix, train about {most.seeds_needed} times as many "
        "tokens, leave these targets out (weight 0), or say --noisy to see the fit all the same",
    )


def _chi_square(freedom: int) -> tuple[float, float]:
    """Return the 5th and 95th percentile (Wilson and Hilferty 1931, within 1 % from 3 on)."""
    a = 2 / (9 * freedom)
    root = 1.6449 * np.sqrt(a)
    low = freedom * max(1 - a - root, 0.05) ** 3
    return float(low), float(freedom * (1 - a + root) ** 3)
