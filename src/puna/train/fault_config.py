"""A fault on purpose; imports no torch."""

from __future__ import annotations

from pydantic import Field

from puna.core.config import Config
from puna.resilience.faults import FaultKind


class FaultConfig(Config):
    """A fault on purpose, to see the recovery work; it does not change the result."""

    enabled: bool = True
    """False turns it off."""
    rank: int = Field(default=0, ge=0)
    """Rank that is hit."""
    step: int = Field(ge=0)
    """Step (from 0) in the middle of which it is hit."""
    what: FaultKind = "kill"
    """`kill` (SIGKILL), `hang` (SIGSTOP), `loop` (computes for ever), `wait` (sleeps for ever),
    `slow` (from then on each step computes longer, by twice what its steps took), `cut` (its
    connections end), `memory` (it asks for more than there is), `full-disk` (for four steps it can
    write no file of over 64 KiB), `nan` (a gradient that is no number), `spike` (gradients a
    million times too large), `flip-...` (one bit is wrong: at rest before the step, in what a layer
    gives, or in the summed gradients) or `stuck` (what a layer gives is wrong from then on)."""
