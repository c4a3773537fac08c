"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math

from puna.train.config import CosineConfig, ScheduleConfig


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
    n_warmup = _length(schedule.warmup, n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    if isinstance(schedule, CosineConfig):
        progress = _progress(step - n_warmup, n_steps - n_warmup)
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        n_decay = min(_length(schedule.decay, n_steps), n_steps - n_warmup)
        shape = 1.0 - max(0.0, (step + 1 - (n_steps - n_decay)) / n_decay) if n_decay else 1.0
    return schedule.floor + (1.0 - schedule.floor) * shape


def _length(value: float, n_steps: int) -> int:
    """Turn a share (below 1) or a number of steps into a number of steps within the run."""
    return min(n_steps, round(value * n_steps) if value < 1 else round(value))


def _progress(step: int, n_steps: int) -> float:
    """0 at the first of ``n_steps`` steps, 1 at the last."""
    return min(1.0, step / max(1, n_steps - 1))
