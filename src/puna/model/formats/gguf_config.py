"""The key-values of a GGUF file that describe a Llama, in both directions; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
_WHOLE = ("n_layers", "dim", "ffn_dim", "n_heads", "n_kv_heads", "max_seq_len")
_OWN = "puna.rope.scaling."
"""Keys of puna for the numbers of Llama 3.1's scaling, which GGUF only holds as divisors."""
_OWN_FIELDS = ("factor", "low_freq_factor", "high_freq_factor")
_IDS = {"bos_id": "bos_token_id", "pad_id": "padding_token_id"}
_TOKENIZER = "tokenizer.ggml."
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_FIX = "use a GGUF file of the Llama architecture, made by a current llama.cpp or by puna"
_CONTEXTS = (RopeScaling().original_max_seq_len, 4096, 2048, 16_384)  # of known models
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
        if value is not None:
            found[name] = _number(path, f"{ARCHITECTURE}.{key}", value, whole=name in _WHOLE)
        elif key not in _OPTIONAL:
            raise PunaError(f"{path}: {ARCHITECTURE}.{key} is missing", _FIX)
    found.setdefault("n_kv_heads", found["n_heads"])
    # Before anything is made for each layer: the number may be any.
    if found["n_layers"] > len(file.tensors):
        raise PunaError(
            f"{path}: {ARCHITECTURE}.block_count is {found['n_layers']}, but the file has only "
            f"{len(file.tensors)} tensors",
            _FIX,
        )
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
        values |= {f"{_OWN}{name}": getattr(scaling, name) for name in _OWN_FIELDS}
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
        value = metadata.get(f"{_TOKENIZER}{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    eos = [id_ for id_ in map(read, _EOS_KEYS) if id_ is not None]
    return SpecialIds(
        eos_ids=tuple(dict.fromkeys(eos)), **{name: read(key) for name, key in _IDS.items()}
    )


def special_ids_to_gguf(ids: SpecialIds, given: Mapping[str, Any]) -> dict[str, int]:
    """Return the key-values for ids of special tokens, beside those that are given already.

    Args:
        ids: The format has keys for three tokens that end a text; further ones are left out.
        given: Key-values that stay as they are, the tokenizer's.
    """
    named = {f"{_TOKENIZER}{key}": getattr(ids, name) for name, key in _IDS.items()}
    values = {key: id_ for key, id_ in named.items() if id_ is not None and key not in given}
    keys = [f"{_TOKENIZER}{key}" for key in _EOS_KEYS]
    known = {given[key] for key in keys if key in given}
    free = (key for key in keys if key not in given)
    return values | dict(zip(free, (id_ for id_ in ids.eos_ids if id_ not in known), strict=False))


def _number(path: Path, key: str, value: Any, *, whole: bool) -> int | float:
    """Return a value of the header; others are no numbers, though they may look like one."""
    if type(value) is int:
        return value if whole else float(value)
    if type(value) is not float or whole:
        raise PunaError(
            f"{path}: {key} is {value!r}, not a {'whole ' if whole else ''}number", _FIX
        )
    return _meant(value)


def _meant(value: float) -> float:
    """Return the shortest decimal that gives the same float32, if it is one: 1e-5, not 9.99e-6."""
    if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        return value
    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


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
    kind, key = values.get(f"{prefix}type"), f"{prefix}factor"
    if key not in values:
        key = f"{ARCHITECTURE}.rope.scale_linear"  # its older name
    # As in llama.cpp: without a type it is linear, and a factor of 0 is none.
    factor = _number(path, key, values.get(key, 0), whole=False) if kind != "none" else 0
    if kind not in (None, "none", "linear"):
        raise PunaError(
            f"{path}: {prefix}type is {kind!r}; only 'linear' and the tensor {ROPE_FREQS} are read",
            _FIX,
        )
    if divisors is None:
        return LinearScaling(factor=factor) if factor else None
    if factor not in (0, 1):
        raise PunaError(
            f"{path}: RoPE is scaled twice, by {key} = {factor:g} and by the tensor {ROPE_FREQS}",
            _FIX,
        )
    return _fit(config, values, divisors, path)


def _fit(
    config: LlamaConfig, values: Mapping[str, Any], divisors: Sequence[float], path: Path
) -> RopeScaling:
    """Find the scaling that gives these divisors, by the numbers that files are known to use."""
    for scaling in _known(values, divisors, path):
        wanted = rope_divisors(config, scaling)
        if len(wanted) == len(divisors) and np.allclose(wanted, divisors, rtol=_TOLERANCE, atol=0):
            return scaling
    defaults = RopeScaling()
    raise PunaError(
        f"{path}: the tensor {ROPE_FREQS} is not that of Llama 3.1's scaling with low and high "
        f"factors {defaults.low_freq_factor:g} and {defaults.high_freq_factor:g}",
        _FIX,
    )


def _known(
    values: Mapping[str, Any], divisors: Sequence[float], path: Path
) -> Iterator[RopeScaling]:
    """Yield what the divisors may come from, the likeliest first."""
    contexts = list(_CONTEXTS)
    key = f"{ARCHITECTURE}.rope.scaling.original_context_length"
    if key in values:
        contexts.insert(0, int(_number(path, key, values[key], whole=True)))
    if all(f"{_OWN}{name}" in values for name in _OWN_FIELDS):
        own = {
            name: _number(path, f"{_OWN}{name}", values[f"{_OWN}{name}"], whole=False)
            for name in _OWN_FIELDS
        }
        yield RopeScaling.model_validate({**own, "original_max_seq_len": contexts[0]})
    # The longest wavelengths are divided by the factor itself.
    factor = _meant(max(divisors, default=0.0))
    if math.isfinite(factor) and factor >= 1:
        for context in dict.fromkeys(contexts):
            yield RopeScaling(factor=factor, original_max_seq_len=context)
