"""fastText classifiers (Joulin et al. 2016): their files, and their use by a compiled loop.

A supervised fastText model averages the rows of a text's words and word n-grams and multiplies the
mean with one row per label. Both steps are linear, so the rows are multiplied once, when the model
is loaded, and a text costs one short row per feature. Files are those of the fastText library
(version 12, not quantised), so its models serve here and ours there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puna.core.errors import PunaError
from puna.data.kernels.buffers import Array, Int, Texts, fixed, kernel, power_of_two
from puna.data.quality.prepare import Preparation, prepare

MODEL_FILE = "model.bin"
LABEL_PREFIX = "__label__"

MODEL_MAGIC, MODEL_VERSION = 793712314, 12
_SUPERVISED = 3
_SOFTMAX, _OVA = 3, 4
_WORD, _LABEL = 0, 1
MODEL_ARGS = ("dim", "ws", "epoch", "min_count", "neg", "word_ngrams", "loss", "model", "bucket",
         "minn", "maxn", "lr_update_rate")  # fmt: skip


@dataclass(frozen=True)
class FastTextModel:
    """A supervised model, reduced to what prediction needs.

    Attributes:
        labels: Names without the prefix ``__label__``.
        weights: Contribution of a feature (vocabulary, then hash buckets) to each label's logit,
            float32 [n_words + n_buckets, n_labels].
        slots: Open-addressing table over the words' hashes: number of the word + 1, or 0.
        word_data: The words' UTF-8, end to end.
        word_offsets: int64 [n_words + 1].
        settings: word_ngrams, minn, maxn, n_words, n_buckets as int64.
        preparation: How texts are prepared.
        max_bytes: Bytes of a text that are looked at.
    """

    labels: tuple[str, ...]
    weights: np.ndarray
    slots: np.ndarray
    word_data: np.ndarray
    word_offsets: np.ndarray
    settings: np.ndarray
    preparation: Preparation
    max_bytes: int

    def raw(self, texts: Texts) -> np.ndarray:
        """Return the logits of texts, float64 [n_texts, n_labels]."""
        lines = prepare(texts, self.preparation, self.max_bytes)
        return _logits(
            lines.data, lines.offsets, self.slots, self.word_data, self.word_offsets,
            self.weights, self.settings,
        )  # fmt: skip


def load_fasttext(path: Path, preparation: Preparation, max_bytes: int) -> FastTextModel:
    """Read a fastText model file.

    Args:
        path: ``model.bin``.
        preparation: How its texts were prepared.
        max_bytes: Bytes of a text to look at.

    Raises:
        PunaError: Missing, damaged, or of a kind that this reader does not know.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PunaError(f"{path}: {error.strerror}", "give a trained classifier") from error
    try:
        return _parse(data, path, preparation, max_bytes)
    except (struct.error, ValueError, IndexError) as error:
        raise PunaError(f"{path}: damaged fastText model ({error})", "train it anew") from error


def _parse(data: bytes, path: Path, preparation: Preparation, max_bytes: int) -> FastTextModel:
    magic, version, *values = struct.unpack_from(f"<{2 + len(MODEL_ARGS)}id", data)
    if magic != MODEL_MAGIC or version != MODEL_VERSION:
        raise PunaError(f"{path} is no fastText model of version {MODEL_VERSION}",
                        "give a `model.bin` that fastText 0.9 saved")  # fmt: skip
    args = dict(zip(MODEL_ARGS, values, strict=False))
    at = struct.calcsize(f"<{2 + len(MODEL_ARGS)}id")
    n_entries, n_words, n_labels, _, pruned = struct.unpack_from("<iiiqq", data, at)
    at += struct.calcsize("<iiiqq")
    if args["model"] != _SUPERVISED or args["loss"] not in (_SOFTMAX, _OVA) or pruned >= 0:
        raise PunaError(
            f"{path}: only classifiers with loss `softmax` or `ova`, not quantised, can be read",
            "train with loss softmax and save it with save_model, without quantize",
        )
    words: list[bytes] = []
    labels: list[str] = []
    for _ in range(n_entries):
        end = data.index(b"\0", at)
        word, kind = data[at:end], data[end + 9]
        at = end + 10
        if kind == _LABEL:
            labels.append(word.decode().removeprefix(LABEL_PREFIX))
        else:
            words.append(word)
    if len(words) != n_words or len(labels) != n_labels:
        raise ValueError(f"{len(words)} words and {len(labels)} labels, not as announced")
    inputs, at = _matrix(data, at, args["dim"])
    outputs, at = _matrix(data, at, args["dim"])
    n_buckets = len(inputs) - n_words
    settings = [args["word_ngrams"], args["minn"], args["maxn"], n_words, max(n_buckets, 0)]
    offsets = np.concatenate([[0], np.cumsum([len(word) for word in words])]).astype(np.int64)
    word_data = np.frombuffer(b"".join(words), np.uint8)
    return FastTextModel(
        tuple(labels), fixed(inputs @ outputs.T), fixed(word_slots(word_data, offsets)),
        fixed(word_data), fixed(offsets), fixed(np.array(settings, np.int64)), preparation,
        max_bytes,
    )  # fmt: skip


def _matrix(data: bytes, at: int, dim: int) -> tuple[np.ndarray, int]:
    is_quantised, n_rows, n_columns = struct.unpack_from("<?qq", data, at)
    at += struct.calcsize("<?qq")
    if is_quantised or n_columns != dim:
        raise ValueError(f"a matrix of {n_rows} x {n_columns} where {dim} columns are due")
    end = at + 4 * n_rows * n_columns
    return np.frombuffer(data[at:end], np.float32).reshape(n_rows, n_columns), end


@kernel
def _hash(data: Array, start: Int, end: Int) -> Int:
    """FastText's hash: FNV-1a of 32 bits over signed bytes."""
    value = np.uint64(2166136261)
    for i in range(start, end):
        value ^= np.uint64(np.uint32(np.int32(np.int8(data[i]))))
        value = (value * np.uint64(16777619)) & np.uint64(0xFFFFFFFF)
    return value


@kernel
def _find(
    data: Array, start: Int, end: Int, value: Int, slots: Array, words: Array, offsets: Array
) -> Int:
    """Return the slot that holds a word, or the free slot where it belongs."""
    mask = np.int64(len(slots) - 1)
    slot = np.int64(value) & mask
    while slots[slot] > 0:
        word = slots[slot] - 1
        first, n = offsets[word], offsets[word + 1] - offsets[word]
        if n == end - start:
            k = 0
            while k < n and words[first + k] == data[start + k]:
                k += 1
            if k == n:
                return slot
        slot = (slot + 1) & mask
    return slot


@kernel
def word_slots(words: Array, offsets: Array) -> Array:
    """Return the open-addressing table of a vocabulary."""
    n = len(offsets) - 1
    slots = np.zeros(power_of_two(2 * n), np.int32)
    for word in range(n):
        start, end = offsets[word], offsets[word + 1]
        slots[_find(words, start, end, _hash(words, start, end), slots, words, offsets)] = word + 1
    return slots


@kernel
def _subwords(
    data: Array, start: Int, end: Int, settings: Array, word: Array, rows: Array, at: Int
) -> Int:
    """Write the rows of the character n-grams of ``<word>`` from ``at`` on; return the end."""
    minn, maxn, n_words, n_buckets = settings[1], settings[2], settings[3], settings[4]
    n_bytes = end - start + 2
    word[0] = 60
    word[1 : n_bytes - 1] = data[start:end]
    word[n_bytes - 1] = 62
    for i in range(n_bytes):
        if word[i] & 0xC0 == 0x80:
            continue
        j, n = i, 1
        while j < n_bytes and n <= maxn:
            j += 1
            while j < n_bytes and word[j] & 0xC0 == 0x80:
                j += 1
            if n >= minn and not (n == 1 and (i == 0 or j == n_bytes)):
                rows[at] = n_words + np.int64(_hash(word, i, j)) % n_buckets
                at += 1
            n += 1
    return at


@kernel
def _ngrams(hashes: Array, n: Int, settings: Array, rows: Array, at: Int) -> Int:
    """Write the rows of the n-grams that end with the last of ``n`` words; return the end."""
    n_words, n_buckets = settings[3], np.uint64(settings[4])
    for first in range(max(0, n - settings[0]), n - 1):
        value = np.uint64(np.int64(hashes[first]))
        for k in range(first + 1, n):
            value = value * np.uint64(116049371) + np.uint64(np.int64(hashes[k]))
        rows[at] = n_words + np.int64(value % n_buckets)
        at += 1
    return at


@kernel
def _is_space(byte: Int) -> bool:
    return byte == 32 or (9 <= byte <= 13) or byte == 0


@kernel
def _is_end(data: Array, start: Int, end: Int) -> bool:
    """Tell whether a token is ``</s>``, at which the library stops reading."""
    if end - start != 4 or data[start] != 60 or data[start + 1] != 47:
        return False
    return data[start + 2] == 115 and data[start + 3] == 62


@kernel
def _is_label(data: Array, start: Int, end: Int) -> bool:
    """Tell whether a token begins with ``__label__``: the library reads it as a label, not a word.

    95 is ``_``, and the rest spells ``label``.
    """
    if end - start < 9 or data[start] != 95 or data[start + 1] != 95 or data[start + 7] != 95:
        return False
    spelled = data[start + 2] == 108 and data[start + 3] == 97 and data[start + 4] == 98
    return spelled and data[start + 5] == 101 and data[start + 6] == 108 and data[start + 8] == 95


@kernel
def features_of(
    data: Array,
    start: Int,
    end: Int,
    slots: Array,
    words: Array,
    word_offsets: Array,
    settings: Array,
    hashes: Array,
    word_buffer: Array,
    rows: Array,
) -> Int:
    """Write the rows of a text's features into ``rows``; return their number.

    ``hashes`` and ``word_buffer`` are scratch space (see :func:`scratch_sizes`).
    """
    end_mark = np.array([60, 47, 115, 62], np.uint8)  # "</s>" ends every line
    i, n, n_rows = start, 0, 0
    is_open = True
    while is_open:
        while i < end and _is_space(data[i]):
            i += 1
        first, last = i, i
        while i < end and not _is_space(data[i]):
            i += 1
        last = i
        if first == last or _is_end(data, first, last):
            value = _hash(end_mark, 0, 4)
            word = slots[_find(end_mark, 0, 4, value, slots, words, word_offsets)] - 1
            is_open = False
        elif _is_label(data, first, last):
            continue
        else:
            value = _hash(data, first, last)
            word = slots[_find(data, first, last, value, slots, words, word_offsets)] - 1
        if word >= 0:
            rows[n_rows] = word
            n_rows += 1
        if settings[2] > 0 and is_open:
            n_rows = _subwords(data, first, last, settings, word_buffer, rows, n_rows)
        hashes[n] = np.int32(value)
        n += 1
        if settings[0] > 1 and settings[4] > 0:
            n_rows = _ngrams(hashes, n, settings, rows, n_rows)
    return n_rows


@kernel
def scratch_sizes(offsets: Array, settings: Array) -> tuple[Int, Int, Int]:
    """Return sizes that suit the longest text: its tokens, bytes, and features."""
    longest = 0
    for d in range(len(offsets) - 1):
        longest = max(longest, offsets[d + 1] - offsets[d])
    n_tokens = longest // 2 + 3
    n_features = n_tokens * max(settings[0], 1)
    if settings[2] > 0:
        n_features += (longest + 2 * n_tokens) * (settings[2] - settings[1] + 1)
    return n_tokens, longest + 8, n_features


@kernel
def _logits(
    data: Array,
    offsets: Array,
    slots: Array,
    words: Array,
    word_offsets: Array,
    weights: Array,
    settings: Array,
) -> Array:
    n_docs, n_labels = len(offsets) - 1, weights.shape[1]
    out = np.zeros((n_docs, n_labels), np.float64)
    n_tokens, n_bytes, n_features = scratch_sizes(offsets, settings)
    hashes, buffer = np.empty(n_tokens, np.int32), np.empty(n_bytes, np.uint8)
    rows = np.empty(n_features, np.int64)
    for d in range(n_docs):
        n = features_of(
            data, offsets[d], offsets[d + 1], slots, words, word_offsets, settings, hashes,
            buffer, rows,
        )  # fmt: skip
        for label in range(n_labels):
            total = 0.0  # a register, where an element of the array would be written every time
            for k in range(n):
                total += weights[rows[k], label]
            out[d, label] = total / max(n, 1)
    return out
