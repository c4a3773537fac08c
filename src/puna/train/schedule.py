"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from puna.train.schedule_config import CosineConfig, LinearConfig, ScheduleConfig, steps_of


def lr_factor(schedule: ScheduleConfig, step: int, n_steps: int) -> float:
    """Return the learning rate of a step as a share of the peak.

    Warm-up rises linearly and reaches the peak in its last step, so that no step has rate zero.

    Args:
        schedule: Kind and lengths.
        step: Step (0-based).
        n_steps: Steps of the whole run.

    Returns:
        A factor from 0 to 1.
    """
    n_warmup = min(n_steps, steps_of(schedule.warmup, n_steps))
    if step < n_warmup:
        return schedule.warmup_from + (1.0 - schedule.warmup_from) * (step + 1) / n_warmup
    if isinstance(schedule, CosineConfig):
        left = _cosine(_progress(step - n_warmup, n_steps - n_warmup))
    elif isinstance(schedule, LinearConfig):
        left = _linear(_progress(step - n_warmup, n_steps - n_warmup))
    else:
        n_decay = min(steps_of(schedule.decay, n_steps), n_steps - n_warmup)
        done = max(0.0, (step + 1 - (n_steps - n_decay)) / n_decay) if n_decay else 0.0
        left = _SHAPES[schedule.shape](done)
    return schedule.floor + (1.0 - schedule.floor) * left


def _progress(step: int, n_steps: int) -> float:
    """0 at the first of ``n_steps`` steps, 1 at the last."""
    return min(1.0, step / max(1, n_steps - 1))


def _linear(done: float) -> float:
    return 1.0 - done


def _sqrt(done: float) -> float:
    return 1.0 - math.sqrt(done)


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


_SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": _linear, "sqrt": _sqrt, "cosine": _cosine,
}  # fmt: skip
"""What is left of the learning rate when a share of the decay is done."""
