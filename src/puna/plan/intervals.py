"""How sure a prediction is: half-widths of 90 % intervals from rows that a fit had not seen.

Split conformal prediction (Vovk et al. 2005; Lei et al. 2018) on log(predicted / measured): the
half-width is the quantile of held-out residuals. Held out is in two ways, and both are pooled: one
row in five at random (a cluster like those of the data), and all rows of a source (a new cluster).
Rows are grouped by software and GPU family; a combination that the data do not have gets the width
of groups that were left out as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from puna.plan.fit import fit_constants, log_predictions
from puna.plan.workload import Workload

if TYPE_CHECKING:  # its import takes as long as all of the planner
    from jaxtyping import Float64

LEVEL = 0.9
FEWEST = 15
"""Rows that a group needs for a width of its own."""
_FOLDS = 5
_SOFTWARE = ("eager", "classic", "tuned")
_FAMILIES = {"is_a100": "ampere", "is_blackwell": "blackwell", "is_other": "other"}


@dataclass(frozen=True)
class Widths:
    """Half-widths of the 90 % interval of log(step time)."""

    groups: Mapping[str, float]
    """By ``software/family``."""
    few: float
    """Of groups with too few rows for a width of their own."""
    unseen: float
    """Of groups without rows."""
    known: Sequence[str]
    """Groups that have rows."""

    def of(self, group: str) -> float:
        """Return the half-width of a group."""
        if group in self.groups:
            return self.groups[group]
        return self.few if group in self.known else self.unseen

    def to_json(self) -> dict[str, object]:
        """Return the widths as JSON values."""
        return {
            "groups": dict(self.groups), "few": self.few, "unseen": self.unseen,
            "known": list(self.known),
        }  # fmt: skip


def group_of(w: Workload) -> str:
    """Return ``software/family`` of one job (fields are floats)."""
    software = next((name for name in _SOFTWARE if getattr(w, name)), "plain")
    family = next((name for flag, name in _FAMILIES.items() if getattr(w, flag)), "hopper")
    return f"{software}/{family}"


def calibrate_widths(
    w: Workload, step_s: Float64[np.ndarray, " n"], sources: np.ndarray, groups: np.ndarray,
    seed: int = 0,
) -> Widths:  # fmt: skip
    """Measure the half-widths on rows that fits did not see.

    Args:
        w: The rows, arrays of shape (n,).
        step_s: Measured seconds.
        sources: Source of each row.
        groups: Group of each row, :func:`group_of`.
        seed: Of the random folds.
    """
    folds = np.random.default_rng(seed).permutation(len(step_s)) % _FOLDS
    at_random = np.abs(held_out(w, step_s, sources, folds))
    by_source = np.abs(held_out(w, step_s, sources, sources))
    by_group = np.abs(held_out(w, step_s, sources, groups))
    names, counts = np.unique(groups, return_counts=True)
    own = {str(name) for name, n in zip(names, counts, strict=True) if n >= FEWEST}
    pooled = np.concatenate([at_random, by_source])
    twice = np.concatenate([groups, groups])
    rest = ~np.isin(twice, sorted(own))
    widths = {name: _quantile(pooled[twice == name]) for name in sorted(own)}
    few = _quantile(pooled[rest]) if rest.any() else _quantile(pooled)
    return Widths(widths, few, _quantile(by_group), [str(name) for name in names])


def held_out(
    w: Workload, step_s: np.ndarray, sources: np.ndarray, parts: np.ndarray
) -> Float64[np.ndarray, " n"]:
    """Return log(predicted / measured) of each row under the fit to all other parts."""
    target = np.log(step_s)
    residual = np.zeros(len(target))
    for part in np.unique(parts):
        out = parts == part
        if out.all():
            raise ValueError("one part holds all rows: nothing is left to fit")
        fit = fit_constants(w.take(~out), step_s[~out], sources[~out])
        logs = fit.constants.to_vector()[None]
        residual[out] = log_predictions(w.take(out), logs)[0] - target[out]
    return residual


def _quantile(residuals: np.ndarray) -> float:
    """Return the conformal quantile: of n values the ceil(0.9 (n + 1))-th, rounded up."""
    n = len(residuals)
    rank = min(math.ceil(LEVEL * (n + 1)), n)
    return round(float(np.sort(residuals)[rank - 1]), 4)
