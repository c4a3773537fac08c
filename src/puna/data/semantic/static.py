"""Static embeddings: the mean of the vectors of a text's tokens; no torch.

The folder is that of model2vec (Tulkens & van Dongen 2024), so its models serve here, and ours
there: `model.safetensors` with `embeddings` [n_rows, dim] and, optionally, `weights` [n_tokens] and
`mapping` (row of each token), beside `tokenizer.json` and `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from puna.core.errors import PunaError
from puna.data.kernels.buffers import Array, fixed, kernel
from puna.data.semantic.passages import open_tokenizer, unit_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TABLE = "embeddings"


@dataclass(frozen=True)
class StaticEmbedder:
    """A loaded table of vectors.

    Attributes:
        tokenizer: Gives the rows of the table.
        table: Vectors of the tokens times their weights, float32 [n_tokens, dim]; zeros for tokens
            that do not count.
    """

    tokenizer: Tokenizer
    table: np.ndarray

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.table.shape[1]

    def embed(self, passages: list[list[int]]) -> np.ndarray:
        """Return the embeddings of passages, of unit length: float32 [n, dim].

        Args:
            passages: Token ids without special tokens.
        """
        offsets = np.zeros(len(passages) + 1, np.int64)
        np.cumsum([len(ids) for ids in passages], out=offsets[1:])
        flat = np.fromiter((i for ids in passages for i in ids), np.int64, offsets[-1])
        return unit_rows(_sums(fixed(flat), fixed(offsets), fixed(self.table)))


@kernel
def _sums(ids: Array, offsets: Array, table: Array) -> Array:
    n, dim = len(offsets) - 1, table.shape[1]
    sums = np.zeros((n, dim), np.float32)
    for p in range(n):
        for t in range(offsets[p], offsets[p + 1]):
            row = ids[t]
            for d in range(dim):
                sums[p, d] += table[row, d]
    return sums


def is_static(folder: Path) -> bool:
    """Tell whether a folder holds a table of vectors rather than an encoder."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS_FILE, "numpy") as file:
            return TABLE in file.keys()  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return False


def load_static(folder: Path) -> StaticEmbedder:
    """Load a static embedder.

    Raises:
        PunaError: A file is missing or damaged, or table and tokenizer do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
        table = tensors[TABLE].astype(np.float32)
    except (OSError, SafetensorError, KeyError) as error:
        raise PunaError(
            f"{path}: no table of vectors ({error})",
            "make the embedder anew with `puna data embedder distil`",
        ) from error
    tokenizer = open_tokenizer(folder)
    if "mapping" in tensors:
        table = table[tensors["mapping"].astype(np.int64)]
    if "weights" in tensors:
        table = table * tensors["weights"].astype(np.float32)[:, None]
    n_tokens = tokenizer.get_vocab_size()
    if table.ndim != 2 or len(table) != n_tokens or not np.isfinite(table).all():
        raise PunaError(
            f"{path}: a table of shape {table.shape} for {n_tokens} tokens, or not finite",
            "make the embedder anew with `puna data embedder distil`",
        )
    unknown = tokenizer.token_to_id("[UNK]")
    if unknown is not None:
        table[unknown] = 0
    return StaticEmbedder(tokenizer, fixed(table))
