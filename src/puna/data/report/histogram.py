"""Histograms of signals: edges that suit the values, and counts that add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

N_BINS = 36
_LOG_SPREAD = 25.0
_TINY, _FINE = 1e-3, 1e4
_FAR = 3.0


def edges_of(values: np.ndarray, marks: Sequence[float] = ()) -> tuple[str, np.ndarray]:
    """Choose the scale and the edges of the bins.

    Args:
        values: Finite numbers.
        marks: Thresholds, which must be inside.

    Returns:
        ``whole`` (one bin per whole number), ``log`` (a first bin from zero on, when values are
        zero or far below the lowest threshold) or ``linear`` (the last bin holds what lies far
        out), and the ascending edges.
    """
    both = np.concatenate([values, np.asarray(marks, np.float64)])
    low, high = float(both.min()), float(both.max())
    if np.all(both == np.floor(both)) and high - low < N_BINS:
        return "whole", np.arange(low, high + 2) - 0.5
    if low >= 0 and high > 0 and _is_wide(both, marks):
        positive = both[both > 0]
        first = max(float(positive.min()), min([one for one in marks if one > 0] + [high]) / _FINE)
        edges = np.geomspace(first, high, N_BINS + 1 - (low < first))
        edges[0], edges[-1] = first, high
        return "log", np.concatenate([[0.0], edges]) if low < first else edges
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    most = max(float(np.quantile(values, 0.995)), *marks, low)
    most = most * 1.1 if most > 0 else most
    if high - low > _FAR * (most - low) > 0:
        return "linear", np.append(np.linspace(low, most, N_BINS), high)
    if high == low:
        air = max(abs(low), 1.0) / 2
        return "linear", np.array([low - air, low + air])
    return "linear", np.linspace(low, high, N_BINS + 1)


def _is_wide(values: np.ndarray, marks: Sequence[float]) -> bool:
    """Tell whether a linear scale would press most values, or a threshold, against its low end."""
    high = float(values.max())
    tiny = any(0 < mark < _TINY * high for mark in marks)
    return tiny or (high > 2 and high > _LOG_SPREAD * float(np.median(values[values > 0])))


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
    edges = np.unique(edges)  # numbers may be too close to each other for so many bins
    counts = {name: np.histogram(part, edges)[0].tolist() for name, part in finite.items()}
    return {"scale": scale, "edges": edges.tolist(), "counts": counts}
