"""A byte n-gram language model with modified Kneser-Ney smoothing (Chen and Goodman 1998).

Trained on clean text, its bits per byte tell how expected a text is: noise, tables and broken
encodings cost many bits, repetition few. N-grams of at most 7 bytes fit into an integer together
with their length, so the tables are exact: no n-gram is taken for another. Every probability is
positive (the lowest order is interpolated with the uniform distribution over bytes), and the
probabilities of the bytes after any context add up to 1.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puna.core.errors import PunaError
from puna.data.kernels.buffers import MIX, Array, Int, Texts, find_slot, fixed, kernel
from puna.data.kernels.buffers import power_of_two as table_size
from puna.data.quality.prepare import head_end

NGRAM_FILE = "ngram.bin"
MAX_ORDER = 7
_HAS_PROBABILITY, _IS_CONTEXT = 1, 2
_PAD = 10
"""A text begins after line ends."""


@dataclass(frozen=True)
class NgramModel:
    """The model's table.

    Attributes:
        order: Longest n-gram, bytes.
        keys: uint64 [n_slots]: mixed n-gram keys, in an open-addressing table.
        used: uint8 [n_slots]: bit 0 of an n-gram with a probability, bit 1 of a context (the
            padding before a text is a context only).
        log_probabilities: log2 p(last byte | bytes before it), float32 [n_slots].
        log_backoffs: log2 of the weight of the shorter context when what follows these bytes is not
            in the table, float32 [n_slots].
        max_bytes: Bytes of a text that are looked at.
    """

    order: int
    keys: np.ndarray
    used: np.ndarray
    log_probabilities: np.ndarray
    log_backoffs: np.ndarray
    max_bytes: int

    def raw(self, texts: Texts) -> np.ndarray:
        """Return the bits per byte of texts, float64 [n_texts, 1]; 8 for an empty text."""
        bits = _score(
            texts.data, texts.offsets, self.order, self.max_bytes, self.keys, self.used,
            self.log_probabilities, self.log_backoffs,
        )  # fmt: skip
        return bits.reshape(-1, 1)


@kernel
def _slot_key(key: Int) -> Int:
    """Spread an n-gram key; a bijection, so the table stays exact."""
    key = np.uint64(key) * MIX
    return key ^ (key >> np.uint64(32))


@kernel
def _keys(data: Array, offsets: Array, order: Int, max_bytes: Int, out: Array) -> Int:
    """Write the key of the n-gram of length ``order`` that ends at every byte."""
    mask = (np.uint64(1) << np.uint64(8 * order)) - np.uint64(1)
    tag = np.uint64(order) << np.uint64(56)
    at = 0
    for d in range(len(offsets) - 1):
        history = np.uint64(0)
        for _ in range(order):
            history = (history << np.uint64(8)) | np.uint64(_PAD)
        for i in range(offsets[d], head_end(data, offsets[d], offsets[d + 1], max_bytes)):
            history = (history << np.uint64(8)) | np.uint64(data[i])
            out[at] = (history & mask) | tag
            at += 1
    return at


@kernel
def _insert(sources: Array, values: Array, flag: Int, keys: Array, used: Array, out: Array) -> None:
    mask = len(keys) - 1
    for k in range(len(sources)):
        key = _slot_key(sources[k])
        slot = find_slot(keys, used, mask, key)
        keys[slot] = key
        used[slot] |= flag
        out[slot] = values[k]


@kernel
def _score(
    data: Array,
    offsets: Array,
    order: Int,
    max_bytes: Int,
    keys: Array,
    used: Array,
    log_p: Array,
    log_b: Array,
) -> Array:
    n_docs = len(offsets) - 1
    out = np.full(n_docs, 8.0)
    size_mask = len(keys) - 1
    for d in range(n_docs):
        history = np.uint64(0)
        for _ in range(order):
            history = (history << np.uint64(8)) | np.uint64(_PAD)
        start = offsets[d]
        end = head_end(data, start, offsets[d + 1], max_bytes)
        total = 0.0
        for i in range(start, end):
            context = history
            history = (history << np.uint64(8)) | np.uint64(data[i])
            n = order
            while n >= 1:
                mask = (np.uint64(1) << np.uint64(8 * n)) - np.uint64(1)
                key = _slot_key((history & mask) | (np.uint64(n) << np.uint64(56)))
                slot = find_slot(keys, used, size_mask, key)
                if used[slot] & _HAS_PROBABILITY:
                    total -= log_p[slot]
                    break
                n -= 1
                if n >= 1:
                    mask = (np.uint64(1) << np.uint64(8 * n)) - np.uint64(1)
                    key = _slot_key((context & mask) | (np.uint64(n) << np.uint64(56)))
                    slot = find_slot(keys, used, size_mask, key)
                    if used[slot]:
                        total -= log_b[slot]
        if end > start:
            out[d] = total / (end - start)
    return out


def train_ngram(texts: Texts, *, order: int, max_bytes: int, min_count: int = 1) -> NgramModel:
    """Count n-grams and smooth them.

    Args:
        texts: Clean texts.
        order: Longest n-gram, 2 to 7 bytes.
        max_bytes: Bytes of each text to use.
        min_count: N-grams of the longest order that occur less often are left out of the table
            (their probability goes to the shorter context), which makes it smaller.

    Raises:
        PunaError: There is no text.
    """
    if not 2 <= order <= MAX_ORDER:
        raise ValueError(f"order is {order}, not 2 to {MAX_ORDER}")
    longest = np.empty(int(texts.offsets[-1] - texts.offsets[0]), np.uint64)
    longest = longest[: _keys(texts.data, texts.offsets, order, max_bytes, longest)]
    if not len(longest):
        raise PunaError("the training texts are empty", "give clean texts to train on")
    grams, counts = _unique(longest)
    del longest
    levels = [(grams, counts)]
    for n in range(order - 1, 0, -1):  # shorter n-grams count what stands before them
        mask = np.uint64((1 << (8 * n)) - 1)
        levels.append(_unique((levels[-1][0] & mask) | np.uint64(n << 56)))
    parts = _smooth(levels[::-1], min_count)
    n_slots = int(table_size(2 * sum(len(grams) for grams, _, _ in parts)))
    keys, used = np.zeros(n_slots, np.uint64), np.zeros(n_slots, np.uint8)
    log_p, log_b = np.zeros(n_slots, np.float32), np.zeros(n_slots, np.float32)
    for grams, probabilities, _ in parts:
        _insert(
            grams, np.log2(probabilities).astype(np.float32), _HAS_PROBABILITY, keys, used, log_p
        )
    for n, (_, _, (contexts, backoffs)) in enumerate(parts):
        if n:  # the context of a single byte is empty: its weight is in the probabilities
            _insert(contexts, np.log2(backoffs).astype(np.float32), _IS_CONTEXT, keys, used, log_b)
    return NgramModel(order, fixed(keys), fixed(used), fixed(log_p), fixed(log_b), max_bytes)


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found, counts = np.unique(keys, return_counts=True)
    return found, counts.astype(np.int64)


_Level = tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]


def _smooth(levels: list[tuple[np.ndarray, np.ndarray]], min_count: int) -> list[_Level]:
    """Return, from the shortest order on: n-grams, their probabilities, contexts and weights."""
    parts: list[_Level] = []
    for n, (all_grams, all_counts) in enumerate(levels, start=1):
        contexts = _contexts(all_grams, n)
        starts = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
        totals = np.add.reduceat(all_counts, starts)
        group = np.cumsum(np.concatenate([[0], (contexts[1:] != contexts[:-1]).astype(np.int64)]))
        kept = all_counts >= (min_count if n == len(levels) else 1)
        mass = (all_counts - _discounts(all_counts)) / totals[group]
        mass[~kept] = 0.0
        weights = np.maximum(1.0 - np.add.reduceat(mass, starts), 1e-12)
        if n == 1:
            # All 256 bytes get an entry, so that a lookup always ends.
            lower = np.full(256, 1 / 256)
            probabilities = weights[0] * lower
            probabilities[(all_grams & np.uint64(255)).astype(np.int64)] += mass
            grams = np.arange(256, dtype=np.uint64) | np.uint64(1 << 56)
            parts.append((grams, probabilities, (contexts[starts], weights)))
            continue
        grams = all_grams[kept]
        shorter = (grams & np.uint64((1 << (8 * (n - 1))) - 1)) | np.uint64((n - 1) << 56)
        below = np.searchsorted(parts[-1][0], shorter)  # every suffix of an n-gram is there
        probabilities = mass[kept] + weights[group[kept]] * parts[-1][1][below]
        parts.append((grams, probabilities, (contexts[starts], weights)))
    return parts


def _contexts(grams: np.ndarray, n: int) -> np.ndarray:
    """Return the keys of n-grams without their last byte; equal contexts stand side by side."""
    body = (grams & np.uint64((1 << (8 * n)) - 1)) >> np.uint64(8)
    return body | np.uint64((n - 1) << 56)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return the discount of each count: D1, D2 or D3+ of modified Kneser-Ney."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    fallback = np.array([0.5, 0.75, 0.9])  # (ours) where the counts of counts are too few
    by_count = fallback
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        estimated = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (estimated > 0).all() and (estimated < [1, 2, 3]).all():
            by_count = estimated
    return by_count[np.minimum(counts, 3) - 1]


def save_ngram(model: NgramModel) -> bytes:
    """Return the content of a model file: numpy arrays, no pickle; equal models, equal bytes."""
    taken = np.flatnonzero(model.used)
    buffer = io.BytesIO()
    np.save(buffer, np.array([model.order, len(model.keys)], np.int64), allow_pickle=False)
    for array in (taken, model.keys[taken], model.used[taken], model.log_probabilities[taken],
                  model.log_backoffs[taken]):  # fmt: skip
        np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def load_ngram(path: Path, max_bytes: int) -> NgramModel:
    """Read a model file.

    Raises:
        PunaError: It is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            order, n_slots = np.load(file, allow_pickle=False).tolist()
            taken, *parts = (np.load(file, allow_pickle=False) for _ in range(5))
            full = [np.zeros(n_slots, kind) for kind in (np.uint64, np.uint8, np.float32,
                                                         np.float32)]  # fmt: skip
            for array, values in zip(full, parts, strict=True):
                array[taken] = values
    except (OSError, ValueError, EOFError, IndexError) as error:
        raise PunaError(
            f"{path}: not a readable n-gram model ({error})", "train it anew"
        ) from error
    keys, used, log_p, log_b = map(fixed, full)
    return NgramModel(order, keys, used, log_p, log_b, max_bytes)
