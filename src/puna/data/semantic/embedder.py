"""Embedders: a folder on disk that turns texts into vectors, static or an encoder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from puna.core.errors import PunaError
from puna.core.fsio import hash_file, hash_json
from puna.data.semantic.passages import TOKENIZER_FILE, Passages, mean_per_text
from puna.data.semantic.static import WEIGHTS_FILE, is_static, load_static

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILES = (TOKENIZER_FILE, "config.json", "modules.json", "sentence_bert_config.json",
          "1_Pooling/config.json")  # fmt: skip
HOW_TO_MAKE = (
    "make one with `puna data embedder distil MODEL_FOLDER OUT`, or name the folder of a "
    "sentence-transformers model (config.json, model.safetensors, tokenizer.json)"
)


class Model(Protocol):
    """What turns passages into vectors."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Makes token ids of texts."""
        ...

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        ...

    def embed(self, passages: list[list[int]]) -> np.ndarray:
        """Return the embeddings of passages, of unit length: float32 [n, dim]."""
        ...


@dataclass(frozen=True)
class Embedder:
    """An opened embedder.

    Attributes:
        model: Gives the vectors.
        passages: How texts are cut.
        special: Whether passages get special tokens (an encoder's do).
    """

    model: Model
    passages: Passages
    special: bool

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return the embeddings of texts, of unit length: float32 [n, dim].

        A text is the mean of its passages; one without tokens gets zeros.
        """
        ids, owners = self.passages.cut(self.model.tokenizer, texts, special=self.special)
        if not ids:
            return np.zeros((len(texts), self.model.dim), np.float32)
        return mean_per_text(self.model.embed(ids), owners, len(texts))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model.

    Raises:
        PunaError: There is none.
    """
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not found:
        raise PunaError(f"{folder} holds no embedder ({WEIGHTS_FILE} is missing)", HOW_TO_MAKE)
    return found


def digest_of(folder: Path) -> str:
    """Return the digest of all that an embedding depends on, without loading the model.

    Raises:
        PunaError: The folder holds no embedder.
    """
    files = [*weight_files(folder), *(folder / name for name in _FILES)]
    return hash_json(
        {path.relative_to(folder).as_posix(): hash_file(path) for path in files if path.is_file()}
    )


def copy_settings(folder: Path, out: Path) -> None:
    """Copy what an embedder needs beside its weights; files that are there already stay."""
    for name in _FILES:
        if (folder / name).is_file() and not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)


def copy_embedder(folder: Path, out: Path) -> None:
    """Copy an embedder to a new folder.

    Raises:
        PunaError: There is none.
    """
    for path in weight_files(folder):
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / path.name)
    copy_settings(folder, out)


def load_embedder(
    folder: Path, passages: Passages, device: str = "auto", n_threads: int = 1
) -> Embedder:
    """Load a static embedder or an encoder.

    Args:
        folder: Its folder.
        passages: How texts are cut; an encoder's own limit is observed, too.
        device: Where an encoder runs.
        n_threads: Threads of an encoder on a CPU; 0: as many as torch likes.

    Raises:
        PunaError: Missing or damaged, or of a kind that is not known.
    """
    weight_files(folder)
    if is_static(folder):
        return Embedder(load_static(folder), passages, special=False)
    from puna.data.semantic.encoder import load_encoder

    encoder = load_encoder(folder, device, n_threads)
    fitting = Passages(min(passages.n_tokens, encoder.max_tokens), passages.n_passages)
    return Embedder(encoder, fitting, special=True)


@lru_cache(maxsize=1)
def cached_embedder(folder: str, digest: str, passages: Passages, device: str) -> Embedder:
    """Return the embedder of a process, loaded once; ``digest`` tells changed ones apart."""
    return load_embedder(Path(folder), passages, device)
