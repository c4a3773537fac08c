"""A linear classifier over hashed words, pairs of words and byte n-grams (logistic regression).

Small (one number per bucket), quick to train, and the same bytes for the same texts: examples come
in the order of their hashes, and AdaGrad (Duchi et al. 2011) runs over them in one thread. Features
are hashed without a sign (Weinberger et al. 2009 with many buckets), their counts are damped by a
logarithm, and each text's vector has length 1, so that long texts weigh no more than short ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.fsio import atomic_path
from puna.data.kernels.buffers import (
    FNV_PRIME,
    FNV_SEED,
    MIX,
    Array,
    Int,
    Texts,
    kernel,
    texts_from,
)
from puna.data.quality.calibrate import calibrated, fit_platt
from puna.data.quality.examples import NEGATIVE, POSITIVE, distinct, gather
from puna.data.quality.measure import binary_report
from puna.data.quality.prepare import prepare

SUFFIX = ".safetensors"
MIN_DOCS = 20
"""Fewer texts of a class are refused (ours)."""
_FORMAT = "puna-hashed-1"
_BATCH_DOCS = 256


class HashedConfig(Config):
    """How a hashed linear classifier is trained (the defaults are ours)."""

    bits: int = Field(default=18, ge=8, le=26)
    """Number of buckets, as a power of two."""
    min_chars: int = Field(default=3, ge=1)
    """Shortest byte n-gram of a word and its two edges."""
    max_chars: int = Field(default=5, ge=0, le=16)
    """Longest; 0 uses words and pairs of words only."""
    epochs: int = Field(default=10, ge=1)
    """Passes over the training texts."""
    lr: float = Field(default=0.5, gt=0)
    """Step size of AdaGrad."""
    l2: float = Field(default=1e-6, ge=0)
    """Weight of the squared norm."""
    max_bytes: int = Field(default=65536, ge=64)
    """Bytes of each text that are looked at."""
    calibration_share: float = Field(default=0.15, gt=0, lt=0.5)
    """Share of the texts that turns margins into probabilities (Platt 1999)."""
    test_share: float = Field(default=0.2, gt=0, lt=0.4)
    """Share of the texts that is only measured on."""


@dataclass(frozen=True)
class HashedModel:
    """A trained model.

    Attributes:
        weights: float32 [2 ** bits].
        bias: Added to every margin.
        config: How texts become features.
        calibration: How margins become probabilities.
        report: What was measured on the texts that were held out.
    """

    weights: np.ndarray
    bias: float
    config: HashedConfig
    calibration: dict[str, Any]
    report: dict[str, Any]

    def margins(self, texts: Texts) -> np.ndarray:
        """Return the margin of the positive class, float64 [n_texts]."""
        starts, buckets, values = features(texts, self.config)
        return _margins(starts, buckets, values, self.weights) + self.bias

    def values(self, texts: Texts) -> np.ndarray:
        """Return the probability of the positive class, float64 [n_texts]."""
        return calibrated(self.margins(texts), self.calibration)


@kernel
def _bucket(key: Int, bits: Int) -> Int:
    return np.int64((key * MIX) >> np.uint64(64 - bits))


@kernel
def _hash(data: Array, start: Int, end: Int, key: Int) -> Int:
    for i in range(start, end):
        key = (key ^ np.uint64(data[i])) * FNV_PRIME
    return key


@kernel
def _word_features(
    data: Array, start: Int, end: Int, least: Int, most: Int, bits: Int, out: Array, n: Int
) -> Int:
    """Write the buckets of a word's byte n-grams, its edges counted as bytes 1 and 2."""
    for size in range(least, most + 1):
        for first in range(start - 1, end + 2 - size):
            last = first + size
            key = FNV_SEED ^ np.uint64(size)
            if first < start:
                key = (key ^ np.uint64(1)) * FNV_PRIME
            key = _hash(data, max(first, start), min(last, end), key)
            if last > end:
                key = (key ^ np.uint64(2)) * FNV_PRIME
            out[n] = _bucket(key, bits)
            n += 1
    return n


@kernel
def _text_features(
    data: Array, start: Int, end: Int, least: Int, most: Int, bits: Int, out: Array
) -> Int:
    """Write the buckets of a text, one per occurrence; return how many."""
    n, i = 0, start
    before = np.uint64(0)
    while i < end:
        if data[i] == 32:
            i += 1
            continue
        first = i
        while i < end and data[i] != 32:
            i += 1
        key = _hash(data, first, i, FNV_SEED)
        out[n] = _bucket(key, bits)
        n += 1
        if before != 0:
            out[n] = _bucket((before * FNV_PRIME) ^ key, bits)
            n += 1
        before = key
        if most > 0:
            n = _word_features(data, first, i, least, most, bits, out, n)
    return n


@kernel
def _features(
    data: Array, offsets: Array, least: Int, most: Int, bits: Int
) -> tuple[Array, Array, Array]:
    n_docs = len(offsets) - 1
    longest = 0
    for d in range(n_docs):
        longest = max(longest, offsets[d + 1] - offsets[d])
    # A word of n bytes has fewer than n + 2 n-grams of each size, and two features of its own.
    scratch = np.empty((longest + 2) * 2 * (max(most - least + 1, 0) + 2) + 4, np.int64)
    counts = np.zeros(1 << bits, np.int32)
    starts = np.zeros(n_docs + 1, np.int64)
    buckets, values = np.empty(1024, np.int32), np.empty(1024, np.float32)
    at = 0
    for d in range(n_docs):
        n = _text_features(data, offsets[d], offsets[d + 1], least, most, bits, scratch)
        while at + n > len(buckets):
            buckets = np.concatenate((buckets, np.empty(len(buckets), np.int32)))
            values = np.concatenate((values, np.empty(len(values), np.float32)))
        first = at
        for k in range(n):
            bucket = scratch[k]
            if counts[bucket] == 0:
                buckets[at] = bucket
                at += 1
            counts[bucket] += 1
        norm = 0.0
        for k in range(first, at):
            value = np.log1p(np.float64(counts[buckets[k]]))
            values[k] = value
            norm += value * value
            counts[buckets[k]] = 0
        for k in range(first, at):
            values[k] /= np.sqrt(norm)
        starts[d + 1] = at
    return starts, buckets[:at], values[:at]


def features(texts: Texts, config: HashedConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn texts into sparse vectors of length 1.

    Returns:
        Where each text's entries begin, int64 [n_texts + 1]; buckets, int32; values, float32.
    """
    lines = prepare(texts, "words", config.max_bytes)
    return _features(lines.data, lines.offsets, config.min_chars, config.max_chars, config.bits)


@kernel
def _margins(starts: Array, buckets: Array, values: Array, weights: Array) -> Array:
    out = np.zeros(len(starts) - 1, np.float64)
    for d in range(len(out)):
        total = 0.0
        for k in range(starts[d], starts[d + 1]):
            total += weights[buckets[k]] * values[k]
        out[d] = total
    return out


@kernel
def _learn(
    starts: Array, buckets: Array, values: Array, targets: Array, importance: Array,
    epochs: Int, lr: Int, l2: Int, weights: Array,
) -> tuple[Int, Int]:  # fmt: skip
    """Run AdaGrad over the texts in their order; return the bias and the last epoch's loss."""
    squares = np.full(len(weights), 1e-8)
    bias, bias_square, loss = 0.0, 1e-8, 0.0
    for _ in range(epochs):
        loss = 0.0
        for d in range(len(targets)):
            margin = bias
            for k in range(starts[d], starts[d + 1]):
                margin += weights[buckets[k]] * values[k]
            p = 1.0 / (1.0 + np.exp(-margin))
            loss -= importance[d] * np.log(max(p if targets[d] else 1.0 - p, 1e-12))
            error = (p - targets[d]) * importance[d]
            for k in range(starts[d], starts[d + 1]):
                b = buckets[k]
                slope = error * values[k] + l2 * weights[b]
                squares[b] += slope * slope
                weights[b] -= lr * slope / np.sqrt(squares[b])
            bias_square += error * error
            bias -= lr * error / np.sqrt(bias_square)
    return bias, loss / len(targets)


def train_hashed(
    positive: Sequence[str], negative: Sequence[str], out: Path, config: HashedConfig | None = None
) -> dict[str, Any]:
    """Train a classifier from the user's texts and write it as one safetensors file.

    Args:
        positive: Places of texts to be found (see :mod:`puna.data.quality.examples`): files of any
            format that ``data.ingest`` reads, or folders of finished stages.
        negative: Places of other texts.
        out: File to write; ends with ``.safetensors``.
        config: Settings.

    Returns:
        The report on the held-out texts: AUC, precision and so on at the threshold 0.5.

    Raises:
        PunaError: The name ends otherwise, a place cannot be read, or a class has too few texts.
    """
    config = config or HashedConfig()
    if out.suffix != SUFFIX:
        raise PunaError(f"{out} does not end with {SUFFIX}", f"call it model{SUFFIX}")
    examples = distinct(gather(positive=positive, negative=negative))
    targets = np.array([item.label == POSITIVE for item in examples.items], bool)
    for name, n in ((POSITIVE, int(targets.sum())), (NEGATIVE, int((~targets).sum()))):
        if n < MIN_DOCS:
            raise PunaError(f"{n} distinct {name} texts are too few to train a classifier",
                            f"give at least {MIN_DOCS}")  # fmt: skip
    places = examples.keys.astype(np.float64) / 2**64
    is_test = places < config.test_share
    is_calibration = ~is_test & (places < config.test_share + config.calibration_share)
    is_train = ~is_test & ~is_calibration
    texts = [item.text for item in examples.items]
    weights, bias, loss = _fit(texts, targets, is_train, config)
    raw = HashedModel(weights, bias, config, {}, {})
    margins = np.concatenate([
        raw.margins(texts_from(texts[at : at + _BATCH_DOCS]))
        for at in range(0, len(texts), _BATCH_DOCS)
    ])  # fmt: skip
    for name, part in (("calibration", is_calibration), ("test", is_test)):
        if len(set(targets[part].tolist())) < 2:
            raise PunaError(f"the {name} texts are all of one class", "give more texts")
    calibration = fit_platt(margins[is_calibration], targets[is_calibration])
    sources = [examples.items[k].source for k in np.flatnonzero(is_test)]
    report = binary_report(
        calibrated(margins[is_test], calibration), targets[is_test], sources, 0.5,
        n_resamples=0, seed=0,
    )  # fmt: skip
    report |= {"train_docs": int(is_train.sum()), "train_loss": loss, "texts": examples.digest(),
               "counts": examples.counts}  # fmt: skip
    _save(HashedModel(weights, bias, config, calibration, report), out)
    return report


def _fit(
    texts: list[str], targets: np.ndarray, is_train: np.ndarray, config: HashedConfig
) -> tuple[np.ndarray, float, float]:
    """Train on a part; both classes weigh the same in all, whatever their sizes."""
    chosen = np.flatnonzero(is_train)
    starts, buckets, values = features(texts_from([texts[k] for k in chosen]), config)
    goal = targets[chosen]
    shares = np.where(goal, max(goal.mean(), 1e-9), max(1 - goal.mean(), 1e-9))
    weights = np.zeros(1 << config.bits)
    bias, loss = _learn(
        starts, buckets, values, goal.astype(np.float64), 0.5 / shares, config.epochs, config.lr,
        config.l2, weights,
    )  # fmt: skip
    return weights.astype(np.float32), float(bias), float(loss)


def _save(model: HashedModel, path: Path) -> None:
    header = {"format": _FORMAT, "bias": model.bias, "config": model.config.model_dump(),
              "calibration": model.calibration, "report": model.report}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(
            {"weights": model.weights}, temporary, {"puna": json.dumps(header, sort_keys=True)}
        )


@lru_cache(maxsize=4)
def load_hashed(path: Path, digest: str) -> HashedModel:
    """Load a model.

    Args:
        path: The file.
        digest: Its content hash (a file that changes is loaded anew).

    Raises:
        PunaError: It is no such file, or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["puna"])
            weights = file.get_tensor("weights")
        config = HashedConfig.model_validate(header["config"])
        right = header["format"] == _FORMAT and weights.shape == (1 << config.bits,)
        model = HashedModel(
            weights, header["bias"], config, header["calibration"], header["report"]
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise PunaError(f"{path}: no classifier of `train_hashed` ({error!r})",
                        "train it anew") from error  # fmt: skip
    if not right:
        raise PunaError(f"{path}: another format or size than this puna writes", "train it anew")
    return model
