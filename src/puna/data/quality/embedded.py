"""Classifiers that are a linear head over features: of an embedder, of the words' form, or both.

The folder of such a classifier is complete: it holds the embedder, so it can be copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.core.errors import PunaError
from puna.data.kernels.buffers import Texts
from puna.data.quality.heads import Head, read_head
from puna.data.quality.lexical import lexical_features
from puna.data.semantic.passages import Passages

if TYPE_CHECKING:
    from puna.data.semantic.embedder import Embedder

EMBEDDER_DIR = "embedder"
_BATCH = 512
"""Texts whose passages are in memory at once."""


@dataclass(frozen=True)
class Features:
    """Turns texts into features.

    Attributes:
        embedder: Gives the embedding; None: no embedding.
        lexical: Append :data:`puna.data.quality.lexical.FEATURES`.
        max_bytes: Bytes of a text that are looked at.
    """

    embedder: Embedder | None
    lexical: bool
    max_bytes: int

    def __call__(self, texts: Texts) -> np.ndarray:
        """Return the features: float32 [n_texts, n_features]."""
        parts = [np.zeros((len(texts), 0), np.float32)]
        if self.embedder is not None:
            parts.append(self._embeddings(texts))
        if self.lexical:
            parts.append(lexical_features(texts, self.max_bytes))
        return np.concatenate(parts, axis=1)

    def _embeddings(self, texts: Texts) -> np.ndarray:
        assert self.embedder is not None
        out = np.zeros((len(texts), self.embedder.model.dim), np.float32)
        for start in range(0, len(texts), _BATCH):
            rows = range(start, min(start + _BATCH, len(texts)))
            strings = [
                bytes(texts.bytes_of(k)[: self.max_bytes]).decode("utf-8", "ignore") for k in rows
            ]
            out[start : start + len(rows)] = self.embedder.embed(strings)
        return out


@dataclass(frozen=True)
class HeadModel:
    """A head over features; see :class:`puna.data.quality.classifier.Scorer`."""

    features: Features
    head: Head

    def raw(self, texts: Texts) -> np.ndarray:
        """Return the outputs of the head: float64 [n_texts, n_outputs]."""
        return self.head(self.features(texts))


def load_head_model(path: Path, parameters: Mapping[str, Any]) -> HeadModel:
    """Load a classifier from its head's file and the parameters of ``classifier.json``.

    Raises:
        PunaError: A file is missing, damaged, or not the one that was trained.
    """
    from puna.data.semantic.embedder import digest_of, load_embedder

    embedder = None
    if parameters["embedder"] is not None:
        folder = path.parent / EMBEDDER_DIR
        if digest_of(folder) != parameters["embedder"]:
            raise PunaError(f"{folder} is not the embedder that the classifier was trained with",
                            "copy the whole folder of the classifier anew")  # fmt: skip
        passages = Passages(parameters["passage_tokens"], parameters["passages"])
        embedder = load_embedder(folder, passages)
    features = Features(embedder, parameters["lexical"], parameters["max_bytes"])
    head = read_head(path)
    n_features = features_width(features)
    if head.weights.shape[1] != n_features:
        raise PunaError(f"{path}: a head for {head.weights.shape[1]} features, not {n_features}",
                        "train the classifier anew")  # fmt: skip
    return HeadModel(features, head)


def features_width(features: Features) -> int:
    """Return the number of features."""
    from puna.data.quality.lexical import FEATURES

    width = 0 if features.embedder is None else features.embedder.model.dim
    return width + len(FEATURES) * features.lexical
