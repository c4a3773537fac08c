"""``params.json`` of a Meta checkpoint; imports no torch.

The file says less than a model needs: the vocabulary may be -1, the feed-forward width is a rule,
the context is absent and the factor of a scaled RoPE is in nobody's file. What the tensors tell is
taken from them; what cannot be known is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from puna.core.errors import PunaError
from puna.model.config import (
    AnyRopeScaling,
    LinearScaling,
    LlamaConfig,
    RopeScaling,
    meta_ffn_dim,
)

PARAMS_FILE = "params.json"
LLAMA2_THETA = 10_000.0
"""Meta's code for Llama 1 and 2 has this constant and reads none from the file."""
_CONTEXT_KEY, _SCALING_KEY = "max_context_len", "rope_scaling"  # written by `params_of` only
_LLAMA2_CONTEXT, _LLAMA3_CONTEXT, _SCALED_CONTEXT = 4096, 8192, 131_072
_MULTIPLES = (256, 1024, 4096, 512, 128, 64, 32, 16, 8, 4, 2, 1)
_NEEDED = ("dim", "n_layers", "n_heads")
_OTHER_MODELS = {
    "moe_args": "a mixture of experts (Llama 4)",
    "quantization_args": "a quantised model",
    "lora_args": "a model with LoRA adapters",
    "vision_model": "a vision model",
    "vision_chunk_size": "a vision model",
}
_KNOWN = {
    *_NEEDED, "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "rope_scale_factor", _SCALING_KEY, _CONTEXT_KEY,
    "max_seq_len", "max_batch_size",
}  # fmt: skip
_NOT_OF_ONE = "use the params.json that belongs to the weights; a missing shard also gives this"
_ASK = "pass --rope-factor 8 for Llama 3.1 and 3.3, --rope-factor 32 for Llama 3.2 1B and 3B"


@dataclass(frozen=True)
class Measured:
    """What the merged tensors tell.

    Attributes:
        vocab_size: Rows of the output head.
        ffn_dim: Rows of w1.
        kv_rows: Rows of wk over all shards.
        tie_embeddings: Whether the head is the embedding.
    """

    vocab_size: int
    ffn_dim: int
    kv_rows: int
    tie_embeddings: bool


@dataclass
class Params:
    """A parsed ``params.json``.

    Args:
        path: The file, for messages.
        values: Its content.
    """

    path: Path
    values: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key, what in _OTHER_MODELS.items():
            if self.values.get(key) not in (None, -1):
                raise PunaError(
                    f"{self.path}: {key} says that this is {what}, which is not supported",
                    "use a plain text model of Llama 2 or 3",
                )
        missing = [key for key in _NEEDED if type(self.values.get(key)) is not int]
        if missing:
            raise PunaError(
                f"{self.path}: {missing[0]} = {self.values.get(missing[0])!r} is no whole number",
                "use the params.json that belongs to the weights",
            )
        if min(self.values[key] for key in _NEEDED) < 1 or self.dim % self.n_heads:
            raise PunaError(
                f"{self.path}: dim = {self.dim}, n_heads = {self.n_heads} and n_layers = "
                f"{self.values['n_layers']} describe no model",
                "use the params.json that belongs to the weights",
            )
        unknown = sorted(set(self.values) - _KNOWN - set(_OTHER_MODELS))
        if unknown:
            self.notes.append(f"{PARAMS_FILE} has keys that are not used: {', '.join(unknown)}")

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.values["dim"]

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.values["n_heads"]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.n_heads

    def n_kv_heads(self, kv_rows: int) -> int:
        """Return the key/value heads, from the rows of wk when the file does not say.

        Args:
            kv_rows: Rows of wk over all shards.
        """
        stated = self.values.get("n_kv_heads")
        if stated is not None:
            return stated
        heads, rest = divmod(kv_rows, self.head_dim)
        if rest or heads == 0 or self.n_heads % heads:
            raise PunaError(
                f"{self.path} has no n_kv_heads, and wk with {kv_rows} rows does not hold a whole "
                f"number of heads of {self.head_dim} that divides n_heads = {self.n_heads}",
                f'add "n_kv_heads" to {PARAMS_FILE}',
            )
        if heads != self.n_heads:
            self.notes.append(f"{PARAMS_FILE} has no n_kv_heads; the rows of wk say {heads}")
        return heads

    def config(
        self,
        measured: Measured,
        scaling: RopeScaling | LinearScaling | None = None,
        factor: float | None = None,
    ) -> LlamaConfig:
        """Return the full configuration.

        Args:
            measured: From the tensors.
            scaling: Overrules what the file says about scaling RoPE.
            factor: That of Llama 3.1's scaling, which the file asks for but does not give.

        Raises:
            PunaError: A value is impossible or contradicts the tensors, or RoPE is scaled by an
                unknown factor.
        """
        self._check(measured)
        theta = self.values.get("rope_theta")
        if theta is None:
            theta = LLAMA2_THETA
            self.notes.append(f"{PARAMS_FILE} has no rope_theta; {theta:g} as in Llama 2")
        scaling = scaling or self._scaling(factor)
        try:
            return LlamaConfig(
                vocab_size=measured.vocab_size, dim=self.dim, n_layers=self.values["n_layers"],
                n_heads=self.n_heads, n_kv_heads=self.n_kv_heads(measured.kv_rows),
                ffn_dim=measured.ffn_dim, max_seq_len=self._context(theta, scaling),
                rope_theta=theta, rope_scaling=scaling,
                norm_eps=self.values.get("norm_eps", 1e-5),
                tie_embeddings=measured.tie_embeddings,
            )  # fmt: skip
        except ValidationError as error:
            raise _invalid(self.path, error) from error

    def _check(self, measured: Measured) -> None:
        vocab_size = self.values.get("vocab_size", -1)
        if vocab_size not in (-1, measured.vocab_size):
            raise PunaError(
                f"{self.path}: vocab_size = {vocab_size!r}, the output head has "
                f"{measured.vocab_size} rows",
                _NOT_OF_ONE,
            )
        multiple = self.values.get("multiple_of")
        if multiple is None:
            return
        multiplier = self.values.get("ffn_dim_multiplier")
        try:
            by_rule = meta_ffn_dim(self.dim, multiple, multiplier)
        except (TypeError, ZeroDivisionError, OverflowError, ValueError):
            by_rule = None
        if by_rule != measured.ffn_dim:
            raise PunaError(
                f"{self.path}: multiple_of = {multiple!r} and ffn_dim_multiplier = {multiplier!r} "
                f"mean a feed-forward of {by_rule}, w1 has {measured.ffn_dim} rows",
                _NOT_OF_ONE,
            )

    def _scaling(self, factor: float | None) -> RopeScaling | LinearScaling | None:
        stated = self.values.get(_SCALING_KEY)
        scaling: RopeScaling | LinearScaling | None = None
        try:
            if stated is not None:
                scaling = TypeAdapter(AnyRopeScaling).validate_python(stated)
            elif self.values.get("rope_scale_factor") is not None:
                scaling = RopeScaling(factor=self.values["rope_scale_factor"])
            elif self.values.get("use_scaled_rope"):
                if factor is None:
                    raise PunaError(
                        f"{self.path}: use_scaled_rope without a factor is ambiguous: 8 in Llama "
                        "3.1, 32 in Llama 3.2 1B and 3B, and a wrong one shows only in long texts",
                        _ASK,
                    )
                return RopeScaling(factor=factor)
        except ValidationError as error:
            raise _invalid(self.path, error) from error
        if factor is not None and (scaling is None or scaling.factor != factor):
            said = "does not scale RoPE" if scaling is None else f"says factor {scaling.factor:g}"
            raise PunaError(
                f"{self.path} {said}, --rope-factor says {factor:g}", "leave --rope-factor out"
            )
        return scaling

    def _context(self, theta: float, scaling: RopeScaling | LinearScaling | None) -> int:
        if _CONTEXT_KEY in self.values:
            return self.values[_CONTEXT_KEY]
        context = default_context(theta, scaling)
        self.notes.append(f"{PARAMS_FILE} does not give the context; taken as {context} tokens")
        return context


def default_context(theta: float, scaling: RopeScaling | LinearScaling | None) -> int:
    """Return the published context of the family that these RoPE values belong to, in tokens."""
    base = _LLAMA2_CONTEXT if theta == LLAMA2_THETA else _LLAMA3_CONTEXT
    if isinstance(scaling, LinearScaling):
        return int(base * scaling.factor)
    return base if scaling is None else _SCALED_CONTEXT


def params_of(config: LlamaConfig) -> dict[str, Any]:
    """Return the content of a ``params.json`` that gives back this configuration.

    Meta's code reads it too: keys that it does not know are there only when its own cannot say the
    same (a scaling's numbers, an unusual context).
    """
    multiple, multiplier = _ffn_rule(config.dim, config.ffn_dim)
    values: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple,
        "norm_eps": config.norm_eps,
    }
    if multiplier is not None:
        values["ffn_dim_multiplier"] = multiplier
    if config.rope_theta != LLAMA2_THETA:
        values["rope_theta"] = config.rope_theta
    scaling = config.rope_scaling
    if scaling is not None:
        values["use_scaled_rope"] = isinstance(scaling, RopeScaling)
        values[_SCALING_KEY] = scaling.model_dump()
    if config.max_seq_len != default_context(config.rope_theta, scaling):
        values[_CONTEXT_KEY] = config.max_seq_len
    return values


def _ffn_rule(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """Return a multiple_of and an ffn_dim_multiplier by which Meta's rule gives this width."""
    plain = meta_ffn_dim(dim, 1)
    for multiple in _MULTIPLES:
        if meta_ffn_dim(dim, multiple) == ffn_dim:
            return multiple, None
    for digits in range(1, 17):
        for multiple in _MULTIPLES:
            multiplier = round(ffn_dim / plain, digits)
            if meta_ffn_dim(dim, multiple, multiplier) == ffn_dim:
                return multiple, multiplier
    # Truncation can hit the number below; half a unit more cannot reach the one above.
    return 1, (ffn_dim + 0.5) / plain


def _invalid(path: Path, error: ValidationError) -> PunaError:
    problems = "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'values'}: {item['msg']}"
        for item in error.errors()
    )
    return PunaError(f"{path}: {problems}", "correct the value in this file")
