"""When the state of a training is saved, and where; imports no torch."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from puna.core.config import Config
from puna.train.store_options import StoreOptions


class CheckpointConfig(Config):
    """When checkpoints are saved and how many are kept."""

    every: int = Field(default=100, ge=1)
    """Steps between two checkpoints; one more is always saved at the end."""
    keep: int = Field(default=2, ge=1)
    """The newest that are kept on disk; 2 or more let a damaged one fall back to the one before."""
    memory_every: int = Field(default=10, ge=0)
    """Steps between two snapshots in shared memory, which serve when processes die and the machine
    lives on: each costs a copy, and two need twice the memory of parameters and optimiser. 0 takes
    none."""
    replicate: bool = False
    """Keep a copy of each snapshot in the memory of another node (of another rank, on a single
    node), for a node that is lost; it needs the memory of two snapshots more."""
    in_background: bool = True
    """Write checkpoints from a snapshot while training goes on; False, or without snapshots: stop
    training meanwhile."""
    on_failure: Literal["continue", "stop"] = "continue"
    """When one cannot be saved (on a full disk: after the oldest went, never the last): record
    `train.checkpoint_failed`, go on and try again at the next one; or stop with a message, so that
    the run goes on from the last good one after the fix. The one at the end must be saved in either
    case. A half-written checkpoint never stays."""
    store: str = ""
    """Store that checkpoints are uploaded to after they are committed on disk, in the background:
    `s3://bucket/folder`, `file:///mnt/shared/folder`, anything that fsspec opens; one URL per run.
    A training whose disk has no checkpoint goes on from there. Empty means none."""
    store_keep: int = Field(default=2, ge=1)
    """The newest that are kept in the store."""
    store_options: StoreOptions = Field(default_factory=dict)
    """Options for the store (fsspec), such as `endpoint_url`; never secrets, which belong into the
    environment or the store's own files."""

    @field_validator("store")
    @classmethod
    def _is_url(cls, url: str) -> str:
        if url and not re.fullmatch(r"[a-z][a-z0-9+.-]*://.+", url):
            raise ValueError(f"{url!r} is no URL; write file:///folder or s3://bucket/folder")
        return url

    @model_validator(mode="after")
    def _replicates_something(self) -> Self:
        if self.replicate and not self.memory_every:
            raise ValueError("replicate = true needs snapshots; set memory_every to 1 or more")
        return self
