"""The configuration of what changes over a run: learning rate and batch; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from puna.core.config import Config


def steps_of(value: float, n_steps: int) -> int:
    """Turn a share of all steps (below 1) or a number of steps (from 1 on) into a number."""
    return round(value * n_steps) if value < 1 else round(value)


class _WarmupConfig(Config):
    """The beginning of every schedule."""

    warmup: float = Field(default=0.02, ge=0)
    """Warm-up: below 1 a share of all steps, from 1 on a number of steps."""
    warmup_from: float = Field(default=0.0, ge=0, le=1)
    """Learning rate before the first step, as a share of the peak: to go on from a checkpoint, that
    at which its training ended, from where the rate is warmed up again."""


class CosineConfig(_WarmupConfig):
    """Linear warm-up, then half a cosine down to a floor (Llama 1 to 3)."""

    kind: Literal["cosine"] = "cosine"
    """Tag of the union."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""


class LinearConfig(_WarmupConfig):
    """Linear warm-up, then linearly down, to zero by default.

    Llama 3 annealed like this over its last 40 million tokens: with a checkpoint in `init`, no
    warm-up, and the checkpoint's last learning rate as the peak.
    """

    kind: Literal["linear"] = "linear"
    """Tag of the union."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""


class WsdConfig(_WarmupConfig):
    """Warm-up, stable, decay: constant for most of the run, then down (Hu et al., 2024)."""

    kind: Literal["wsd"] = "wsd"
    """Tag of the union."""
    decay: float = Field(default=0.2, ge=0)
    """Decay at the end: below 1 a share of all steps, from 1 on a number of steps."""
    shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """Of the decay, x being the part of it that is done: `linear` 1 - x; `sqrt` 1 - sqrt(x), which
    was best in Haegele et al. (2024); `cosine` (1 + cos(pi x)) / 2."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""


ScheduleConfig = Annotated[CosineConfig | LinearConfig | WsdConfig, Field(discriminator="kind")]


class RampConfig(Config):
    """A smaller batch at the beginning of the run, where gradients agree with each other."""

    until_tokens: int = Field(ge=1)
    """Tokens of the run after which this batch ends, rounded up to a whole step."""
    global_batch: int = Field(ge=1)
    """Rows per optimiser step until then, over all ranks; each has the `seq_len` of the run."""
    seq_len: int | None = Field(default=None, ge=2)
    """Cut each row into shorter ones of so many tokens, as if they were all there is: cheaper
    attention. It divides the `seq_len` of the run, which is meant when this is absent."""
