"""``config.json`` of a Hugging Face Llama folder; imports no torch.

Reads both spellings of RoPE: ``rope_theta`` with ``rope_scaling`` (transformers 4 and most tools)
and ``rope_parameters`` (transformers 5). Writes the former, which both versions read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import SpecialIds

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "ffn_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_OPTIONAL = {
    "num_key_value_heads",
    "tie_word_embeddings",
    "rms_norm_eps",
    "max_position_embeddings",
}
# What transformers assumes when the key is absent.
_ABSENT = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_DEFAULT_ROPE_THETA = 10_000.0
_SCALING_FIELDS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
    },
}
# Keys that change what the model computes, and the only value that is a Llama.
_REQUIRED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
}


def config_to_hf(
    config: LlamaConfig,
    dtype: str = "float32",
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Args:
        config: The model.
        dtype: Of the weights beside it.
        bos_id: First token of every document.
        eos_ids: Tokens that end a generation.
        pad_id: Padding token.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_hf(config.rope_scaling),
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        **special_ids_to_hf(bos_id, eos_ids, pad_id),
    }  # fmt: skip


def special_ids_to_hf(
    bos_id: int | None, eos_ids: Sequence[int], pad_id: int | None
) -> dict[str, Any]:
    """Return the token ids as ``config.json`` and ``generation_config.json`` spell them."""
    eos = list(eos_ids)
    return {
        "bos_token_id": bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": pad_id,
    }


def config_from_hf(values: Mapping[str, Any], where: str = CONFIG_FILE) -> LlamaConfig:
    """Read the content of a ``config.json``.

    Args:
        values: The parsed file.
        where: Named in messages.

    Raises:
        PunaError: Not a Llama, a missing or impossible value, or a variant that would compute
            something else (biases, other activations, other RoPE types, quantised weights).
    """
    rope = _rope_values(values, where)
    for key, allowed in _REQUIRED_VALUES.items():
        value = values.get(key, rope.get(key, allowed[0]))
        if value not in allowed:
            raise PunaError(
                f"{where}: {key} = {value!r} is not supported, only {allowed[0]!r}",
                "use a checkpoint of the Llama architecture",
            )
    ours: dict[str, Any] = {}
    for key, name in _FIELDS.items():
        if key not in values and key not in _OPTIONAL:
            raise PunaError(f"{where}: {key} is missing", "use a complete Llama config.json")
        ours[name] = values.get(key, _ABSENT.get(key))
    if ours["n_kv_heads"] is None:  # absent or null before grouped-query attention
        ours["n_kv_heads"] = ours["n_heads"]
    ours["rope_theta"] = rope.pop("rope_theta")
    try:
        config = LlamaConfig(**ours, rope_scaling=_scaling_from_hf(rope, where))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'config'}: {item['msg']}"
            for item in error.errors()
        )
        raise PunaError(f"{where}: {problems}", "correct the value in this file") from error
    if values.get("head_dim") not in (None, config.head_dim):
        raise PunaError(
            f"{where}: head_dim = {values['head_dim']!r} is not hidden_size / num_attention_heads "
            f"= {config.head_dim}",
            "use a checkpoint of the Llama architecture",
        )
    return config


def read_hf_config(folder: Path) -> LlamaConfig:
    """Read ``config.json`` of a folder.

    Raises:
        PunaError: The file is missing, is no JSON object, or describes no Llama.
    """
    path = folder / CONFIG_FILE
    return config_from_hf(read_json_object(path, "point to a folder that holds a model"), str(path))


def read_special_ids(folder: Path) -> SpecialIds:
    """Read the special tokens that ``generation_config.json`` and ``config.json`` name.

    The former wins where both name one; tokens that end a generation are those of both.

    Raises:
        PunaError: A file is no JSON object, or an id is no whole number from 0.
    """
    found: dict[str, list[int]] = {"bos_token_id": [], "eos_token_id": [], "pad_token_id": []}
    for path in (folder / GENERATION_FILE, folder / CONFIG_FILE):
        if not path.exists():
            continue
        values = read_json_object(path, "write it again, or remove it")
        for key, ids in found.items():
            value = values.get(key)
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(item) is int and item >= -1 for item in listed):
                raise PunaError(f"{path}: {key} = {value!r} is no token id", "correct the value")
            ids += [item for item in listed if item >= 0]  # -1: none, in some older files
    bos, eos, pad = found.values()
    return SpecialIds(next(iter(bos), None), tuple(dict.fromkeys(eos)), next(iter(pad), None))


def read_json_object(path: Path, fix: str) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        PunaError: The file is missing, is no JSON, or holds something else.
    """
    if not path.is_file():
        raise PunaError(f"{path} does not exist", fix)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PunaError(f"{path} is no valid JSON: {error}", fix) from error
    if not isinstance(values, dict):
        raise PunaError(f"{path} holds {type(values).__name__}, not an object", fix)
    return values


def _rope_values(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Merge both spellings into one dict with rope_theta and, when scaled, the scaling's keys."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = values.get(key)
        if part is None:
            continue
        if not isinstance(part, Mapping):
            raise PunaError(f"{where}: {key} = {part!r} is not an object", "correct the file")
        rope.update(part)
    rope.setdefault("rope_theta", values.get("rope_theta", _DEFAULT_ROPE_THETA))
    return rope


def _scaling_to_hf(scaling: RopeScaling | LinearScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields = _SCALING_FIELDS[scaling.kind].items()
    values = {theirs: getattr(scaling, ours) for theirs, ours in fields}
    return {"rope_type": scaling.kind, **values}


def _scaling_from_hf(rope: Mapping[str, Any], where: str) -> RopeScaling | LinearScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _SCALING_FIELDS:
        raise PunaError(
            f"{where}: rope_type = {kind!r} is not supported, only 'default', 'linear' and "
            "'llama3'",
            "use a checkpoint with one of these",
        )
    fields = _SCALING_FIELDS[kind]
    missing = [key for key in fields if key not in rope]
    if missing:  # a guessed factor would go unnoticed until the context is long
        raise PunaError(
            f"{where}: the {kind} rope scaling lacks {', '.join(missing)}",
            "add the values that the model was trained with",
        )
    values = {ours: rope[theirs] for theirs, ours in fields.items()}
    return LinearScaling(**values) if kind == "linear" else RopeScaling(**values)
