"""Predicts a file of rows without looking at what was measured: for blind validation.

The columns ``value``, ``step_s`` and ``mem_GiB`` are copied, never read: removed or garbled, the
predictions are the same bytes.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np

from puna.core.errors import PunaError
from puna.core.fsio import write_text
from puna.core.units import GIB
from puna.plan.flops import tflops_per_gpu
from puna.plan.intervals import group_of
from puna.plan.memory import peak_memory
from puna.plan.rows import read_rows, workloads
from puna.plan.shipped import Calibration, calibration
from puna.plan.step import step_time
from puna.plan.workload import stack

COLUMNS = (
    "predicted_step_s", "predicted_step_s_lo", "predicted_step_s_hi", "predicted_mem_GiB",
    "predicted_tflops_gpu",
)  # fmt: skip


def predict_file(path: Path, out: Path, known: Calibration | None = None) -> int:
    """Copy a CSV file of jobs and add predictions.

    Args:
        path: Columns as in the bundled ``published_steps.csv``; others are copied.
        out: The copy, with ``COLUMNS`` at its end: seconds of a step and their 90 % interval, GiB,
            and TFLOPS per GPU in the convention of :mod:`puna.plan.flops`.
        known: Fitted constants; those of the release when None.

    Returns:
        Number of rows.

    Raises:
        PunaError: A column is missing, or a row cannot be priced; it is named by its line.
    """
    known = known or calibration()
    columns, rows = read_rows(path)
    clash = [name for name in COLUMNS if name in columns]
    if clash:
        raise PunaError(f"{path} has a column {clash[0]} already", "remove it, or rename it")
    try:
        jobs = workloads(rows)
    except PunaError as error:
        raise PunaError(f"{path}, {error.message}", error.fix) from error
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *COLUMNS], lineterminator="\n")
    writer.writeheader()
    if rows:
        w = stack(jobs)
        seconds = np.asarray(step_time(w, known.constants).total)
        memory = np.asarray(peak_memory(w).total) / GIB
        tflops = np.asarray(tflops_per_gpu(w, seconds))
        halves = [known.widths.of(group_of(job)) for job in jobs]
        for row, s, half, n, speed in zip(rows, seconds, halves, memory, tflops, strict=True):
            new = (s, s * math.exp(-half), s * math.exp(half), n, speed)
            writer.writerow({**row, **{k: f"{v:.6g}" for k, v in zip(COLUMNS, new, strict=True)}})
    write_text(out, text.getvalue())
    return len(rows)
