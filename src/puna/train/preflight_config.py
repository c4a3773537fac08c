"""What is tested before a training begins; imports no torch."""

from __future__ import annotations

from pydantic import Field

from puna.core.config import Config


class PreflightConfig(Config):
    """What every rank tests at each start, before it loads the state; it changes no result.

    Known answers of the processor, patterns in memory, a file in the folder of the checkpoints,
    room for a checkpoint, versions and configuration of all ranks, and an exchange between them.
    """

    enabled: bool = True
    """False leaves it out."""
    seconds: float = Field(default=0.0, ge=0)
    """Repeat the known answers for so long (burn-in); 0 computes each once."""
    disk_mib: int = Field(default=4, ge=0)
    """Size of the file that one rank of each node writes and reads; 0 writes none."""
    exchange_mib: int = Field(default=1, ge=1)
    """What each rank sends to the next one, to measure the way between them."""
