"""Writing Meta's layout: ``params.json`` and any number of ``consolidated.*.pth`` shards.

The files are what ``torch.save`` writes (a zip archive with a pickled table), but made tensor by
tensor: a model is never held as a whole, whatever the number of shards. Equal weights give equal
files.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path, write_json
from puna.model.config import LlamaConfig
from puna.model.formats.checkpoint import tensor_pairs
from puna.model.formats.layout import to_interleaved
from puna.model.formats.meta_params import LLAMA2_THETA, PARAMS_FILE, params_of
from puna.model.formats.meta_pth import STORAGE_DTYPES
from puna.model.formats.meta_shards import axis_of, shard_name
from puna.model.formats.safetensors_file import tensor_bytes
from puna.model.names import EMBEDDING, HEAD, parameter_shapes

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from puna.model.formats.checkpoint import Tensors

_ALIGN_BYTES = 64
_ROOT = "consolidated"  # of the entries in the archive
_LOCAL_BYTES, _ZIP64_BYTES, _FIELD_BYTES, _PADDING_ID = 30, 20, 4, 0x4246
_STORAGES = {dtype: storage for storage, dtype in STORAGE_DTYPES.items()}


@dataclass(frozen=True)
class Cut:
    """How a matrix is cut into shards.

    Attributes:
        axis: Along it; None when every shard gets the whole.
        shape: Of one shard's piece.
        copies: So many neighbouring shards get the same piece.
    """

    axis: int | None
    shape: tuple[int, ...]
    copies: int = 1

    def piece(self, tensor: Float[Tensor, "*whole"], shard: int) -> Float[Tensor, "*part"]:
        """Return the view that a shard gets."""
        if self.axis is None:
            return tensor
        size = self.shape[self.axis]
        return tensor.narrow(self.axis, shard // self.copies * size, size)


def save_meta(
    folder: Path,
    config: LlamaConfig,
    tensors: Tensors,
    *,
    n_shards: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder that :class:`MetaCheckpoint` and Meta's own code read.

    Each file appears whole or not at all, ``params.json`` last: a folder without it is unfinished.
    A tied head is written as ``output.weight`` too, as Meta's code expects.

    Args:
        folder: Created when absent; other files in it (a tokenizer) stay.
        config: The model.
        tensors: Full, unsharded parameters by our names, or pairs, of which one at a time is held.
        n_shards: Number of model-parallel shards.
        dtype: Of the written weights; bfloat16, the published one, when None.

    Raises:
        PunaError: The model cannot be cut into so many shards, or the folder holds shards of
            another checkpoint.
        ValueError: The parameters are not those of the configuration.
    """
    shapes = parameter_shapes(config)
    cuts = plan_cuts(config, n_shards)
    pairs = tensor_pairs(shapes, tensors)
    dtype_name = "bfloat16" if dtype is None else str(dtype).removeprefix("torch.")
    names = [shard_name(number) for number in range(n_shards)]
    kept = {path.name for path in folder.glob("consolidated*.pth")} - set(names)
    if kept:
        raise PunaError(
            f"{folder} holds shards of another checkpoint ({min(kept)})",
            "choose another folder, or remove the old checkpoint",
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PARAMS_FILE).unlink(missing_ok=True)  # unfinished until the new one is written
    with contextlib.ExitStack() as stack:
        writers = []
        for name in names:
            temporary = stack.enter_context(atomic_path(folder / name))
            writer = _ShardWriter(temporary, cuts, dtype_name, shares=_shares_head(config, cuts))
            stack.callback(writer.close)
            writers.append(writer)
        for name, tensor in pairs:
            if name.endswith(("wq.weight", "wk.weight")):
                tensor = to_interleaved(tensor, config.head_dim)  # noqa: PLW2901
            _put(writers, cuts, name, tensor)
            if name == EMBEDDING and config.tie_embeddings and not _shares_head(config, cuts):
                _put(writers, cuts, HEAD, tensor)
            del tensor  # or it would live on while the next one is made
        for writer in writers:
            writer.finish()
    write_json(folder / PARAMS_FILE, params_of(config))


def _put(
    writers: list[_ShardWriter], cuts: Mapping[str, Cut], name: str, tensor: Float[Tensor, "*shape"]
) -> None:
    for number, writer in enumerate(writers):
        writer.put(name, cuts[name].piece(tensor, number))


def _shares_head(config: LlamaConfig, cuts: Mapping[str, Cut]) -> bool:
    """Whether the tied head and the embedding are one storage in each shard."""
    return config.tie_embeddings and cuts[HEAD] == cuts[EMBEDDING]


def plan_cuts(config: LlamaConfig, n_shards: int) -> dict[str, Cut]:
    """Return how each stored tensor is cut, the head of a tied model included.

    The embedding is cut by columns for Llama 2 (whose code has a constant RoPE base, by which it is
    recognised here) and by rows for Llama 3. With fewer key/value heads than shards, several shards
    hold the same head.

    Args:
        config: The model.
        n_shards: Number of shards.

    Raises:
        PunaError: A dimension does not divide.
    """
    c = config
    columns = c.rope_theta == LLAMA2_THETA and n_shards > 1
    copies = max(n_shards // c.n_kv_heads, 1)
    divided = {
        "n_heads": c.n_heads, "ffn_dim": c.ffn_dim, "vocab_size": c.vocab_size,
        "n_kv_heads": c.n_kv_heads * copies,
    }  # fmt: skip
    for what, size in divided.items():
        if n_shards < 1 or size % n_shards:
            raise PunaError(
                f"a model with {what} = {getattr(c, what)} cannot be cut into {n_shards} shards",
                "choose a number of shards that divides the heads, the feed-forward width and the "
                "vocabulary",
            )
    cuts = {}
    for name, shape in {**parameter_shapes(c), HEAD: (c.vocab_size, c.dim)}.items():
        if len(shape) == 1:
            cuts[name] = Cut(None, shape)
            continue
        axis = int(columns) if name == EMBEDDING else axis_of(name)
        own = copies if name.endswith(("wk.weight", "wv.weight")) else 1
        sizes = [size * own // n_shards if at == axis else size for at, size in enumerate(shape)]
        cuts[name] = Cut(axis, tuple(sizes), own)
    return cuts


class _ShardWriter:
    """One ``.pth`` file, written entry by entry: the table first, then each tensor's values."""

    def __init__(self, path: Path, cuts: Mapping[str, Cut], dtype: str, *, shares: bool) -> None:
        self._dtype = dtype
        self._keys = {name: str(number) for number, name in enumerate(cuts)}
        if shares:
            self._keys[HEAD] = self._keys[EMBEDDING]
        self._waiting = set(self._keys.values())
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        shapes = {name: cut.shape for name, cut in cuts.items()}
        self._write("data.pkl", _table(shapes, self._keys, dtype))
        self._write("byteorder", b"little")
        self._write("version", b"3\n")

    def put(self, name: str, tensor: Float[Tensor, "*shape"]) -> None:
        """Write the values of one tensor."""
        self._waiting.remove(self._keys[name])
        self._write(f"data/{self._keys[name]}", tensor_bytes(tensor, self._dtype))

    def finish(self) -> None:
        """Complete the archive."""
        if self._waiting:
            raise ValueError(f"{len(self._waiting)} tensors were not written")
        self._archive.close()

    def close(self) -> None:
        """Close the file, also when it is not complete."""
        with contextlib.suppress(ValueError, OSError):  # the error that led here is the one to see
            self._archive.close()

    def _write(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{_ROOT}/{name}")  # its date is fixed: equal weights, equal bytes
        start = self._archive.fp.tell() if self._archive.fp else 0
        start += _LOCAL_BYTES + len(info.filename) + _ZIP64_BYTES + _FIELD_BYTES
        n_padding = -start % _ALIGN_BYTES  # so that a mapped tensor is aligned
        info.extra = _field(n_padding)
        with self._archive.open(info, "w", force_zip64=True) as file:
            file.write(data)


def _field(n_bytes: int) -> bytes:
    return _PADDING_ID.to_bytes(2, "little") + n_bytes.to_bytes(2, "little") + bytes(n_bytes)


def _table(shapes: Mapping[str, tuple[int, ...]], keys: Mapping[str, str], dtype: str) -> bytes:
    """Pickle the dictionary of tensors as ``torch.load`` expects it, with storages by number."""
    import torch
    from torch._utils import _rebuild_tensor_v2

    storage = getattr(torch, _STORAGES[dtype])

    class _Storage:
        def __init__(self, key: str, n_values: int) -> None:
            self.persistent_id = ("storage", storage, key, "cpu", n_values)

    class _Tensor:
        def __init__(self, key: str, shape: tuple[int, ...]) -> None:
            self._key, self._shape = key, shape

        def __reduce__(self) -> tuple[Any, ...]:
            strides = [math.prod(self._shape[at + 1 :]) for at in range(len(self._shape))]
            where = _Storage(self._key, math.prod(self._shape))
            return _rebuild_tensor_v2, (
                where, 0, self._shape, tuple(strides), False, OrderedDict(),
            )  # fmt: skip

    class _Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.persistent_id if isinstance(obj, _Storage) else None

    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(
        {name: _Tensor(keys[name], shape) for name, shape in shapes.items()}
    )
    return buffer.getvalue()
