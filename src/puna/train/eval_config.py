"""When a training measures held-out text; imports no torch."""

from __future__ import annotations

from pydantic import Field

from puna.core.config import Config


class EvalConfig(Config):
    """Bits per byte of held-out documents while training goes on; it does not change the result."""

    every: int = Field(default=100, ge=1)
    """Steps between two measurements; one more is made at the end."""
    max_tokens_per_source: int = Field(default=20_000, ge=2)
    """Documents of a source are taken in an order given by a hash, whole, as long as they fit into
    this many tokens."""
    overlap: float = Field(default=0.25, ge=0, lt=1)
    """Long documents: share of a window that repeats earlier tokens as context, unscored."""
    seed: int = Field(default=0, ge=0)
    """Chooses the documents."""
