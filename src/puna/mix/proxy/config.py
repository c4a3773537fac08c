"""Settings of the proxies, the section ``[proxy]`` of a manifest; imports no torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from puna.core.config import Config, identity
from puna.model.config import LlamaConfig
from puna.train.optim_config import AdamWConfig
from puna.train.schedule_config import CosineConfig, ScheduleConfig


class HeldOutConfig(Config):
    """What bits per byte are measured on: the held-out documents of each source of the shards."""

    max_tokens: int = Field(default=16_384, ge=64)
    """Tokens of each target, whole documents; more make a target less noisy."""
    overlap: float = Field(default=0.0, ge=0, lt=1)
    """Share of a window that repeats earlier tokens as context, unscored."""
    seed: int = 0
    """Chooses the documents."""


class ProxyConfig(Config):
    """A small Llama with a tied head, and how it is trained; all of it is part of a run's key."""

    dim: int = Field(default=64, ge=2)
    """Width."""
    n_layers: int = Field(default=2, ge=1)
    """Layers."""
    n_heads: int = Field(default=4, ge=1)
    """Query heads."""
    n_kv_heads: int = Field(default=2, ge=1)
    """Key and value heads."""
    ffn_dim: int = Field(default=192, ge=1)
    """Inner width of the feed-forward."""
    seq_len: int = Field(default=128, ge=2)
    """Tokens of a row."""
    global_batch: int = Field(default=8, ge=1)
    """Rows of a step. Few make more steps of the same tokens: small models learn more so."""
    tokens: int = Field(default=327_680, ge=1)
    """Tokens of a run, rounded up to whole steps."""
    optim: AdamWConfig = Field(default_factory=lambda: AdamWConfig(lr=6e-3))
    """Optimiser."""
    schedule: ScheduleConfig = Field(default_factory=lambda: CosineConfig(warmup=0.06))
    """Learning rate over a run."""
    clip_norm: float = Field(default=1.0, ge=0)
    """The gradient is scaled down to this norm where it is longer; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; `auto` takes bf16 where the processor is made for it."""
    heldout: HeldOutConfig = Field(default_factory=HeldOutConfig)
    """What is measured."""
    seed: int = Field(default=0, ge=0)
    """First seed of a design; repeated mixes take the next one."""

    @model_validator(mode="after")
    def _is_a_model(self) -> Self:
        self.model(2)
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.global_batch

    @property
    def n_steps(self) -> int:
        """Steps of a run."""
        return -(-self.tokens // self.tokens_per_step)

    @property
    def n_tokens(self) -> int:
        """Tokens of a run, whole steps."""
        return self.n_steps * self.tokens_per_step

    def model(self, vocab_size: int) -> LlamaConfig:
        """Return the shape of the proxy."""
        return LlamaConfig(
            vocab_size=vocab_size, dim=self.dim, n_layers=self.n_layers, n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads, ffn_dim=self.ffn_dim, max_seq_len=self.seq_len,
            tie_embeddings=True,
        )  # fmt: skip

    def content(self) -> dict[str, Any]:
        """Return what a run's key is made of, besides its mix and its seed."""
        values = identity(self)
        del values["seed"]
        return values
