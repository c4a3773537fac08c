"""What the release ships: bundled public rows, the constants fitted to them, and their widths."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from puna.core.fsio import write_text
from puna.plan.constants import NAMES, Constants
from puna.plan.fit import Fit, fit_constants
from puna.plan.intervals import Widths, calibrate_widths, group_of
from puna.plan.rows import read_rows, workloads
from puna.plan.workload import Workload, stack

if TYPE_CHECKING:  # its import takes as long as all of the planner
    from jaxtyping import Float64

FACTS = resources.files("puna.plan").joinpath("facts")


@dataclass(frozen=True)
class Rows:
    """Measured steps."""

    columns: list[str]
    rows: list[dict[str, str]]
    workload: Workload
    """Arrays of shape (n,)."""
    step_s: Float64[np.ndarray, " n"]
    sources: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """Fitted constants with their uncertainty."""

    constants: Constants
    covariance: Float64[np.ndarray, "n_constants n_constants"]
    widths: Widths
    n_rows: int


def measured(path: Path) -> Rows:
    """Read measured steps; they need the columns ``src`` and ``step_s``.

    Raises:
        PunaError: A row cannot be read.
    """
    columns, rows = read_rows(path)
    jobs = workloads(rows)
    return Rows(
        columns, rows, stack(jobs),
        np.array([float(row["step_s"]) for row in rows]),
        np.array([row["src"] for row in rows]),
        np.array([group_of(job) for job in jobs]),
    )  # fmt: skip


@cache
def published() -> Rows:
    """Return the bundled public rows."""
    with resources.as_file(FACTS.joinpath("published_steps.csv")) as path:
        return measured(path)


@cache
def llama3_table() -> Rows:
    """Return the rows of Table 4 of the Llama 3 paper; nothing is ever fitted to them."""
    with resources.as_file(FACTS.joinpath("llama3_table4.csv")) as path:
        return measured(path)


@cache
def calibration() -> Calibration:
    """Return the constants of the release."""
    return read_calibration(FACTS.joinpath("constants.json").read_text(encoding="utf-8"))


def read_calibration(text: str) -> Calibration:
    """Return the constants of a file that :func:`write_calibration` wrote.

    Args:
        text: Its content.
    """
    values = json.loads(text)
    return Calibration(
        Constants(**values["constants"]),
        np.array(values["covariance"]),
        Widths(**values["widths"]),
        values["n_rows"],
    )


def refit(rows: Rows) -> tuple[Fit, Widths]:
    """Fit constants and widths to measured rows.

    Args:
        rows: Public ones, the user's own, or both.
    """
    fit = fit_constants(rows.workload, rows.step_s, rows.sources)
    widths = calibrate_widths(rows.workload, rows.step_s, rows.sources, rows.groups)
    return fit, widths


def write_calibration(path: Path, fit: Fit, widths: Widths) -> None:
    """Write constants, covariance and widths as JSON.

    Args:
        path: The file.
        fit: What :func:`refit` returned.
        widths: The same.
    """
    values = {
        "n_rows": fit.n_rows,
        "constants": {name: float(f"{getattr(fit.constants, name):.6g}") for name in NAMES},
        "widths": widths.to_json(),
        "covariance": [[float(f"{x:.4g}") for x in line] for line in fit.covariance],
    }
    write_text(path, json.dumps(values, indent=1).replace(",\n   ", ", ") + "\n")


def join(a: Rows, b: Rows) -> Rows:
    """Return the rows of both.

    Args:
        a: Measured steps; its columns are kept.
        b: More of them.
    """
    both = Workload(
        **{
            f.name: np.concatenate([getattr(a.workload, f.name), getattr(b.workload, f.name)])
            for f in fields(Workload)
        }
    )
    return Rows(
        a.columns, [*a.rows, *b.rows], both, np.concatenate([a.step_s, b.step_s]),
        np.concatenate([a.sources, b.sources]), np.concatenate([a.groups, b.groups]),
    )  # fmt: skip
