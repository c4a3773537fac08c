"""The key-values of a GGUF file that describe a Llama, in both directions; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.core.gguf import GGUFFile
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import SpecialIds

ARCHITECTURE = "llama"
ROPE_FREQS = "rope_freqs.weight"
"""A tensor, not a parameter: by what each RoPE frequency is divided (Llama 3.1's scaling)."""
_FIELDS = {
    "block_count": "n_layers",
    "embedding_length": "dim",
    "feed_forward_length": "ffn_dim",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "context_length": "max_seq_len",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
}
_OPTIONAL = {"attention.head_count_kv": None, "rope.freq_base": 10_000.0}
_IDS = {"bos_id": "bos_token_id", "pad_id": "padding_token_id"}
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_FIX = "use a GGUF file of the Llama architecture, made by a current llama.cpp or by puna"
_TOLERANCE = 1e-4  # of the divisors, which are stored as float32


def config_from_gguf(file: GGUFFile, divisors: Sequence[float] | None) -> LlamaConfig:
    """Read the configuration of a model.

    Args:
        file: The header.
        divisors: Content of the tensor :data:`ROPE_FREQS`; None when there is none.

    Raises:
        PunaError: Not a Llama, a missing or impossible value, or a RoPE that puna does not know.
    """
    path, values = file.path, file.metadata
    architecture = values.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise PunaError(
            f"{path}: general.architecture is {architecture!r}, not {ARCHITECTURE!r}", _FIX
        )
    found: dict[str, Any] = {}
    for key, name in _FIELDS.items():
        value = values.get(f"{ARCHITECTURE}.{key}", _OPTIONAL.get(key))
        if value is None and key not in _OPTIONAL:
            raise PunaError(f"{path}: {ARCHITECTURE}.{key} is missing", _FIX)
        # Written as float32: the shortest decimal that gives the same float32 is what was meant.
        found[name] = float(str(np.float32(value))) if isinstance(value, float) else value
    if found["n_kv_heads"] is None:
        found["n_kv_heads"] = found["n_heads"]
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise PunaError(f"{path}: tensor token_embd.weight is missing", _FIX)
    found["vocab_size"] = embedding.shape[0]
    found["tie_embeddings"] = "output.weight" not in file.tensors
    try:
        config = LlamaConfig(**found)
        _check_heads(config, values, path)
        scaling = _scaling(config, values, divisors, path)
        return config.model_copy(update={"rope_scaling": scaling})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'config'}: {item['msg']}"
            for item in error.errors()
        )
        raise PunaError(f"{path}: {problems}", _FIX) from error


def config_to_gguf(config: LlamaConfig) -> dict[str, Any]:
    """Return the key-values of a configuration; Llama 3.1's scaling is a tensor besides."""
    values: dict[str, Any] = {
        f"{ARCHITECTURE}.{key}": getattr(config, name) for key, name in _FIELDS.items()
    }
    values[f"{ARCHITECTURE}.rope.dimension_count"] = config.head_dim
    values[f"{ARCHITECTURE}.vocab_size"] = config.vocab_size
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        values[f"{ARCHITECTURE}.rope.scaling.type"] = "linear"
        values[f"{ARCHITECTURE}.rope.scaling.factor"] = scaling.factor
    elif isinstance(scaling, RopeScaling):
        values[f"{ARCHITECTURE}.rope.scaling.original_context_length"] = (
            scaling.original_max_seq_len
        )
    return values


def rope_divisors(config: LlamaConfig, scaling: RopeScaling) -> list[float]:
    """Return by what Llama 3.1's scaling divides the frequency of each pair."""
    divisors = []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * math.pi * config.rope_theta ** (2 * pair / config.head_dim)
        place = scaling.original_max_seq_len / wavelength
        keep = (place - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = min(max(keep, 0.0), 1.0)
        divisors.append(1 / ((1 - keep) / scaling.factor + keep))
    return divisors


def special_ids_from_gguf(metadata: Mapping[str, Any]) -> SpecialIds:
    """Return the ids of special tokens that a file names."""

    def read(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    eos = [id_ for id_ in map(read, _EOS_KEYS) if id_ is not None]
    return SpecialIds(
        eos_ids=tuple(dict.fromkeys(eos)), **{name: read(key) for name, key in _IDS.items()}
    )


def _check_heads(config: LlamaConfig, values: Mapping[str, Any], path: Path) -> None:
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        size = values.get(f"{ARCHITECTURE}.{key}", config.head_dim)
        if size != config.head_dim:
            raise PunaError(
                f"{path}: {ARCHITECTURE}.{key} is {size}, not embedding_length / head_count = "
                f"{config.head_dim}",
                _FIX,
            )
    if values.get(f"{ARCHITECTURE}.expert_count"):
        raise PunaError(f"{path} holds a mixture of experts", _FIX)


def _scaling(
    config: LlamaConfig, values: Mapping[str, Any], divisors: Sequence[float] | None, path: Path
) -> RopeScaling | LinearScaling | None:
    prefix = f"{ARCHITECTURE}.rope.scaling."
    kind = values.get(f"{prefix}type", "none")
    if divisors is not None:
        return _fit(config, values.get(f"{prefix}original_context_length"), divisors, path)
    if kind == "linear":
        return LinearScaling(factor=values.get(f"{prefix}factor", 1.0))
    if kind != "none":
        raise PunaError(
            f"{path}: {prefix}type is {kind!r}; only 'linear' and the tensor {ROPE_FREQS} are read",
            _FIX,
        )
    older = values.get(f"{ARCHITECTURE}.rope.scale_linear")
    return LinearScaling(factor=older) if older else None


def _fit(
    config: LlamaConfig, context: int | None, divisors: Sequence[float], path: Path
) -> RopeScaling:
    """Find the scaling that gives these divisors; the file does not name its numbers."""
    defaults = RopeScaling()
    factor = float(str(np.float32(max(divisors, default=0.0))))
    for length in dict.fromkeys(
        n for n in (context, defaults.original_max_seq_len, 4096, 2048, 16_384) if n
    ):
        if not math.isfinite(factor) or factor < 1:
            break
        scaling = RopeScaling(factor=factor, original_max_seq_len=length)
        wanted = rope_divisors(config, scaling)
        if len(wanted) == len(divisors) and np.allclose(wanted, divisors, rtol=_TOLERANCE):
            return scaling
    raise PunaError(
        f"{path}: the tensor {ROPE_FREQS} is not that of Llama 3.1's scaling with low and high "
        f"factors {defaults.low_freq_factor:g} and {defaults.high_freq_factor:g}",
        _FIX,
    )
