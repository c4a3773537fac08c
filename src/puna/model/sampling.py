"""How the next token is chosen; imports no torch, so that recipes can hold it."""

from __future__ import annotations

from pydantic import Field

from puna.core.config import Config, Seed


class Sampling(Config):
    """How the engine chooses tokens and when it ends.

    In this order, which is that of transformers: penalties, temperature, top_k, top_p, min_p.
    """

    temperature: float = Field(default=0.8, ge=0)
    """Divides the logits; 0 always takes the most likely token."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Draw from the most likely tokens that together reach this probability; 1 keeps all."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many most likely tokens; 0 keeps all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw from tokens at least this probable, as a share of the likeliest one; 0 keeps all."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Divides positive logits, multiplies negative ones, of ids seen in prompt or text (Keskar et
    al. 2019); 1 changes nothing."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logits of ids generated already; 0 changes nothing."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from an id's logit once for every time it was generated; 0 changes nothing."""
    seed: Seed = Field(default=0, ge=0, lt=2**63)
    """Equal seeds give equal texts."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens to generate."""
