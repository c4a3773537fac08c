"""A training of the user's own, as a row of a hardware file."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from puna.core.config import Config


class OwnRun(Config):
    """What one finished training took."""

    name: str
    """Folder of the run."""
    step_s: float = Field(gt=0)
    """Median seconds of a step, without the first ones."""
    scatter: float = Field(default=0.0, ge=0)
    """Standard deviation of the logarithm over its steps (from quantiles)."""
    n_steps: int = Field(default=1, ge=1)
    """Steps that count."""
    job: dict[str, Any]
    """The fields of :class:`puna.plan.job.Job` without GPU and fabric."""
