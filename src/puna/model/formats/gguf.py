"""GGUF checkpoints: read with or without quantisation, written as F32, BF16 or Q8_0.

The rows of wq and wk lie interleaved, as in Meta's files (llama.cpp permutes Hugging Face's).

Source: ggml-org/llama.cpp ``gguf-py/gguf/constants.py`` (names), ``docs/gguf.md`` of ggml (keys).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path
from puna.core.gguf import GGML_TYPES, GGUFTensor, GGUFWriter, read_gguf
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import SpecialIds, StoredTable, StoredTensor, tensor_pairs
from puna.model.formats.gguf_config import (
    ARCHITECTURE,
    ROPE_FREQS,
    config_from_gguf,
    config_to_gguf,
    rope_divisors,
    special_ids_from_gguf,
    special_ids_to_gguf,
)
from puna.model.formats.layout import to_interleaved, to_rotate_half
from puna.model.formats.mapped import MappedFile
from puna.model.names import EMBEDDING, HEAD, NORM, parameter_shapes

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

GGUFDtype = Literal["float32", "bfloat16", "Q8_0"]
"""What the matrices are written as; norms are always float32, as llama.cpp writes them."""
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_TYPES: Mapping[GGUFDtype, tuple[str, int]] = {
    "float32": ("F32", 0), "bfloat16": ("BF16", 32), "Q8_0": ("Q8_0", 7),
}  # fmt: skip
"""dtype -> type of the tensors, number of ``general.file_type``."""
_TOP = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
_LAYER = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
_MAX_DIVISORS_BYTES = 1 << 16
_PERMUTED = ("attention.wq.weight", "attention.wk.weight")


def gguf_name(name: str) -> str:
    """Return the name of one of our parameters in GGUF files.

    Raises:
        KeyError: Not a parameter of a Llama.
    """
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


class GGUFCheckpoint:
    """A GGUF file; see :class:`puna.model.formats.checkpoint.Checkpoint`.

    Args:
        path: The file.

    Raises:
        PunaError: The file is damaged, no Llama, or a tensor is missing, surplus, of the wrong
            shape, or in a block format that is not read.
    """

    kind: Literal["gguf"] = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        file = read_gguf(path, skip_arrays=True)
        self._tensors = file.tensors
        self.config: LlamaConfig = config_from_gguf(file, self._divisors())
        self.special_ids: SpecialIds = special_ids_from_gguf(file.metadata)
        self.notes: list[str] = []
        self.stored: dict[str, StoredTensor] = self._check()

    def _divisors(self) -> list[float] | None:
        """Read the one small tensor that belongs to the configuration."""
        entry = self._tensors.get(ROPE_FREQS)
        if entry is None:
            return None
        if entry.type_name != "F32" or entry.n_bytes > _MAX_DIVISORS_BYTES:
            raise PunaError(
                f"{self.path}: tensor {ROPE_FREQS} of shape {list(entry.shape)} is "
                f"{entry.type_name}, not a few values of F32",
                "convert the file again",
            )
        import numpy as np

        with self.path.open("rb") as file:
            file.seek(entry.offset_bytes)
            return np.frombuffer(file.read(entry.n_bytes), "<f4").tolist()

    def _check(self) -> dict[str, StoredTensor]:
        table = StoredTable(self.config, self.path, "the header", gguf_name)
        ours = {gguf_name(name): name for name in parameter_shapes(self.config)}
        surplus = []
        for key, entry in self._tensors.items():
            if key in ours:
                table.found[ours[key]] = self._entry(ours[key], entry)
            elif key != ROPE_FREQS:
                surplus.append(key)
        return table.finish(surplus)

    def _entry(self, name: str, entry: GGUFTensor) -> StoredTensor:
        if entry.type_name not in _PLAIN and entry.type_name not in _QUANTISED:
            raise PunaError(
                f"{self.path}: tensor {entry.name} is stored as {entry.type_name}, which is not "
                "read",
                f"use a file of {', '.join((*_PLAIN, *_QUANTISED))}",
            )
        dtype = _PLAIN.get(entry.type_name, entry.type_name)
        return StoredTensor(name, entry.name, entry.shape, dtype, entry.n_bytes, (self.path,))

    def tensors(
        self, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
        """Yield (our name, tensor) one at a time; quantised ones as float32.

        Raises:
            PunaError: The file ends before a tensor does.
        """
        from puna.model.formats.gguf_blocks import dequantize

        data = MappedFile(self.path)
        for name in self.stored if names is None else names:
            entry = self._tensors[gguf_name(name)]
            plain, head_dim = _PLAIN.get(entry.type_name), self.config.head_dim
            if plain is not None:
                tensor = data.tensor(entry.offset_bytes, plain, entry.shape)
            else:
                tensor = data.raw(entry.offset_bytes, entry.n_bytes).view(entry.shape[0], -1)
            if name.endswith(_PERMUTED):
                tensor = _heads_to_rotate_half(tensor, head_dim)
            if plain is None:
                tensor = dequantize(tensor, entry.type_name)
            yield name, tensor
            del tensor  # or it would live on while the next one is made


def _heads_to_rotate_half(w_RC: Tensor, head_dim: int) -> Tensor:
    """Move the rows of one head after the other: small copies, see ``parts``.

    A quantised matrix is moved while it is packed, as rows of bytes.
    """
    import torch

    out_RC = torch.empty_like(w_RC)
    for head, out in zip(w_RC.split(head_dim), out_RC.split(head_dim), strict=True):
        out.copy_(to_rotate_half(head, head_dim))
    return out_RC


def save_gguf(
    path: Path,
    config: LlamaConfig,
    tensors: Mapping[str, Float[Tensor, "*shape"]] | Iterable[tuple[str, Float[Tensor, "*shape"]]],
    *,
    dtype: GGUFDtype = "float32",
    metadata: Mapping[str, Any] | None = None,
    special_ids: SpecialIds | None = None,
) -> None:
    """Write a file, one tensor at a time; it appears whole or not at all.

    Args:
        path: The file.
        config: The model.
        tensors: Full, unsharded parameters by our names, in the order of the model.
        dtype: Of the matrices.
        metadata: Further key-values: the tokenizer's, a name.
        special_ids: Of the model; what ``metadata`` says about them goes before.

    Raises:
        PunaError: Q8_0 cannot hold a matrix: its rows are no whole blocks, or a value is too large
            or not finite; or there is no room.
        ValueError: The parameters are not those of the configuration, or out of order.
    """
    import torch

    shapes = parameter_shapes(config)
    type_name, file_type = _TYPES[dtype]
    block = GGML_TYPES[type_name][1]
    table = [
        (gguf_name(name), shape, "F32" if len(shape) == 1 else type_name)
        for name, shape in shapes.items()
    ]
    for name, shape, kind in table:
        if kind == type_name and shape[-1] % block:
            raise PunaError(
                f"tensor {name} has rows of {shape[-1]} values, {type_name} blocks have {block}",
                "write it as float32 or bfloat16",
            )
    scaling = config.rope_scaling
    if isinstance(scaling, RopeScaling):
        table.insert(0, (ROPE_FREQS, (config.head_dim // 2,), "F32"))
    values: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **config_to_gguf(config),
        **special_ids_to_gguf(special_ids or SpecialIds(), metadata or {}),
        **(metadata or {}),
    }
    pairs = tensor_pairs(shapes, tensors)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        writer = GGUFWriter(file, values, table)
        if isinstance(scaling, RopeScaling):
            writer.write(torch.tensor(rope_divisors(config, scaling)).numpy())
        order = iter(shapes)  # no zip: it would keep a tensor while the next one is made
        for name, tensor in pairs:
            if name != (expected := next(order)):
                raise ValueError(f"parameter {name} comes where {expected} is expected")
            _write(writer, name, tensor.detach(), type_name, config.head_dim)
            del tensor


def _write(writer: GGUFWriter, name: str, tensor: Tensor, type_name: str, head_dim: int) -> None:
    import torch

    from puna.model.formats.gguf_blocks import quantize_q8_0

    if name.endswith(_PERMUTED):
        tensor = to_interleaved(tensor, head_dim)
    tensor = tensor.cpu()
    if tensor.ndim == 1 or type_name == "F32":
        tensor = tensor.float()
    elif type_name == "BF16":
        tensor = tensor.bfloat16()
    else:
        try:
            tensor = quantize_q8_0(tensor)
        except ValueError as error:
            raise PunaError(
                f"tensor {gguf_name(name)}: {error}", "write it as float32 or bfloat16"
            ) from error
    writer.write(tensor.contiguous().view(torch.uint8).flatten().numpy())
