"""What a checkpoint's files hold, from their tables of tensors alone; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.model.accounting import PART_NAMES, part_of
from puna.model.formats.checkpoint import Checkpoint, StoredTensor
from puna.model.names import EMBEDDING

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32

PLAIN = ("float32", "bfloat16", "float16")
"""Types that are stored value by value; everything else is quantised in blocks."""


@dataclass(frozen=True)
class DTypeCount:
    """How much of a checkpoint is stored in one type."""

    dtype: str
    tensors: int
    params: int
    n_bytes: int


@dataclass(frozen=True)
class Stored:
    """The files of a checkpoint.

    Attributes:
        files: Those that hold weights.
        file_bytes: Their sizes together, headers included.
        parts: Bytes of each part of the model as stored.
        dtypes: One entry per stored type, the one with most parameters first.
    """

    files: tuple[Path, ...]
    file_bytes: int
    parts: dict[str, int]
    dtypes: tuple[DTypeCount, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.parts.values())

    @property
    def load_dtype(self) -> str:
        """Type to load into when none is asked for: as most values are stored, if that is plain."""
        most = self.dtypes[0].dtype
        return most if most in PLAIN else "float32"

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {
            "files": [str(file) for file in self.files],
            "file_bytes": self.file_bytes,
            "tensor_bytes": self.n_bytes,
            "dtypes": {
                one.dtype: {"tensors": one.tensors, "params": one.params, "bytes": one.n_bytes}
                for one in self.dtypes
            },
        }


def summarise(stored: Mapping[str, StoredTensor]) -> Stored:
    """Count the tensors of a checkpoint by file, part and type."""
    parts = dict.fromkeys(PART_NAMES, 0)
    dtypes: dict[str, list[StoredTensor]] = {}
    for name, tensor in stored.items():
        parts[part_of(name)] += tensor.n_bytes
        dtypes.setdefault(tensor.dtype, []).append(tensor)
    counts = [
        DTypeCount(dtype, len(ones), sum(t.n_elements for t in ones), sum(t.n_bytes for t in ones))
        for dtype, ones in dtypes.items()
    ]
    counts.sort(key=lambda count: -count.params)
    files = tuple(dict.fromkeys(file for tensor in stored.values() for file in tensor.files))
    n_bytes = sum(file.stat().st_size for file in files)
    return Stored(files, n_bytes, parts, tuple(counts))


@dataclass(frozen=True)
class SpecialRows:
    """Embedding rows of special tokens that nobody trained.

    A model that meets such a token computes with noise or, where all values are zero, with a norm
    of nothing; fine-tuning on a chat format needs these rows initialised first.

    Attributes:
        checked: Rows that were read.
        zero: Ids whose row is all zeros.
        identical: Groups of ids whose rows are equal (and not zero).
    """

    checked: int
    zero: tuple[int, ...]
    identical: tuple[tuple[int, ...], ...]

    @property
    def n_untrained(self) -> int:
        """Rows that are zero or equal to another."""
        return len(self.zero) + sum(map(len, self.identical))

    def to_json(self) -> dict[str, Any]:
        """Return the rows as JSON values."""
        return {
            "checked": self.checked,
            "zero": list(self.zero),
            "identical": [list(group) for group in self.identical],
        }


def look_at_rows(checkpoint: Checkpoint, ids: Sequence[int]) -> SpecialRows:
    """Read the embedding rows of some tokens and find those that are zero or alike.

    Raises:
        PunaError: The file is damaged where they lie.
    """
    rows = embedding_rows(checkpoint, ids)
    zero = [id_ for id_, row in zip(ids, rows, strict=True) if not row.any()]
    groups: dict[bytes, list[int]] = {}
    for id_, row in zip(ids, rows, strict=True):
        groups.setdefault(row.tobytes(), []).append(id_)
    alike = [tuple(group) for group in groups.values() if len(group) > 1 and group[0] not in zero]
    return SpecialRows(len(ids), tuple(zero), tuple(alike))


def embedding_rows(checkpoint: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    """Read single rows of the embedding through a memory map, without torch.

    Float32 values; of a quantised tensor the stored bytes, zero where the values are.

    Args:
        checkpoint: An opened checkpoint of any format.
        ids: Rows, each below the vocabulary's size.

    Raises:
        PunaError: The file is damaged where they lie.
    """
    stored = checkpoint.stored[EMBEDDING]
    try:
        return _READERS[checkpoint.kind](stored, ids, checkpoint.config.dim)
    except (ValueError, OSError) as error:  # numpy's words for a file that ends early
        raise PunaError(
            f"{stored.files[0]}: tensor {stored.stored_name} cannot be read: {error}",
            "download or write the checkpoint again",
        ) from error


def _from_hf(stored: StoredTensor, ids: Sequence[int], dim: int) -> Float32[np.ndarray, "n dim"]:
    from puna.model.formats.safetensors_file import read_table

    file = stored.files[0]
    entry = read_table(file)[stored.stored_name]
    return _widen(_mapped(file, stored.dtype, entry.offset_bytes, stored.shape)[ids], stored.dtype)


def _from_meta(stored: StoredTensor, ids: Sequence[int], dim: int) -> Float32[np.ndarray, "n dim"]:
    import numpy as np

    from puna.model.formats.meta_pth import read_pth

    parts = []
    for file in stored.files:
        piece = read_pth(file)[stored.stored_name]
        if not piece.is_contiguous:
            raise ValueError("its values do not lie one after the other")
        parts.append(_mapped(file, stored.dtype, piece.offset_bytes, piece.shape))
    if parts[0].shape[1] == dim:  # Llama 3: shards above each other, all of one height
        height = parts[0].shape[0]
        rows = np.stack([parts[id_ // height][id_ % height] for id_ in ids])
    else:
        rows = np.concatenate([part[ids] for part in parts], axis=1)
    return _widen(rows, stored.dtype)


_SCALES = {"Q6_K": slice(208, 210)} | {
    name: slice(0, width)
    for width, names in ((2, ("Q4_0", "Q5_0", "Q8_0")), (4, ("Q4_1", "Q5_1", "Q4_K", "Q5_K")))
    for name in names
}
"""Where the scale (and offset) of a GGUF block stands; a block whose scales are zero is zeros."""


def _from_gguf(stored: StoredTensor, ids: Sequence[int], dim: int) -> np.ndarray:
    """Read rows; of a quantised tensor their bytes, which are zero and equal where values are."""
    import numpy as np

    from puna.core.gguf import GGML_TYPES, read_gguf

    file = stored.files[0]
    entry = read_gguf(file, skip_arrays=True).tensors[stored.stored_name]
    if stored.dtype not in _SCALES:
        rows = _mapped(file, stored.dtype, entry.offset_bytes, stored.shape)[ids]
        return _widen(rows, stored.dtype)
    _, block, size = GGML_TYPES[stored.dtype]
    shape = (stored.shape[0], dim // block, size)
    blocks = np.memmap(file, dtype=np.uint8, mode="r", offset=entry.offset_bytes, shape=shape)[ids]
    has_scale = blocks[:, :, _SCALES[stored.dtype]].any(axis=2, keepdims=True)
    return (blocks * has_scale).reshape(len(ids), -1)


_READERS = {"hf": _from_hf, "meta": _from_meta, "gguf": _from_gguf}


def _mapped(file: Path, dtype: str, offset_bytes: int, shape: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
    return np.memmap(file, dtype=kind, mode="r", offset=offset_bytes, shape=shape)


def _widen(rows: np.ndarray, dtype: str) -> Float32[np.ndarray, "n dim"]:
    import numpy as np

    if dtype == "bfloat16":  # the upper half of a float32
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)
