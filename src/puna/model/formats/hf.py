"""Hugging Face folders: ``config.json`` and ``model.safetensors``, strict in both directions.

A tensor that is missing, surplus or of the wrong shape is an error that names it. Writing is
byte-deterministic: equal weights give equal files.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path, write_json
from puna.model.config import LlamaConfig
from puna.model.formats.checkpoint import SpecialIds, StoredTable, StoredTensor, tensor_pairs
from puna.model.formats.hf_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    config_to_hf,
    read_hf_config,
    read_json_object,
    read_special_ids,
    special_ids_to_hf,
)
from puna.model.formats.mapped import ITEM_BYTES, RELOAD, MappedFile
from puna.model.formats.safetensors_file import (
    DTYPE_NAMES,
    Entry,
    SafetensorsWriter,
    read_table,
)
from puna.model.names import EMBEDDING, HEAD, parameter_shapes

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from puna.model.formats.checkpoint import Tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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
_COMPARE_VALUES = 1 << 24  # of a tied head at once: 64 MiB


def hf_name(name: str) -> str:
    """Return the Hugging Face name of one of our parameters.

    Raises:
        KeyError: Not a parameter of a Llama.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return _TOP_NAMES[name]
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


class HFCheckpoint:
    """A Hugging Face folder; see :class:`puna.model.formats.checkpoint.Checkpoint`.

    Args:
        path: Holds ``config.json`` and ``model.safetensors``, or an index with its parts.

    Raises:
        PunaError: A file is missing or damaged, or a tensor is missing, surplus, of the wrong shape
            or not a float; the message names it.
    """

    kind: Literal["hf"] = "hf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: LlamaConfig = read_hf_config(path)
        self.notes: list[str] = []
        self.special_ids: SpecialIds = read_special_ids(path)
        self._places = _read_tables(path)
        self.stored: dict[str, StoredTensor] = self._check()

    def _check(self) -> dict[str, StoredTensor]:
        table = StoredTable(self.config, self.path, CONFIG_FILE, hf_name)
        ours = {hf_name(name): name for name in (*parameter_shapes(self.config), HEAD)}
        surplus = []
        for key, (file, entry) in self._places.items():
            name = ours.get(key)
            if name == HEAD and self.config.tie_embeddings:
                self.notes.append(f"the head is tied, yet {key} is stored again")
            elif name is not None:
                dtype = DTYPE_NAMES.get(entry.code)
                if dtype is None:
                    raise PunaError(
                        f"{file}: tensor {key} is stored as {entry.code}, not as one of "
                        f"{', '.join(DTYPE_NAMES)}",
                        "use a checkpoint that is not quantised",
                    )
                table.found[name] = StoredTensor(
                    name, key, entry.shape, dtype, entry.n_bytes, (file,)
                )
            elif not _DERIVED.fullmatch(key):
                surplus.append(key)
        wants_head = HEAD in parameter_shapes(self.config)
        if wants_head and set(ours.values()) - set(table.found) == {HEAD}:
            raise PunaError(
                f"{self.path}: tensor {hf_name(HEAD)} is missing",
                f'set "tie_word_embeddings": true in {self.path / CONFIG_FILE} if the head is '
                "shared",
            )
        return table.finish(surplus)

    def tensors(
        self, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
        """Yield (our name, tensor) one at a time, as views of the mapped files.

        Raises:
            PunaError: A tied head is stored again and differs from the embedding.
        """
        wanted = list(self.stored if names is None else names)
        maps: dict[Path, MappedFile] = {}
        if EMBEDDING in wanted and self.config.tie_embeddings and hf_name(HEAD) in self._places:
            self._check_tied(maps)
        for name in wanted:
            yield name, self._tensor(hf_name(name), maps)

    def _tensor(self, key: str, maps: dict[Path, MappedFile]) -> Float[Tensor, "*shape"]:
        file, entry = self._places[key]
        if file not in maps:
            maps[file] = MappedFile(file)
        return maps[file].tensor(entry.offset_bytes, DTYPE_NAMES[entry.code], entry.shape)

    def _check_tied(self, maps: dict[Path, MappedFile]) -> None:
        """The head that a tied model stores again must be the embedding, or it would be ignored."""
        head, embedding = hf_name(HEAD), hf_name(EMBEDDING)
        file, entry = self._places[head]
        same = entry.code in DTYPE_NAMES and entry.shape == self.stored[EMBEDDING].shape
        if same:
            first, second = (self._tensor(key, maps).view(-1) for key in (head, embedding))
            parts = zip(first.split(_COMPARE_VALUES), second.split(_COMPARE_VALUES), strict=True)
            same = all(bool((one == other).all()) for one, other in parts)
        if not same:
            raise PunaError(
                f"{file}: tensor {head} differs from {embedding}, though {CONFIG_FILE} ties them",
                f'set "tie_word_embeddings": false in {self.path / CONFIG_FILE}',
            )


def _read_tables(folder: Path) -> dict[str, tuple[Path, Entry]]:
    places: dict[str, tuple[Path, Entry]] = {}
    for file in _weight_files(folder):
        for key, entry in read_table(file).items():
            if key in places:
                raise PunaError(f"tensor {key} is in {places[key][0]} and in {file}", RELOAD)
            places[key] = (file, entry)
    return places


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise PunaError(
            f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}",
            "its pytorch_model*.bin are pickles, which can run code: get the safetensors of the "
            "same model"
            if pickled
            else "point to a folder with safetensors weights",
        )
    weight_map = read_json_object(index, RELOAD).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise PunaError(f"{index} has no weight_map of file names", RELOAD)
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise PunaError(f"{index} names {name!r}, which is outside the folder", RELOAD)
        if not (folder / name).is_file():
            raise PunaError(f"{folder / name} is missing, {INDEX_FILE} names it", RELOAD)
    return [folder / name for name in names]


def save_hf(
    folder: Path,
    config: LlamaConfig,
    tensors: Tensors,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> None:
    """Write a folder that :class:`HFCheckpoint` and transformers read.

    Each file appears whole or not at all, ``config.json`` last: a folder without it is unfinished.

    Args:
        folder: Created when absent; other files in it (a tokenizer) stay.
        config: The model.
        tensors: Full, unsharded parameters by our names, or pairs, of which one at a time is held.
        dtype: Of the written weights; float32 when None.
        max_shard_bytes: Largest file of weights, or None for one file whatever its size. A tensor
            larger than this has a file of its own.
        bos_id: First token of every document.
        eos_ids: Tokens that end a generation, for ``generation_config.json``.
        pad_id: Padding token.

    Raises:
        PunaError: The folder holds weights under other names, which would stay beside these.
        ValueError: The parameters are not those of the configuration.
    """
    shapes = parameter_shapes(config)
    pairs = tensor_pairs(shapes, tensors)
    dtype_name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    files = _plan_files(shapes, ITEM_BYTES[dtype_name], max_shard_bytes)
    _check_folder(folder, set(files))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # unfinished until the new one is written
    _write_weights(folder, files, shapes, pairs, dtype_name)
    if len(files) > 1:
        n_bytes = sum(map(math.prod, shapes.values())) * ITEM_BYTES[dtype_name]
        write_json(folder / INDEX_FILE, _index(files, n_bytes))
    special_ids = special_ids_to_hf(bos_id, eos_ids, pad_id)
    write_json(folder / GENERATION_FILE, special_ids)
    write_json(folder / CONFIG_FILE, config_to_hf(config, dtype_name, bos_id, eos_ids, pad_id))


def _plan_files(
    shapes: Mapping[str, tuple[int, ...]], item_bytes: int, max_shard_bytes: int | None
) -> dict[str, list[str]]:
    """Return the names in each file, filled one after the other in the order of the model."""
    groups: list[list[str]] = [[]]
    n_bytes = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_bytes
        if groups[-1] and max_shard_bytes is not None and n_bytes + size > max_shard_bytes:
            groups.append([])
            n_bytes = 0
        groups[-1].append(name)
        n_bytes += size
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, 1)
    }


def _check_folder(folder: Path, files: set[str]) -> None:
    kept = {path.name for path in folder.glob("model*.safetensors")} - files
    if (folder / INDEX_FILE).exists() and WEIGHTS_FILE in files:
        kept.add(INDEX_FILE)
    if kept:
        several = "a checkpoint in several files" if INDEX_FILE in kept else "another checkpoint"
        raise PunaError(
            f"{folder} holds {several} ({min(kept)})",
            "choose another folder, or remove the old checkpoint",
        )


def _write_weights(
    folder: Path,
    files: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Float[Tensor, "*shape"]]],
    dtype: str,
) -> None:
    writers: dict[str, SafetensorsWriter] = {}
    with contextlib.ExitStack() as stack:
        for file, names in files.items():
            temporary = stack.enter_context(atomic_path(folder / file))
            theirs = {hf_name(name): shapes[name] for name in names}
            writer = SafetensorsWriter(temporary, theirs, dtype)
            stack.callback(writer.close)
            writers.update(dict.fromkeys(names, writer))
        for name, tensor in tensors:
            writers[name].put(hf_name(name), tensor)
            del tensor  # or it would live on while the next one is made


def _index(files: Mapping[str, list[str]], n_bytes: int) -> dict[str, Any]:
    places = {hf_name(name): file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": n_bytes}, "weight_map": dict(sorted(places.items()))}
