"""The configuration of what changes over a run: learning rate and batch; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from puna.core.config import Config
from puna.tokens.ramp import Ramp, Stair


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


def plan_ramp(ramp: Sequence[RampConfig], global_batch: int, seq_len: int) -> Ramp:
    """Turn a batch ramp into steps.

    Args:
        ramp: In the order of time.
        global_batch: Rows of a step after it.
        seq_len: Tokens of a row.

    Raises:
        ValueError: An end is not after the one before it, or rows cannot be cut into equal ones.
    """
    stairs, n_tokens, end = list[Stair](), 0, 0
    for number, one in enumerate(ramp, 1):
        if one.until_tokens <= n_tokens:
            raise ValueError(
                f"batch_ramp {number}: until_tokens={one.until_tokens} is not after the "
                f"{n_tokens} tokens of the steps before it"
            )
        short = one.seq_len or seq_len
        if seq_len % short:
            raise ValueError(
                f"batch_ramp {number}: seq_len={short} does not divide the seq_len={seq_len} of "
                "the run"
            )
        n_steps = math.ceil((one.until_tokens - n_tokens) / (one.global_batch * seq_len))
        n_tokens, end = n_tokens + n_steps * one.global_batch * seq_len, end + n_steps
        stairs.append(Stair(end, one.global_batch, seq_len // short))
    return Ramp(global_batch, tuple(stairs))
