"""The accuracy dossier: every protocol is run anew from the bundled rows, nothing is looked up.

Errors are |predicted / measured - 1|. Rows that a fit has seen are never counted as held out. The
structure of the model was chosen with all bundled rows in view (and the buffers of the memory model
from the memory rows among them), so held-out figures are somewhat optimistic; rows that were never
bundled are the fair test: ``puna plan predict``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.core.units import GIB
from puna.plan.constants import PRIORS
from puna.plan.energy import card_tonnes, model_cards
from puna.plan.fit import Fit, fit_constants, log_predictions
from puna.plan.intervals import calibrate_widths, held_out
from puna.plan.memory import peak_memory
from puna.plan.shipped import Rows, llama3_table, published

if TYPE_CHECKING:  # its import takes as long as all of the planner
    from jaxtyping import Float64

SEEDS = 6
FIT_SHARE = 0.3
LARGE = 1024


@dataclass(frozen=True)
class Line:
    """Errors of one protocol, or of one source in it."""

    name: str
    n: int
    mape: float
    """Mean of the errors."""
    median: float
    p90: float
    bias: float
    """Median of predicted / measured - 1."""
    within_5: float
    within_10: float
    coverage: float | None = None
    """Share of rows inside their 90 % interval."""


@dataclass(frozen=True)
class Dossier:
    """Everything that ``puna plan validate`` prints."""

    n_rows: int
    fit: Fit
    """To all rows."""
    protocols: list[Line]
    in_sample: list[Line]
    """By source."""
    left_out: list[Line]
    """By source, each under the fit to all others."""
    llama3: list[tuple[str, float, float]]
    """Name, measured and predicted seconds of the rows of Table 4."""
    memory: list[tuple[str, float, float]]
    """Name, measured and predicted GiB."""
    cards: list[tuple[str, float, float]]
    """Model, printed and computed tCO2e."""
    at_bounds: list[str]
    residuals: list[tuple[str, float, float]]
    """Source, measured seconds, log(predicted / measured), each with its source left out."""

    def to_json(self) -> dict[str, Any]:
        """Return the dossier as JSON values."""
        return {
            "n_rows": self.n_rows,
            "n_constants": len(PRIORS),
            "constants": self.fit.constants.to_json(),
            "at_bounds": self.at_bounds,
            "protocols": [vars(line) for line in self.protocols],
            "in_sample": [vars(line) for line in self.in_sample],
            "left_out": [vars(line) for line in self.left_out],
            "llama3_table4": self.llama3,
            "memory_gib": self.memory,
            "co2_tonnes": self.cards,
        }


def validate(rows: Rows | None = None) -> Dossier:
    """Run every protocol.

    Args:
        rows: Measured steps; the bundled ones when None.
    """
    rows = rows or published()
    w, step_s, sources = rows.workload, rows.step_s, rows.sources
    fit = fit_constants(w, step_s, sources)
    seen = _residuals(fit, rows, np.ones(len(step_s), dtype=bool))
    left_out = held_out(w, step_s, sources, sources)
    left_in = _covered_when_left_out(rows, left_out)
    tables = llama3_table()
    llama3 = np.exp(log_predictions(tables.workload, fit.constants.to_vector()[None])[0])
    names = [row["name"] for row in tables.rows]
    protocols = [
        _line("all rows in the fit", seen),
        _random_split(rows),
        _line("one source left out", left_out, left_in),
        *_large(rows),
        _line("Llama 3 Table 4, never fitted", np.log(llama3 / tables.step_s)),
    ]
    cards = [(c.model, c.tonnes, card_tonnes(c.gpu_hours, c.watts)) for c in model_cards()]
    return Dossier(
        len(step_s), fit, protocols,
        [_line(s, seen[sources == s]) for s in np.unique(sources)],
        [_line(s, left_out[sources == s], left_in[sources == s]) for s in np.unique(sources)],
        list(zip(names, tables.step_s.tolist(), llama3.tolist(), strict=True)),
        list(_memory(rows)), cards, fit.constants.at_bounds(),
        list(zip(sources.tolist(), step_s.tolist(), left_out.tolist(), strict=True)),
    )  # fmt: skip


def _line(name: str, residual: np.ndarray, inside: np.ndarray | None = None) -> Line:
    error = np.abs(np.expm1(residual))
    return Line(
        str(name), len(error), float(error.mean()), float(np.median(error)),
        float(np.quantile(error, 0.9)), float(np.median(np.expm1(residual))),
        float((error <= 0.05).mean()), float((error <= 0.1).mean()),
        None if inside is None else float(inside.mean()),
    )  # fmt: skip


def _residuals(fit: Fit, rows: Rows, which: np.ndarray) -> Float64[np.ndarray, " n"]:
    logs = fit.constants.to_vector()[None]
    return log_predictions(rows.workload.take(which), logs)[0] - np.log(rows.step_s[which])


def _random_split(rows: Rows) -> Line:
    """Fit and calibrate on 30 % of the rows, test on the others, over six seeds."""
    residuals, inside = [], []
    for seed in range(SEEDS):
        order = np.random.default_rng(seed).permutation(len(rows.step_s))
        chosen = np.zeros(len(order), dtype=bool)
        chosen[order[: int(FIT_SHARE * len(order))]] = True
        residual, covered = _fit_and_test(rows, chosen)
        residuals.append(residual)
        inside.append(covered)
    name = f"fit 30 %, test 70 %, {SEEDS} seeds"
    return _line(name, np.concatenate(residuals), np.concatenate(inside))


def _fit_and_test(rows: Rows, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return residuals of the rows that are not chosen, and whether their intervals hold them."""
    w, groups = rows.workload.take(chosen), rows.groups
    fit = fit_constants(w, rows.step_s[chosen], rows.sources[chosen])
    widths = calibrate_widths(w, rows.step_s[chosen], rows.sources[chosen], groups[chosen])
    residual = _residuals(fit, rows, ~chosen)
    half = np.array([widths.of(group) for group in groups[~chosen]])
    return residual, np.abs(residual) <= half


def _covered_when_left_out(rows: Rows, residual: np.ndarray) -> np.ndarray:
    """Tell whether the interval that the other sources give holds each row."""
    inside = np.zeros(len(residual), dtype=bool)
    for source in np.unique(rows.sources):
        out = rows.sources == source
        widths = calibrate_widths(
            rows.workload.take(~out), rows.step_s[~out], rows.sources[~out], rows.groups[~out]
        )
        half = np.array([widths.of(group) for group in rows.groups[out]])
        inside[out] = np.abs(residual[out]) <= half
    return inside


def _large(rows: Rows) -> Iterable[Line]:
    small = np.asarray(rows.workload.n_gpus < LARGE)
    if small.any() and not small.all():
        residual, covered = _fit_and_test(rows, small)
        yield _line(f"fit under {LARGE:,} GPUs, test from there", residual, covered)


def _memory(rows: Rows) -> Iterable[tuple[str, float, float]]:
    predicted = np.asarray(peak_memory(rows.workload).total) / GIB
    for row, n in zip(rows.rows, predicted.tolist(), strict=True):
        if row.get("mem_GiB"):
            yield row["name"], float(row["mem_GiB"]), n
