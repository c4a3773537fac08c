"""The configuration of optimisers and of averages of the weights; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from puna.core.config import Config


class _AdamConfig(Config):
    """What both optimisers take for the parameters that AdamW trains."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: decay of the running mean of the gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: decay of the running mean of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the denominator."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices only, times the learning rate; norms are not decayed."""
    decay_embedding: bool = True
    """Decay the embedding, too. A tied embedding is the output head as well."""


class AdamWConfig(_AdamConfig):
    """AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    kind: Literal["adamw"] = "adamw"
    """Tag of the union."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""


class MuonConfig(_AdamConfig):
    """Muon for the matrices of the layers (Jordan et al., 2024), AdamW for all else.

    Muon steps along the momentum with all its singular values set to about one. Embedding, head and
    norms are no maps from vectors to vectors that it is made for; AdamW trains them.
    """

    kind: Literal["muon"] = "muon"
    """Tag of the union."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate of the matrices."""
    lr_adamw: float | None = Field(default=None, gt=0)
    """Peak learning rate of what AdamW trains; `lr` when absent."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon: decay of the running mean of the gradient."""
    nesterov: bool = True
    """Muon: look ahead, mixing the gradient of this step into the momentum once more."""
    scale: Literal["adam", "spectral"] = "adam"
    """Size of a step. `adam`: times 0.2 * sqrt(max(rows, columns)), as large as AdamW's, so that
    its learning rate and weight decay fit (Moonlight; Liu et al., 2025). `spectral`: times
    sqrt(max(1, rows / columns)), for learning rates about 0.02 (Jordan et al., 2024)."""
    iterations: int = Field(default=5, ge=1, le=20)
    """Newton-Schulz iterations, which set the singular values."""
    iterate_in: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of these iterations; `auto` takes that of the model's matrix products."""


OptimConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]
"""The optimisers."""


class EmaConfig(Config):
    """Exponential moving average of the weights: ``average += (1 - decay) * (w - average)``."""

    kind: Literal["ema"] = "ema"
    """Tag of the union."""
    decay: float = Field(default=0.999, ge=0, lt=1)
    """Share of the average that stays in each step."""
    every: int = Field(default=1, ge=1)
    """Steps between two updates; an update of several steps takes the decay of all of them."""


class LastConfig(Config):
    """Plain mean of the weights over the end of the run (Polyak averaging; Llama 3, section 3.4.3).

    It replaces annealing the learning rate, or goes with it over the same steps.
    """

    kind: Literal["last"] = "last"
    """Tag of the union."""
    steps: float = Field(default=0.1, gt=0)
    """Last steps that count: below 1 a share of all steps, from 1 on a number of steps."""
    every: int = Field(default=1, ge=1)
    """Steps between two weights that count; the last step always does."""


AverageConfig = Annotated[EmaConfig | LastConfig, Field(discriminator="kind")]
"""Averages of the weights."""
