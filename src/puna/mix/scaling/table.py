"""Scaling laws of a table of runs: everything that ``puna mix scaling`` tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError
from puna.mix.runs import read_table
from puna.mix.scaling.isoflop import isoflop_optima, optimal_tokens
from puna.mix.scaling.surface import bootstrap, fit_projected, fit_surface, table_of

_SAME_FLOP = 0.02
"""Budgets that differ by less, relatively, are one: 6 N D of whole steps is never exactly equal."""
Values = Float64[np.ndarray, " P"]


def read_points(path: Path, loss: str) -> tuple[Values, Values, Values]:
    """Read parameters, tokens and losses.

    Args:
        path: Table with ``n_params``, ``n_tokens`` or ``flop``, and the loss.
        loss: Column of the loss.

    Raises:
        PunaError: A column is missing, or a value is no number.
    """
    table = read_table(path)
    if loss not in table:
        losses = [name for name in table if name.startswith("loss")]
        raise PunaError(
            f"{path}: has no column {loss!r}",
            f"name one with --loss: {', '.join(losses or list(table)[:8])}",
        )
    columns: dict[str, list[float]] = {}
    for name, into in (("n_params", "n_params"), ("n_tokens", "n_tokens"), ("flop", "flop"),
                       (loss, "loss")):  # fmt: skip
        for row, value in enumerate(table.get(name, []), 1):
            try:
                columns.setdefault(into, []).append(float(value))
            except (TypeError, ValueError) as error:
                raise PunaError(
                    f"{path}: row {row}: {name} is {value!r}", "write a number"
                ) from error
    return table_of(dict(columns))


def fit_scaling(
    n_params: Values, n_tokens: Values, loss: Values, budgets: Sequence[float] = (), *,
    n_draws: int = 100, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Fit approach 3, and approach 2 where budgets have several sizes; predict budgets.

    Approach 2 is told beside approach 3 because on the same points it may put the optimum
    elsewhere.

    Args:
        n_params: Parameters of each run.
        n_tokens: Its tokens.
        loss: Its loss.
        budgets: Compute to find the optimum for, in FLOP.
        n_draws: Draws of the points for 90 % intervals.
        seed: Seed of the draws.

    Raises:
        PunaError: As of :func:`puna.mix.scaling.surface.fit_projected`.
    """
    surface = fit_surface(n_params, n_tokens, loss)

    def again(n: Values, d: Values, y: Values) -> Any:
        return fit_surface(n, d, y, start=surface)

    made: dict[str, Any] = {
        "n_points": len(loss), "law": surface.to_json(),
        "projected": fit_projected(n_params, n_tokens, loss).to_json(),
        "interval": bootstrap(again, n_params, n_tokens, loss, n=n_draws, seed=seed),
        "isoflop": None, "isoflop_missing": "fewer than two budgets have three sizes",
        "optima": [],
    }  # fmt: skip
    power = None
    flop = _grouped(6 * n_params * n_tokens)
    counts = np.unique(flop, return_counts=True)[1]
    if (counts >= 3).sum() >= 2:
        try:
            optima = isoflop_optima(flop, n_tokens, loss)
            power = optimal_tokens(optima)
        except PunaError as error:
            made["isoflop_missing"] = error.message
        else:
            made["isoflop"] = {
                "exponent": power.exponent, "scale": power.scale, "n_budgets": len(optima),
                "outside": sum(not one.inside for one in optima),
            }  # fmt: skip
    for budget in budgets:
        n, d = surface.optimum(budget)
        row: dict[str, Any] = {
            "flop": budget, "n_params": n, "n_tokens": d,
            "loss": float(surface.loss(np.array([n]), np.array([d]))[0]),
        }  # fmt: skip
        if power is not None:
            row["isoflop_n_tokens"] = power(budget)
            row["isoflop_n_params"] = budget / 6 / power(budget)
        made["optima"].append(row)
    return made


def _grouped(flop: Values) -> Values:
    """Give budgets that are nearly equal one value: their mean in logarithms."""
    order = np.argsort(flop)
    logs = np.log(flop[order])
    group = np.concatenate([[0], np.cumsum(np.diff(logs) > _SAME_FLOP)])
    means = np.bincount(group, logs) / np.bincount(group)
    made = np.empty_like(flop)
    made[order] = np.exp(means[group])
    return made
