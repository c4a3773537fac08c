"""Confirmation on fresh seeds: the only ground on which a mix is recommended for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError
from puna.mix.extra import load

FEWEST_SEEDS = 2


@dataclass(frozen=True)
class Confirmation:
    """A mix against a baseline, both trained with fresh seeds.

    Attributes:
        baseline: Its name.
        gain: Mean value of the baseline minus that of the mix; positive when the mix is better.
        low: Lower end of the 90 % interval (Welch).
        high: Upper end.
        better: Whether the whole interval is above 0.
    """

    baseline: str
    gain: float
    low: float
    high: float

    @property
    def better(self) -> bool:
        """Whether the mix is better beyond the noise of seeds."""
        return self.low > 0


def confirm(
    mix: Float64[np.ndarray, " S"], baselines: Mapping[str, Float64[np.ndarray, " S"]]
) -> tuple[list[Confirmation], str]:
    """Compare values of fresh runs.

    Args:
        mix: Objective of each seed of the mix, lower is better.
        baselines: The same of each baseline.

    Returns:
        One comparison per baseline, and the verdict in words.

    Raises:
        PunaError: A side has fewer than two seeds.
    """
    student = load("scipy.stats", "the comparison of seeds").t
    made = []
    for name, values in baselines.items():
        if min(len(mix), len(values)) < FEWEST_SEEDS:
            raise PunaError(
                f"{name}: {len(values)} seeds against {len(mix)} of the mix tell no noise",
                "train at least 2 fresh seeds of each, better 3",
            )
        a, b = np.var(values, ddof=1) / len(values), np.var(mix, ddof=1) / len(mix)
        se = float(np.sqrt(a + b))
        freedom = (a + b) ** 2 / (a**2 / (len(values) - 1) + b**2 / (len(mix) - 1) + 1e-300)
        reach = float(student.ppf(0.95, max(freedom, 1.0))) * se
        gain = float(np.mean(values) - np.mean(mix))
        made.append(Confirmation(name, gain, gain - reach, gain + reach))
    losers = [one.baseline for one in made if one.high < 0]
    unclear = [one.baseline for one in made if not one.better and one.high >= 0]
    if losers:
        return made, f"Refuted: {', '.join(losers)} is better on fresh seeds. Use that."
    if unclear:
        return made, (
            f"Not known: on fresh seeds the mix and {', '.join(unclear)} differ by less than the "
            "noise. Train more seeds or tokens, or keep the simpler mix."
        )
    return made, "Confirmed on fresh seeds: the mix beats every baseline. Recommended."
