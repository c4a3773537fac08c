"""Language identification: py3langid's model (naive Bayes over byte n-grams), walked by numba.

py3langid is a fork of langid.py (Lui and Baldwin 2012). Its model comes with the package; its
walk over the bytes, a Python loop of about 2 MB/s, is done here by a compiled loop. Decisions and
confidences are the library's own (the tests compare them), except that a text without any feature
is undetermined here.
"""

from __future__ import annotations

import math
import unicodedata
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, fixed, kernel

HEAD_BYTES = 1024
"""Language is decided on the first bytes of a text."""

UNKNOWN = "und"
"""Texts without a feature that the model knows (ISO 639-2 code for undetermined)."""


class Model(NamedTuple):
    """The model's tables."""

    moves: np.ndarray
    rows: np.ndarray
    outputs: np.ndarray
    log_likelihoods: np.ndarray  # float16 as uint16 [n_features, n_labels]
    log_priors: np.ndarray
    labels: list[str]
    aliases: list[tuple[int, int]]


@lru_cache(maxsize=1)
def load_model() -> Model:
    """Load the packaged model (about 0.5 s, 40 MB); once per process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    loaded = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    labels = list(loaded.nb_classes)
    first: dict[str, int] = {}
    aliases = [
        (first[label], index)
        for index, label in enumerate(labels)
        if first.setdefault(label, index) != index
    ]
    return Model(
        fixed(np.asarray(loaded.tk_nextmove, np.uint32)),
        fixed(np.asarray(loaded.tk_row, np.int64) << 8),
        fixed(np.asarray(loaded.tk_output, np.int64)),
        fixed(np.ascontiguousarray(loaded.nb_ptc, np.float16).view(np.uint16)),
        np.asarray(loaded.nb_pc, np.float32),
        labels,
        aliases,
    )


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Every float16 as float32 (numba has no float16), and log(1 + count)."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        return fixed(halves.astype(np.float32)), fixed(
            np.log1p(np.arange(4 * HEAD_BYTES + 1, dtype=np.float32))
        )


@kernel
def _score(
    data: Array,
    moves: Array,
    rows: Array,
    outputs: Array,
    likelihoods: Array,
    halves: Array,
    logs: Array,
    counts: Array,
    seen: Array,
    scores: Array,
) -> Int:
    """Add the log likelihoods of a text's features to ``scores``; return the number of features."""
    state, n = np.int64(0), 0
    for i in range(len(data)):
        state = np.int64(moves[rows[state] + data[i]])
        feature = outputs[state]
        if feature >= 0:
            if counts[feature] == 0:
                seen[n] = feature
                n += 1
            counts[feature] += 1
    for k in range(n):
        feature = seen[k]
        weight = logs[counts[feature]]
        counts[feature] = 0
        for label in range(len(scores)):
            scores[label] += weight * halves[likelihoods[feature, label]]
    return n


def _head(text: memoryview) -> bytes:
    """Return the part of a text that is looked at, prepared as the library prepares it."""
    raw = bytes(text[:HEAD_BYTES])
    if len(text) > HEAD_BYTES:
        end = len(raw)
        while end and raw[end - 1] & 0xC0 == 0x80:  # do not cut through a code point
            end -= 1
        raw = raw[: end - 1] if end and raw[end - 1] >= 0xC0 else raw[:end]
    if raw.isascii():
        return raw.lower() if raw.isupper() else raw
    string = raw.decode("utf-8", errors="replace")
    string = string.lower() if string.isupper() else string
    return unicodedata.normalize("NFC", string).encode()


def identify(texts: Texts, alive: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Name the language of texts.

    Args:
        texts: The batch.
        alive: bool per text; others get ``und`` and 0.

    Returns:
        ISO 639 codes (``zxx``: no language, such as tables of numbers), and the confidence of each,
        rounded to four digits, float64 [n_texts].
    """
    model = load_model()
    counts = np.zeros(len(model.log_likelihoods), np.int32)
    seen = np.empty(4 * HEAD_BYTES, np.int64)
    codes = [UNKNOWN] * len(texts)
    confidences = np.zeros(len(texts), np.float64)
    for index in np.flatnonzero(alive):
        head = _head(texts.bytes_of(int(index)))
        scores = np.zeros(len(model.labels), np.float32)
        n_found = _score(
            np.frombuffer(head, np.uint8), model.moves, model.rows, model.outputs,
            model.log_likelihoods, *_tables(), counts, seen, scores,
        )  # fmt: skip
        if n_found:
            scores += model.log_priors
            codes[index], confidences[index] = _decide(scores, len(head), model)
    return codes, confidences


def _decide(scores: np.ndarray, n_bytes: int, model: Model) -> tuple[str, float]:
    """Turn log scores into the best label and its probability, tempered by the text's length."""
    scaled = scores * np.float32(1.0 / math.sqrt(n_bytes))
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    for kept, alias in model.aliases:
        shares[kept] += shares[alias]
        shares[alias] = 0.0
    best = int(shares.argmax())
    return model.labels[best], round(float(shares[best]), 4)
