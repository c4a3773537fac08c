"""The configuration of a Llama and the presets of the family; imports no torch.

Llama 2, Llama 3, 3.1 and 3.2 are one architecture (decoder only, RMSNorm, RoPE, grouped-query
attention, SwiGLU). What differs between them is the numbers in :class:`LlamaConfig`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.registry import Registry


class RopeScaling(Config):
    """How Llama 3.1 stretches RoPE to a longer context than it was pretrained with.

    Long wavelengths are divided by ``factor``, short ones are kept, those between are blended
    (reference: ``apply_scaling`` of meta-llama/llama-models; there the numbers are hard-coded,
    here they come from the configuration: 8 for Llama 3.1, 32 for Llama 3.2 1B and 3B).
    """

    kind: Literal["llama3"] = "llama3"
    """`llama3`: by wavelength, as in Llama 3.1."""
    factor: float = Field(default=8.0, ge=1.0)
    """How much longer the new context is."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Wavelengths above original_max_seq_len / low_freq_factor are divided by factor."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Wavelengths below original_max_seq_len / high_freq_factor are kept."""
    original_max_seq_len: int = Field(default=8192, ge=1)
    """Context of the pretraining before the extension, in tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )
        return self


class LinearScaling(Config):
    """Position interpolation (Chen et al. 2023): every position, so every frequency, is divided.

    Extends a model that was trained without it after little further training; Code Llama and many
    long-context fine-tunes of Llama 2 use it.
    """

    kind: Literal["linear"] = "linear"
    """`linear`: all positions alike."""
    factor: float = Field(ge=1.0)
    """How much longer the new context is."""


def _scaling_kind(value: Any) -> str:
    kind = value.get("kind", "llama3") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(kind)


AnyRopeScaling = Annotated[
    Annotated[RopeScaling, Tag("llama3")] | Annotated[LinearScaling, Tag("linear")],
    Discriminator(_scaling_kind),
]
"""How a model stretches RoPE; a table without ``kind`` is of the kind ``llama3``."""


class LlamaConfig(Config):
    """Everything that decides the shape and the function of a Llama."""

    vocab_size: int = Field(ge=2)
    """Rows of the embedding and of the output head."""
    dim: int = Field(ge=2)
    """Width of the residual stream (hidden_size)."""
    n_layers: int = Field(ge=1)
    """Transformer blocks."""
    n_heads: int = Field(ge=1)
    """Query heads."""
    n_kv_heads: int = Field(ge=1)
    """Key and value heads; fewer than n_heads means grouped-query attention."""
    ffn_dim: int = Field(ge=1)
    """Width inside the SwiGLU feed-forward (intermediate_size); see `meta_ffn_dim`."""
    max_seq_len: int = Field(ge=1)
    """Longest sequence in tokens (max_position_embeddings); costs no weights."""
    rope_theta: float = Field(default=500_000.0, gt=1.0)
    """Base of the RoPE wavelengths: 10000 in Llama 2, 500000 since Llama 3."""
    rope_scaling: AnyRopeScaling | None = None
    """Context extension: `llama3` since Llama 3.1, `linear` is position interpolation."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = False
    """The output head is the embedding matrix itself (Llama 3.2 1B and 3B)."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def kv_dim(self) -> int:
        """Width of the keys (and of the values) of one token: n_kv_heads * head_dim."""
        return self.n_kv_heads * self.head_dim

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dim % self.n_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of n_heads={self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"dim / n_heads = {self.head_dim} is odd; RoPE rotates pairs, so it must be even"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
            )
        return self


PRESETS: Registry[LlamaConfig] = Registry("model preset")
"""Extension point: a plugin adds a model with ``PRESETS.register("name", LlamaConfig(...))``."""


def meta_ffn_dim(dim: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Return the feed-forward width by Meta's rule (``FeedForward`` of meta-llama/llama3).

    Two thirds of 4 * dim (SwiGLU has three matrices instead of two), times ``multiplier`` if given,
    rounded up to ``multiple_of``; each step truncates to an integer as the original does.
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


class ModelConfig(Config):
    """The model of a recipe: a preset, with any field overridden; or all fields without a preset.

    ``preset = "demo"`` alone is complete: the vocabulary size comes from the tokenizer.
    """

    preset: str | None = None
    """Name from `puna model list`; the fields below replace its values."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Rows of the embedding; the tokenizer's size when absent, and never below it."""
    dim: int | None = Field(default=None, ge=2)
    """Width of the residual stream."""
    n_layers: int | None = Field(default=None, ge=1)
    """Transformer blocks."""
    n_heads: int | None = Field(default=None, ge=1)
    """Query heads."""
    n_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads."""
    ffn_dim: int | None = Field(default=None, ge=1)
    """Width inside the feed-forward; without a preset Meta's rule on dim when absent."""
    max_seq_len: int | None = Field(default=None, ge=1)
    """Longest sequence in tokens."""
    rope_theta: float | None = Field(default=None, gt=1.0)
    """Base of the RoPE wavelengths."""
    rope_scaling: AnyRopeScaling | None = None
    """Context extension: `llama3` or `linear`."""
    norm_eps: float | None = Field(default=None, gt=0)
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool | None = None
    """The output head is the embedding matrix itself."""

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, preset: str | None) -> str | None:
        if preset is not None:
            try:
                PRESETS.get(preset)
            except PunaError as error:
                raise ValueError(f"{error.message}; {error.fix}") from error
        return preset

    @model_validator(mode="after")
    def _resolvable(self) -> Self:
        # Found here, an impossible shape stops the run before any data is read.
        self._build(self.vocab_size or 2)
        return self

    def resolve(self, vocab_size: int | None = None) -> LlamaConfig:
        """Return the full configuration.

        Args:
            vocab_size: The tokenizer's size; the preset's own when None.

        Raises:
            PunaError: The section's ``vocab_size`` is smaller than the tokenizer's, or neither the
                section, the preset nor the caller gives one.
        """
        if self.vocab_size is not None:
            if vocab_size is not None and self.vocab_size < vocab_size:
                raise PunaError(
                    f"vocab_size = {self.vocab_size} of the model is smaller than the tokenizer's "
                    f"{vocab_size}",
                    "remove vocab_size from the model's section, or set it to at least "
                    f"{vocab_size}",
                )
            return self._build(self.vocab_size)
        if vocab_size is None:
            if self.preset is None:
                raise PunaError(
                    "the model has no vocab_size",
                    "set vocab_size in the model's section, or name a preset",
                )
            vocab_size = PRESETS.get(self.preset).vocab_size
        return self._build(vocab_size)

    def _build(self, vocab_size: int) -> LlamaConfig:
        base = {} if self.preset is None else dict(PRESETS.get(self.preset))
        own = {
            name: getattr(self, name)
            for name in LlamaConfig.model_fields
            if getattr(self, name) is not None
        }
        values = {**base, **own, "vocab_size": vocab_size}
        if self.preset is None:
            _fill_without_preset(values)
        return LlamaConfig(**values)


def _fill_without_preset(values: dict[str, object]) -> None:
    needed = ("dim", "n_layers", "n_heads", "max_seq_len")
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"without a preset the model also needs {', '.join(missing)}")
    values.setdefault("n_kv_heads", values["n_heads"])
    values.setdefault("ffn_dim", meta_ffn_dim(int(str(values["dim"]))))


def _llama2(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int | None = None, ffn_dim: int | None = None
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000, dim=dim, n_layers=n_layers, n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads, ffn_dim=ffn_dim or meta_ffn_dim(dim),
        max_seq_len=4096, rope_theta=10_000.0,
    )  # fmt: skip


def _llama3(
    dim: int, n_layers: int, n_heads: int, ffn_dim: int, *,
    scaling_factor: float | None = None, tie_embeddings: bool = False,
) -> LlamaConfig:  # fmt: skip
    scaling = None if scaling_factor is None else RopeScaling(factor=scaling_factor)
    return LlamaConfig(
        vocab_size=128_256, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=8,
        ffn_dim=ffn_dim, max_seq_len=8192 if scaling is None else 131_072,
        rope_theta=500_000.0, rope_scaling=scaling, tie_embeddings=tie_embeddings,
    )  # fmt: skip


def _cpu(
    vocab_size: int, dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int,
    max_seq_len: int,
) -> LlamaConfig:  # fmt: skip
    return LlamaConfig(
        vocab_size=vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
        ffn_dim=ffn_dim, max_seq_len=max_seq_len, tie_embeddings=True,
    )  # fmt: skip


_FFN_8B = meta_ffn_dim(4096, 1024, 1.3)
_FFN_70B = meta_ffn_dim(8192, 4096, 1.3)
for _name, _config in {
    # Trained from scratch on a CPU; `demo` suits the two million tokens that minutes there allow.
    "tiny": _cpu(512, 64, 2, 4, 2, meta_ffn_dim(64, 32), 128),
    "demo": _cpu(4096, 128, 4, 4, 2, meta_ffn_dim(128, 64), 512),
    "small": _cpu(8192, 384, 8, 6, 2, meta_ffn_dim(384, 256), 1024),
    # Published by Meta.
    "llama2-7b": _llama2(4096, 32, 32),
    "llama2-13b": _llama2(5120, 40, 40),
    "llama2-70b": _llama2(8192, 80, 64, 8, _FFN_70B),
    "llama3-8b": _llama3(4096, 32, 32, _FFN_8B),
    "llama3-70b": _llama3(8192, 80, 64, _FFN_70B),
    "llama3.1-8b": _llama3(4096, 32, 32, _FFN_8B, scaling_factor=8),
    "llama3.1-70b": _llama3(8192, 80, 64, _FFN_70B, scaling_factor=8),
    "llama3.1-405b": _llama3(16384, 126, 128, meta_ffn_dim(16384, 4096, 1.2), scaling_factor=8),
    "llama3.2-1b": _llama3(
        2048, 16, 32, meta_ffn_dim(2048, 256, 1.5), scaling_factor=32, tie_embeddings=True
    ),
    "llama3.2-3b": _llama3(
        3072, 28, 24, meta_ffn_dim(3072, 256, 1.0), scaling_factor=32, tie_embeddings=True
    ),
}.items():
    PRESETS.register(_name, _config)
