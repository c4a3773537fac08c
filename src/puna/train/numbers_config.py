"""What follows a loss or a gradient that cannot be right; imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from puna.core.config import Config

NumberAction = Literal["replay", "skip", "roll_back", "report", "stop"]


class NumbersConfig(Config):
    """What is done about numbers that cannot be right.

    Each list is tried in order; where nothing of it helps, the run stops.

    `replay` computes the step again, which cures a fault of the hardware and leaves no trace.
    `skip` leaves the step's update out. `roll_back` loads the newest checkpoint before the step
    and leaves out the updates of `skip_steps` steps from it on. `report` goes on; `stop` ends the
    run with a message.
    """

    not_finite: list[NumberAction] = Field(default=["replay", "skip", "roll_back", "stop"])
    """The loss or the gradient's norm is NaN or infinite."""
    loss_spike: list[NumberAction] = Field(default=["replay", "report"])
    """The loss is `sigmas` robust standard deviations above the median of the last `window` steps,
    and at least `loss_factor` times it."""
    grad_spike: list[NumberAction] = Field(default=["replay", "report"])
    """The norm of the gradient before clipping, likewise with `grad_factor`."""
    window: int = Field(default=64, ge=4)
    """Steps that a step is compared with; nothing is said before 16 are known (or `window`)."""
    sigmas: float = Field(default=10.0, gt=0)
    """Robust standard deviations (1.4826 MAD)."""
    loss_factor: float = Field(default=1.2, gt=1)
    """Least ratio of a spike to the median of the loss."""
    grad_factor: float = Field(default=5.0, gt=1)
    """Least ratio of a spike to the median of the gradient's norm."""
    max_skips: int = Field(default=3, ge=0)
    """Updates in a row that may be skipped; then the next action is tried."""
    max_roll_backs: int = Field(default=3, ge=0)
    """Times that a run is rolled back; each time to a checkpoint before the one before."""
    skip_steps: int = Field(default=1, ge=1)
    """Steps whose updates are left out after `roll_back`. PaLM left out 200 to 500."""

    @model_validator(mode="after")
    def _numbers_must_end(self) -> Self:
        if "report" in self.not_finite:
            raise ValueError(
                "numbers.not_finite cannot contain `report`: such an update ruins the model; "
                "use replay, skip, roll_back or stop"
            )
        return self
