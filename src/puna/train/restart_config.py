"""When a training is started again, with how many ranks, and on which machines.

Imports no torch.
"""

from __future__ import annotations

from pydantic import Field

from puna.core.config import Config


class QuarantineConfig(Config):
    """Which nodes are not trusted, and how they come back; it does not change the result.

    A node is a machine, or on one machine the place (GPU) of a rank.
    """

    strikes: int = Field(default=2, ge=1)
    """So many faults within the window put a node into quarantine. Wrong answers where the right
    ones are known do so at once."""
    window_h: float = Field(default=24.0, gt=0)
    """Hours after which a fault is forgotten."""
    burn_in_s: float = Field(default=60.0, ge=0)
    """Seconds that a node in quarantine is tested with known answers; as often more as it was in
    quarantine before. A node that passes comes back as a spare, one that fails stays out."""
    folder: str = ""
    """Folder of the file `quarantine.json`, for several runs to share what they know of nodes;
    empty for the run's own."""


class RestartConfig(Config):
    """When a run counts as hung, and how often it is started again."""

    max_restarts: int = Field(default=10, ge=0)
    """Restarts in a row without one new step."""
    hang_timeout_s: float = Field(default=60.0, gt=0)
    """Longest silence of a rank inside a step; ten times the longest step so far when that is more,
    so that a slow machine is not taken for a hung one. Holds while few steps are known, and while a
    rank waits for its batch; after that `hang_floor_s` does, if it gives less."""
    hang_floor_s: float = Field(default=2.0, gt=0)
    """Longest silence of a rank inside a step once the job has shown how long its steps take; ten
    times the longest of the last 64 steps when that is more. Four times as much after each hang, so
    that a false alarm is not raised twice."""
    standby: bool = True
    """Have processes with all imports done wait for a restart, on one node. Each takes the memory
    of an idle process, about 0.5 GB."""
    standby_after_s: float = Field(default=60.0, ge=0)
    """Seconds after which they are started: a short run does not pay for them."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Longest silence of a rank while it starts (to the end of its first step) or saves."""
    min_nproc: int | None = Field(default=None, ge=1)
    """Fewest ranks to go on with when nodes are lost or in quarantine: data-parallel ranks are left
    out, the batch and the order of the data stay. None keeps the number of ranks fixed."""
    grow: bool = True
    """Start again with more ranks, right after a checkpoint, once lost nodes are back; false waits
    for the next restart."""
    quarantine: QuarantineConfig = Field(default_factory=QuarantineConfig)
    """Nodes that are not trusted."""
