"""How the next token is chosen; imports no torch, so that recipes can hold it."""

from __future__ import annotations

from pydantic import Field

from puna.core.config import Config, Seed


class Sampling(Config):
    """How :func:`puna.model.generate.generate` chooses tokens and when it ends."""

    temperature: float = Field(default=0.8, ge=0)
    """Divides the logits; 0 always takes the most likely token."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Draw from the most likely tokens that together reach this probability; 1 keeps all."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many most likely tokens; 0 keeps all."""
    seed: Seed = Field(default=0, ge=0, lt=2**63)
    """Equal seeds give equal texts."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens to generate."""
