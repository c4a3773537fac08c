"""Numbers of a training that cannot be right: NaN, infinity, and spikes.

A spike is a value far above the last ones by their own scatter: the distance from their median is
compared with the median of such distances (MAD), which outliers do not move (Hampel 1974). Only
upwards: a loss that falls fast is no fault. PaLM (Chowdhery et al. 2022, section 5.1) met about 20
spikes of the loss in a run, at irregular times, and went round them by starting 100 steps earlier
and leaving out 200 to 500 batches; the same batches did no harm from another state.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from puna.resilience.robust import robust_sigma

AnomalyKind = Literal["not_finite", "loss_spike", "grad_spike"]
_LEAST_VALUES = 16


@dataclass(frozen=True)
class Anomaly:
    """A number that cannot be right.

    Attributes:
        kind: What is wrong with it.
        value: The number.
        limit: What it should not be above; NaN where it is none.
    """

    kind: AnomalyKind
    value: float
    limit: float = math.nan


class SpikeDetector:
    """Knows the last values of a series, and which next one is out of it.

    Args:
        window: Values that are remembered.
        sigmas: Distance from their median in robust standard deviations.
        factor: And at least so many times the median.
    """

    def __init__(self, window: int, sigmas: float, factor: float) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._sigmas, self._factor = sigmas, factor

    @property
    def limit(self) -> float:
        """Above it a value is a spike; infinite while too few are known."""
        if len(self._values) < min(_LEAST_VALUES, self._values.maxlen or _LEAST_VALUES):
            return math.inf
        middle = statistics.median(self._values)
        return max(
            middle + self._sigmas * robust_sigma(self._values, middle),
            middle + (self._factor - 1.0) * abs(middle),
        )

    def add(self, value: float) -> None:
        """Remember a value."""
        self._values.append(value)


class NumberCheck:
    """Judges the loss and the gradient's norm of each step.

    Args:
        window: Steps that are remembered.
        sigmas: See :class:`SpikeDetector`.
        loss_factor: A spike of the loss is at least so many times the median.
        grad_factor: A spike of the norm as well.
    """

    def __init__(self, window: int, sigmas: float, loss_factor: float, grad_factor: float) -> None:
        self._loss = SpikeDetector(window, sigmas, loss_factor)
        self._norm = SpikeDetector(window, sigmas, grad_factor)

    def find(self, loss: float, grad_norm: float) -> Anomaly | None:
        """Return what is wrong with the numbers of a step; None when nothing is."""
        for value in (loss, grad_norm):
            if not math.isfinite(value):
                return Anomaly("not_finite", value)
        if loss > self._loss.limit:
            return Anomaly("loss_spike", loss, self._loss.limit)
        if grad_norm > self._norm.limit:
            return Anomaly("grad_spike", grad_norm, self._norm.limit)
        return None

    def add(self, values: Iterable[tuple[float, float]]) -> None:
        """Remember loss and norm of steps, spikes included: a level that stays is none."""
        for loss, grad_norm in values:
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self._loss.add(loss)
                self._norm.add(grad_norm)
