"""Checks for silent data corruption; imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from puna.core.config import Config


class SdcConfig(Config):
    """What is checked for silent data corruption: flipped bits, processors that compute wrongly."""

    state: bool = False
    """Digest parameters and optimiser state after each update and compare them among replicas
    (`parallel.replicate`): any flipped bit shows in the same step."""
    at_rest: Literal["auto", "always", "never"] = "auto"
    """Digest them again before the next update, which finds what changed meanwhile. `auto`: where a
    rank has no replica. `always`: also with replicas, and their summed gradients are compared: what
    is found is mended before it is used, so that the result keeps every bit. Doubles the cost."""
    replay_every: int = Field(default=0, ge=0)
    """Of so many micro-batches of a rank another rank computes one again; finds wrong gradients. It
    costs that share of a step's time. 0 does not."""
    products: bool = False
    """Check the sums of one linear layer's product per step, each layer in turn (ABFT)."""

    @property
    def is_on(self) -> bool:
        """Whether anything is checked."""
        return self.state or self.replay_every > 0 or self.products
