"""Fitting the model of a classifier: by its kind, to labels, shares of labels, or scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from puna.core.errors import PunaError
from puna.data.kernels.buffers import texts_from
from puna.data.quality.classifier import Task
from puna.data.quality.embedded import EMBEDDER_DIR, Features
from puna.data.quality.fasttext_train import train_fasttext
from puna.data.quality.heads import Head, fit_ridge, fit_softmax
from puna.data.quality.ngram import save_ngram, train_ngram
from puna.data.quality.prepare import prepare
from puna.data.quality.settings import TrainConfig
from puna.data.semantic.embedder import Embedder, copy_embedder, digest_of, load_embedder
from puna.data.semantic.passages import Passages
from puna.data.semantic.static import is_static


@dataclass(frozen=True)
class Lesson:
    """What a model learns.

    Attributes:
        texts: The texts, in the order of their hashes.
        task: What the model is to give.
        labels: Names of the labels, or the grades.
        shares: Share of each label in each text, float64 [n, n_labels], rows adding up to 1.
        scores: The scores (task ``score``), float64 [n].
        weights: How much each text counts, float64 [n].
    """

    texts: list[str]
    task: Task
    labels: tuple[str, ...]
    shares: np.ndarray
    scores: np.ndarray
    weights: np.ndarray

    def behind(self, n: int) -> Lesson:
        """Return the lesson without the first texts."""
        return replace(
            self, texts=self.texts[n:], shares=self.shares[n:], scores=self.scores[n:],
            weights=self.weights[n:],
        )  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """A fitted model.

    Attributes:
        content: Of the model's file.
        parameters: What its use needs.
        record: How training went: losses and choices.
    """

    content: bytes
    parameters: dict[str, Any]
    record: dict[str, Any]


def grade_shares(scores: np.ndarray, labels: tuple[str, ...]) -> np.ndarray:
    """Divide each score between the two grades that it lies between: float64 [n, n_labels].

    The expected grade of a text is then its score.
    """
    grades = np.array([float(label) for label in labels])
    inside = np.clip(scores, grades[0], grades[-1])
    upper = np.clip(np.searchsorted(grades, inside), 1, max(len(grades) - 1, 1))
    shares = np.zeros((len(scores), len(grades)))
    if len(grades) == 1:
        shares[:] = 1
        return shares
    part = (inside - grades[upper - 1]) / (grades[upper] - grades[upper - 1])
    rows = np.arange(len(scores))
    shares[rows, upper - 1] = 1 - part
    shares[rows, upper] = part
    return shares


def fit_model(cfg: TrainConfig, lesson: Lesson, folder: Path) -> Fitted:
    """Fit the model of the kind that the configuration names.

    Args:
        cfg: The configuration.
        lesson: What to learn.
        folder: Of the classifier; gets what the model needs beside its file.

    Raises:
        PunaError: The embedder cannot be used, or there is nothing to learn from.
    """
    fits: dict[str, Callable[[TrainConfig, Lesson, Path], Fitted]] = {
        "fasttext": _fasttext, "ngram": _ngram, "lexical": _lexical, "embedding": _embedding,
        "transformer": _transformer,
    }  # fmt: skip
    return fits[cfg.kind](cfg, lesson, folder)


def _ngram(cfg: TrainConfig, lesson: Lesson, folder: Path) -> Fitted:
    texts = [text for text, share in zip(lesson.texts, lesson.shares[:, 1], strict=True)
             if share >= 0.5]  # fmt: skip
    model = train_ngram(texts_from(texts), order=cfg.order, max_bytes=cfg.max_bytes)
    return Fitted(save_ngram(model), {"max_bytes": cfg.max_bytes, "order": cfg.order}, {})


def _fasttext(cfg: TrainConfig, lesson: Lesson, folder: Path) -> Fitted:
    lines = prepare(texts_from(lesson.texts), cfg.preparation, cfg.max_bytes)
    content, losses = train_fasttext(
        lines, lesson.shares, lesson.labels, dim=cfg.dim, epochs=cfg.epochs, lr=cfg.lr,
        word_ngrams=cfg.word_ngrams, min_count=cfg.min_count, n_buckets=cfg.n_buckets,
        seed=cfg.seed, weights=lesson.weights,
    )  # fmt: skip
    parameters = {"preparation": cfg.preparation, "max_bytes": cfg.max_bytes}
    return Fitted(content, parameters, {"losses": losses})


def _lexical(cfg: TrainConfig, lesson: Lesson, folder: Path) -> Fitted:
    features = Features(None, lexical=True, max_bytes=cfg.max_bytes)
    head, penalty = _head(features, lesson)
    return Fitted(head.to_bytes(), _parameters(cfg, features, None), {"penalty": penalty})


def _embedding(cfg: TrainConfig, lesson: Lesson, folder: Path) -> Fitted:
    embedder = _open(cfg)
    features = Features(embedder, cfg.lexical, cfg.max_bytes)
    head, penalty = _head(features, lesson)
    copy_embedder(Path(cfg.embedder), folder / EMBEDDER_DIR)
    parameters = _parameters(cfg, features, digest_of(folder / EMBEDDER_DIR))
    return Fitted(head.to_bytes(), parameters, {"penalty": penalty})


def _transformer(cfg: TrainConfig, lesson: Lesson, folder: Path) -> Fitted:
    from puna.data.quality.transformer import Tuning, finetune, settings_of

    if is_static(Path(cfg.embedder)):
        raise PunaError(f"{cfg.embedder} is a static embedder, which is not fine-tuned",
                        "give the folder of an encoder, or kind=embedding")  # fmt: skip
    embedder = _open(cfg)
    features = Features(embedder, lexical=False, max_bytes=cfg.max_bytes)
    n_held = max(len(lesson.texts) // 10, 1)
    # a head that had seen the held-out texts would look better there than any fine-tuning
    head, penalty = _head(features, lesson.behind(n_held))
    targets = lesson.scores[:, None] if lesson.task == "score" else lesson.shares
    raw = [text.encode()[: cfg.max_bytes].decode("utf-8", "ignore") for text in lesson.texts]
    tuning = Tuning(raw, targets, lesson.weights, n_held)
    tuned, record = finetune(
        Path(cfg.embedder), folder / EMBEDDER_DIR, tuning, head, _cut(cfg), settings_of(cfg)
    )
    parameters = _parameters(cfg, features, digest_of(folder / EMBEDDER_DIR))
    return Fitted(tuned.to_bytes(), parameters, {"penalty": penalty, **record})


def _cut(cfg: TrainConfig) -> Passages:
    return Passages(cfg.passage_tokens, cfg.passages)


def _open(cfg: TrainConfig) -> Embedder:
    return load_embedder(Path(cfg.embedder), _cut(cfg), cfg.device, n_threads=0)


def _head(features: Features, lesson: Lesson) -> tuple[Head, float]:
    x = features(texts_from(lesson.texts))
    if lesson.task == "score":
        return fit_ridge(x, lesson.scores, lesson.weights)
    return fit_softmax(x, lesson.shares, lesson.weights)


def _parameters(cfg: TrainConfig, features: Features, digest: str | None) -> dict[str, Any]:
    return {
        "embedder": digest, "lexical": features.lexical, "max_bytes": cfg.max_bytes,
        "passage_tokens": cfg.passage_tokens, "passages": cfg.passages,
    }  # fmt: skip
