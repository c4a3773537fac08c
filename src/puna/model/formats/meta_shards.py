"""The shards of a Meta checkpoint: which files, what each holds, and how they become one tensor.

Model parallelism cuts matrices: by rows (wq, wk, wv, w1, w3, output) or by columns (wo, w2); norms
are in every shard. The embedding is cut by columns in Llama 2 and by rows in Llama 3; its shapes
tell which, since only one of the two gives a whole matrix. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.core.errors import PunaError
from puna.model.formats.checkpoint import more
from puna.model.formats.mapped import ITEM_BYTES, RELOAD
from puna.model.formats.meta_pth import STORAGE_DTYPES, Piece, read_pth
from puna.model.names import EMBEDDING, HEAD

if TYPE_CHECKING:
    from numpy.typing import NDArray

AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
"""Dimension along which the shards of a matrix follow each other."""
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_DERIVED = "rope.freqs"  # a buffer in old files
_COMPARE_ROWS = 4096
_COMPARE_FIRST_ROWS = 16


def axis_of(name: str) -> int:
    """Return the dimension along which a matrix other than the embedding is cut.

    Raises:
        KeyError: A norm, which is not cut, the embedding, or no parameter of a Llama.
    """
    return AXES[name.rsplit(".", 2)[-2]]


def shard_name(number: int) -> str:
    """Return the file name of a shard, counted from 0."""
    return f"consolidated.{number:02d}.pth"


@dataclass(frozen=True)
class Merge:
    """How the pieces of one parameter become a whole.

    Attributes:
        axis: They follow each other along it; None when every shard holds the whole.
        shape: Of the whole.
        copies: Each part of the whole is in this many shards (K and V with fewer heads than
            shards).
    """

    axis: int | None
    shape: tuple[int, ...]
    copies: int = 1


class Shards:
    """The opened shards of a folder.

    Args:
        folder: Holds ``consolidated.*.pth``.

    Raises:
        PunaError: A shard is missing or damaged, or the shards do not hold the same names in the
            same types.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _shard_files(folder)
        self.tables = [read_pth(file) for file in self.files]
        for table in self.tables:
            table.pop(_DERIVED, None)
        for file, table in zip(self.files, self.tables, strict=True):
            different = sorted(set(table) ^ set(self.tables[0]))
            if different:
                raise PunaError(
                    f"{file} and {self.files[0].name} do not hold the same tensors: "
                    f"{different[0]}{more(different)}",
                    RELOAD,
                )
            for name, piece in table.items():
                if piece.dtype is None or piece.dtype != self.dtype(name):
                    raise PunaError(
                        f"{file}: tensor {name} is stored as {piece.storage}, not as "
                        f"{self.tables[0][name].storage if piece.dtype else self._dtypes()}",
                        "use a checkpoint that is not quantised, all shards of one type",
                    )

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.tables[0]

    @property
    def names(self) -> list[str]:
        """What the shards hold."""
        return list(self.tables[0])

    def pieces(self, name: str) -> list[Piece]:
        """Return the piece of each shard.

        Raises:
            PunaError: There is no such tensor.
        """
        if name not in self:
            raise PunaError(f"{self.folder}: tensor {name} is missing", RELOAD)
        return [table[name] for table in self.tables]

    def dtype(self, name: str) -> str | None:
        """Return the type of a tensor, None when weights are not stored like that."""
        return self.tables[0][name].dtype

    def rows(self, name: str) -> int:
        """Return the rows of a matrix in all shards together.

        Raises:
            PunaError: There is no such tensor, or it is no matrix.
        """
        pieces = self.pieces(name)
        for file, piece in zip(self.files, pieces, strict=True):
            if len(piece.shape) != 2:
                raise PunaError(
                    f"{file}: tensor {name} has shape {list(piece.shape)}, not two dimensions",
                    RELOAD,
                )
        return sum(piece.shape[0] for piece in pieces)

    def merge(self, name: str, axis: int | None) -> Merge:
        """Return how the pieces fit along an axis, or as copies of each other when it is None.

        Raises:
            PunaError: They do not fit.
        """
        pieces = self.pieces(name)
        first = pieces[0].shape
        for file, piece in zip(self.files, pieces, strict=True):
            if piece.shape != first:  # shards are cut evenly
                raise PunaError(
                    f"{file}: tensor {name} has shape {list(piece.shape)}, in "
                    f"{self.files[0].name} it has {list(first)}",
                    "check that the shards are of one checkpoint",
                )
        if axis is None or axis >= len(first):
            return Merge(None, first)
        shape = tuple(size * len(self) if at == axis else size for at, size in enumerate(first))
        return Merge(axis, shape)

    def merge_embedding(self, dim: int, vocab_size: int | None = None) -> Merge:
        """Return how the pieces of the embedding fit, from their shapes.

        Args:
            dim: Columns of the whole.
            vocab_size: Rows of the whole when they are known.

        Raises:
            PunaError: Neither way gives a matrix of these sizes.
        """
        self.rows(EMBEDDING)
        for axis in (0, 1):
            merge = self.merge(EMBEDDING, axis)
            if merge.shape[1] == dim and vocab_size in (None, merge.shape[0]):
                return merge
        shape = self.pieces(EMBEDDING)[0].shape
        raise PunaError(
            f"{self.files[0]}: {len(self)} shards of {EMBEDDING} of shape {list(shape)} give no "
            f"matrix of {'' if vocab_size is None else f'{vocab_size} rows and '}{dim} columns, "
            "neither above each other (Llama 3) nor beside each other (Llama 2)",
            "check that params.json and all shards are of one model; a missing shard also gives "
            "this",
        )

    def head_is_embedding(self, merge: Merge) -> bool:
        """Tell whether the output head holds the same values as the embedding.

        A few rows are compared first, and all of them only when these are equal.

        Args:
            merge: Of the embedding.
        """
        heads, embeddings = self.pieces(HEAD), self.pieces(EMBEDDING)
        pieces = [*heads, *embeddings]
        if self.dtype(HEAD) != self.dtype(EMBEDDING) or self.merge(HEAD, 0).shape != merge.shape:
            return False
        if merge.axis == 0 and heads == embeddings:  # one storage under two names
            return True
        if not all(piece.is_contiguous and piece.n_bytes for piece in pieces):
            return False
        return all(bool((head == row).all()) for head, row in self._both(merge))

    def _both(self, merge: Merge) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        heads = [self._values(at, HEAD) for at in range(len(self))]
        embeddings = [self._values(at, EMBEDDING) for at in range(len(self))]
        n_rows = merge.shape[0]
        n_head_rows, n_rows_each = heads[0].shape[0], embeddings[0].shape[0]
        # The last rows are special tokens: there a head that was trained apart differs first.
        spans = [(max(n_rows - _COMPARE_FIRST_ROWS, 0), n_rows)]
        spans += [(at, min(at + _COMPARE_ROWS, n_rows)) for at in range(0, n_rows, _COMPARE_ROWS)]
        for start, stop in spans:
            rows = np.arange(start, stop)
            head = _rows(heads, rows, n_head_rows)
            if merge.axis == 0:
                yield head, _rows(embeddings, rows, n_rows_each)
            else:
                yield head, np.concatenate([part[start:stop] for part in embeddings], axis=1)

    def _values(self, shard: int, name: str) -> NDArray[Any]:
        piece = self.tables[shard][name]
        kind = np.uint32 if ITEM_BYTES[str(piece.dtype)] == 4 else np.uint16
        return np.memmap(
            self.files[shard], dtype=kind, mode="r", offset=piece.offset_bytes, shape=piece.shape
        )

    def _dtypes(self) -> str:
        return f"one of {', '.join(STORAGE_DTYPES)}"


def _rows(parts: list[NDArray[Any]], rows: NDArray[Any], n_rows_each: int) -> NDArray[Any]:
    """Return rows of the matrix whose parts stand above each other; ``rows`` are consecutive."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    pieces = []
    for number, part in enumerate(parts):
        first = number * n_rows_each
        piece = part[max(start - first, 0) : max(stop - first, 0)]
        if len(piece):
            pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _shard_files(folder: Path) -> list[Path]:
    found = {}
    for path in folder.glob("consolidated*.pth"):
        match = _SHARD.fullmatch(path.name)
        number = 0 if path.name == "consolidated.pth" else int(match[1]) if match else None
        if number is None or number in found:
            raise PunaError(
                f"{path} is no shard of this checkpoint by its name",
                f"name the shards {shard_name(0)}, {shard_name(1)}, ...",
            )
        found[number] = path
    missing = [number for number in range(max(found, default=0) + 1) if number not in found]
    if missing:
        raise PunaError(
            f"{folder / shard_name(missing[0])} is missing",
            "download all shards of the checkpoint (consolidated.*.pth)",
        )
    return [found[number] for number in sorted(found)]
