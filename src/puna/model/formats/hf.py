"""Hugging Face folders: ``config.json`` and ``model.safetensors``, strict in both directions.

A tensor that is missing, surplus or of the wrong shape is an error that names it. Writing is
byte-deterministic: equal weights give an equal file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path, write_json
from puna.model.config import LlamaConfig
from puna.model.formats.hf_config import (
    CONFIG_FILE,
    config_to_hf,
    read_hf_config,
    read_json_object,
    special_ids_to_hf,
)
from puna.model.llama import Llama
from puna.model.names import parameter_shapes

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"

_TOP_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # in old files
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_RELOAD = "download or write the checkpoint again"


def hf_name(name: str) -> str:
    """Return the Hugging Face name of one of our parameters.

    Raises:
        KeyError: Not a parameter of a Llama.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return _TOP_NAMES[name]
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def save_hf(
    folder: Path,
    config: LlamaConfig,
    state_dict: Mapping[str, Float[Tensor, "*shape"]],
    *,
    dtype: torch.dtype = torch.float32,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> None:
    """Write a folder that :func:`load_hf` and transformers read.

    Each file appears whole or not at all, ``config.json`` last: a folder without it is unfinished.

    Args:
        folder: Created when absent; other files in it (a tokenizer) stay.
        config: The model.
        state_dict: Full, unsharded parameters by our names.
        dtype: Of the written weights.
        bos_id: First token of every document.
        eos_ids: Tokens that end a generation, for ``generation_config.json``.
        pad_id: Padding token.

    Raises:
        PunaError: The folder holds a checkpoint in several files, which would stay beside this one.
        ValueError: The parameters are not those of the configuration.
    """
    shapes = parameter_shapes(config)
    given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if given != shapes:
        wrong = sorted(set(given.items()) ^ set(shapes.items()))
        raise ValueError(f"parameters do not fit the configuration, first of them: {wrong[0]}")
    if (folder / INDEX_FILE).exists():
        raise PunaError(
            f"{folder} holds a checkpoint in several files ({INDEX_FILE})",
            "choose another folder, or remove the old checkpoint",
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # unfinished until the new one is written
    tensors = {
        hf_name(name): tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, tensor in state_dict.items()
    }
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    special_ids = special_ids_to_hf(bos_id, eos_ids, pad_id)
    write_json(folder / GENERATION_FILE, special_ids)
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, config_to_hf(config, dtype_name, bos_id, eos_ids, pad_id))


def load_hf(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Llama:
    """Load a model; the weights are read tensor by tensor.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors`` or an index with its parts.
        dtype: Of the parameters; that of the file when None.
        device: Where the parameters live.

    Raises:
        PunaError: A file is missing or damaged, or a tensor is missing, surplus, of the wrong shape
            or not a float; the message names it.
    """
    config = read_hf_config(folder)
    model = Llama(config, device="meta")
    state = {
        name: tensor.to(device=device, dtype=dtype, copy=True)
        for name, tensor in iter_hf_tensors(folder, config)
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model


def iter_hf_tensors(
    folder: Path, config: LlamaConfig
) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
    """Yield (our name, tensor) one at a time, after all names, shapes and types were checked.

    For loaders that place the tensors themselves (sharded models). A tensor may be a view of the
    file: copy it before changing it.

    Raises:
        PunaError: As in :func:`load_hf`; before the first tensor is yielded.
    """
    expected = {hf_name(name): (name, shape) for name, shape in parameter_shapes(config).items()}
    places = _locate(folder, config, expected)
    missing = sorted(set(expected) - set(places))
    if missing:
        fix = _RELOAD
        if missing == [_HEAD]:
            fix = f'set "tie_word_embeddings": true in {folder / CONFIG_FILE} if the head is shared'
        raise PunaError(f"{folder}: tensor {missing[0]} is missing{_more(missing)}", fix)
    if config.tie_embeddings and _HEAD in places:
        _check_tied(places)
    for path in dict.fromkeys(places.values()):
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key in expected:
                    yield expected[key][0], file.get_tensor(key)


def _locate(
    folder: Path, config: LlamaConfig, expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, Path]:
    """Return the file of each tensor; every tensor is checked, and one that is not ours refused."""
    places: dict[str, Path] = {}
    surplus: list[str] = []
    for path in _weight_files(folder):
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key in places:
                    raise PunaError(f"tensor {key} is in {places[key]} and in {path}", _RELOAD)
                places[key] = path
                if key in expected:
                    _check_tensor(path, key, file.get_slice(key), expected[key][1])
                elif not (_DERIVED.fullmatch(key) or (key == _HEAD and config.tie_embeddings)):
                    surplus.append(key)
    if surplus:
        raise PunaError(
            f"{places[surplus[0]]}: tensor {surplus[0]} does not belong to this model"
            f"{_more(surplus)}",
            f"check that {CONFIG_FILE} and the weights are of one model",
        )
    return places


def _check_tensor(path: Path, key: str, stored: object, shape: tuple[int, ...]) -> None:
    got = tuple(stored.get_shape())  # type: ignore[attr-defined]
    if got != shape:
        raise PunaError(
            f"{path}: tensor {key} has shape {list(got)}, {CONFIG_FILE} asks for {list(shape)}",
            f"check that {CONFIG_FILE} and the weights are of one model",
        )
    dtype = stored.get_dtype()  # type: ignore[attr-defined]
    if dtype not in _FLOAT_DTYPES:
        raise PunaError(
            f"{path}: tensor {key} is stored as {dtype}, not as one of {', '.join(_FLOAT_DTYPES)}",
            "use a checkpoint that is not quantised",
        )


def _check_tied(places: Mapping[str, Path]) -> None:
    """A tied model may store its head again; it must be the embedding, or it would be ignored."""
    tensors = []
    for key in (_HEAD, _EMBEDDING):
        with _open(places[key]) as file:
            tensors.append(file.get_tensor(key))
    if not torch.equal(*tensors):
        raise PunaError(
            f"{places[_HEAD]}: tensor {_HEAD} differs from {_EMBEDDING}, though {CONFIG_FILE} "
            "ties them",
            f'set "tie_word_embeddings": false in {CONFIG_FILE}',
        )


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise PunaError(
            f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}",
            "point to a folder with safetensors weights",
        )
    weight_map = read_json_object(index, _RELOAD).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise PunaError(f"{index} has no weight_map of file names", _RELOAD)
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise PunaError(f"{index} names {name!r}, which is outside the folder", _RELOAD)
        if not (folder / name).is_file():
            raise PunaError(f"{folder / name} is missing, {INDEX_FILE} names it", _RELOAD)
    return [folder / name for name in names]


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise PunaError(f"{path} is damaged: {error}", _RELOAD) from error


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
