"""Approaches 1 and 2 of Hoffmann et al. 2022: envelope of training curves, IsoFLOP parabolas.

Parameters N, tokens D, compute C = 6 N D in FLOP.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError

Values = Float64[np.ndarray, " P"]


@dataclass(frozen=True)
class PowerLaw:
    """``y = scale * x^exponent``."""

    scale: float
    exponent: float

    def __call__(self, x: float) -> float:
        """Return y."""
        return float(self.scale * x**self.exponent)


@dataclass(frozen=True)
class IsoFlop:
    """The optimum of one budget.

    Attributes:
        flop: The budget.
        n_tokens: Tokens at the lowest point of the parabola.
        loss: Loss there.
        n_points: Runs of the budget.
        inside: Whether the lowest point lies between the smallest and the largest run.
    """

    flop: float
    n_tokens: float
    loss: float
    n_points: int
    inside: bool


def fit_power(x: Values, y: Values) -> PowerLaw:
    """Fit a line through logarithms."""
    exponent, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def isoflop_optima(flop: Values, n_tokens: Values, loss: Values) -> list[IsoFlop]:
    """Fit a parabola in log tokens to each budget; budgets are told apart by their value.

    Raises:
        PunaError: No budget has three runs that curve upwards.
    """
    made = []
    for budget in np.unique(flop):
        mine = flop == budget
        if mine.sum() < 3:
            continue
        x, y = np.log(n_tokens[mine]), loss[mine]
        mean = x.mean()
        a, b, c = np.polyfit(x - mean, y, 2)
        if a <= 0:
            continue
        at = -b / (2 * a)
        inside = bool((x - mean).min() <= at <= (x - mean).max())
        low = float(c - b * b / (4 * a))
        made.append(IsoFlop(float(budget), float(np.exp(at + mean)), low, int(mine.sum()), inside))
    if not made:
        raise PunaError(
            "no budget has three runs whose losses curve upwards",
            "give runs of equal FLOP with fewer and with more tokens than the best",
        )
    return made


def optimal_tokens(optima: list[IsoFlop]) -> PowerLaw:
    """Return the tokens of the best model of a budget as a power law (approach 2).

    Raises:
        PunaError: There are fewer than two budgets.
    """
    if len(optima) < 2:
        raise PunaError("one budget gives no power law", "run at least two budgets")
    return fit_power(
        np.array([one.flop for one in optima]), np.array([one.n_tokens for one in optima])
    )


def envelope(
    flop: Values, n_params: Values, loss: Values, *, n_bins: int = 60
) -> tuple[PowerLaw, Float64[np.ndarray, "E 3"]]:
    """Return the parameters of the best model of a budget as a power law (approach 1).

    Args:
        flop: Compute of each point of the training curves.
        n_params: Parameters of its model.
        loss: Its loss.
        n_bins: Budgets looked at, evenly spaced in log FLOP.

    Returns:
        The power law, and the points of the envelope (FLOP, parameters, loss).

    Raises:
        PunaError: The curves of one size only, or too short, make no envelope.
    """
    edges = np.geomspace(flop.min(), flop.max() * (1 + 1e-9), n_bins + 1)
    which = np.digitize(flop, edges) - 1
    points = []
    for one in range(n_bins):
        mine = np.flatnonzero(which == one)
        if len(mine):
            at = mine[int(np.argmin(loss[mine]))]
            points.append((flop[at], n_params[at], loss[at]))
    kept = np.array(points)
    lower = np.minimum.accumulate(kept[:, 2]) == kept[:, 2]
    kept = kept[lower]
    sizes = np.unique(kept[:, 1])
    if len(sizes) < 3:
        raise PunaError(
            f"the envelope has models of {len(sizes)} sizes", "give curves of at least 3 sizes"
        )
    # The smallest and the largest model win everything below and above them: they tell nothing.
    core = (kept[:, 1] > sizes[0]) & (kept[:, 1] < sizes[-1]) if len(sizes) > 4 else slice(None)
    return fit_power(kept[core, 0], kept[core, 1]), kept


def plan_isoflops(
    total_flop: float, *, n_budgets: int = 4, n_sizes: int = 5, tokens_per_param: float = 20.0,
    width: float = 4.0, ratio: float = 3.0,
) -> list[tuple[float, float, float]]:  # fmt: skip
    """Say which models to train to find the optimum, within a total budget.

    Args:
        total_flop: Compute that all runs may take together.
        n_budgets: IsoFLOP curves; each is ``ratio`` times the one before.
        n_sizes: Runs per curve.
        tokens_per_param: Where the optimum is expected.
        width: The largest model of a curve has so many times the tokens per parameter of its
            expected optimum, the smallest that part of it.
        ratio: Between budgets.

    Returns:
        FLOP, parameters and tokens of each run; they add up to ``total_flop``.

    Raises:
        PunaError: Fewer than two budgets or three sizes are asked for.
    """
    if n_budgets < 2 or n_sizes < 3:
        raise PunaError(
            f"{n_budgets} budgets of {n_sizes} sizes find no optimum",
            "use at least 2 budgets and 3 sizes",
        )
    weights = ratio ** np.arange(n_budgets)
    budgets = total_flop * weights / weights.sum() / n_sizes
    runs = []
    for flop in budgets:
        centre = np.sqrt(flop / 6 / tokens_per_param)
        spread = np.sqrt(np.geomspace(1 / width, width, n_sizes))
        runs += [(float(flop), float(centre * s), float(flop / 6 / (centre * s))) for s in spread]
    return runs
