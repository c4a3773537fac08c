"""Histograms of signals: edges that suit the values, and counts that add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

N_BINS = 36
_LOG_SPREAD = 25.0
_FAR = 3.0


def edges_of(values: np.ndarray, marks: Sequence[float] = ()) -> tuple[str, np.ndarray]:
    """Choose the scale and the edges of the bins.

    Args:
        values: Finite numbers.
        marks: Thresholds, which must be inside.

    Returns:
        ``whole`` (one bin per whole number), ``log`` (a first bin from zero on, when there are
        zeros) or ``linear`` (the last bin holds what lies far out), and the ascending edges.
    """
    both = np.concatenate([values, np.asarray(marks, np.float64)])
    low, high = float(both.min()), float(both.max())
    if np.all(both == np.floor(both)) and high - low < N_BINS:
        return "whole", np.arange(low, high + 2) - 0.5
    positive = both[both > 0]
    if low >= 0 and high > _LOG_SPREAD * float(np.median(positive)) and high > 2:
        first, last = float(positive.min()), high
        if first > 0 and last / first < 1e9:
            edges = np.geomspace(first, last, N_BINS + 1 - (low == 0))
            edges[0], edges[-1] = first, last
            return "log", np.concatenate([[0.0], edges]) if low == 0 else edges
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    most = max(float(np.quantile(values, 0.995)), *marks, low)
    most = most * 1.1 if most > 0 else most
    if high - low > _FAR * (most - low) > 0:
        return "linear", np.append(np.linspace(low, most, N_BINS), high)
    if high == low:
        return "linear", np.array([low - 0.5, low + 0.5])
    return "linear", np.linspace(low, high, N_BINS + 1)


def histogram(groups: dict[str, np.ndarray], marks: Sequence[float] = ()) -> dict[str, Any] | None:
    """Count values of several groups in the same bins.

    Args:
        groups: Name -> values; those that are not finite are left out.
        marks: Thresholds.

    Returns:
        ``scale``, ``edges`` and ``counts`` (group -> one number per bin; a value on an edge is in
        the bin above, the last bin has both its edges); None without a value.
    """
    finite = {name: part[np.isfinite(part)] for name, part in groups.items()}
    values = np.concatenate([*finite.values(), np.zeros(0)])
    if not len(values):
        return None
    scale, edges = edges_of(values, [mark for mark in marks if np.isfinite(mark)])
    counts = {name: np.histogram(part, edges)[0].tolist() for name, part in finite.items()}
    return {"scale": scale, "edges": edges.tolist(), "counts": counts}
