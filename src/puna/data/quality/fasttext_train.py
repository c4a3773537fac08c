"""Training a fastText classifier (Joulin et al. 2016), deterministic, as a compiled loop.

The library's own training is not used: with one thread, which determinism needs, it leaves nine
tenths of the initial vectors uninitialised (version 0.9.2 and its forks), and with several threads
the result depends on their race. The model, the loss (softmax), the gradients and the falling
learning rate are the library's; texts are shuffled in every pass, and the rows of n-gram buckets
that no training text used end as zero instead of as noise (both ours).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np

from puna.core.errors import PunaError
from puna.data.kernels.buffers import Array, Float, Int, Texts, fixed, kernel
from puna.data.quality.fasttext_model import (
    LABEL_PREFIX,
    MODEL_ARGS,
    MODEL_MAGIC,
    MODEL_VERSION,
    features_of,
    scratch_sizes,
    word_slots,
)

_END = b"</s>"


@kernel
def _all_features(
    data: Array,
    offsets: Array,
    slots: Array,
    words: Array,
    word_offsets: Array,
    settings: Array,
    ends: Array,
    out: Array,
) -> Int:
    """Count (when ``out`` is empty) or write the features of all texts; fill ``ends``."""
    n_tokens, n_bytes, n_features = scratch_sizes(offsets, settings)
    hashes, buffer = np.empty(n_tokens, np.int32), np.empty(n_bytes, np.uint8)
    rows = np.empty(n_features, np.int64)
    at = 0
    for d in range(len(offsets) - 1):
        n = features_of(
            data, offsets[d], offsets[d + 1], slots, words, word_offsets, settings, hashes,
            buffer, rows,
        )  # fmt: skip
        if len(out):
            for k in range(n):
                out[at + k] = rows[k]
        at += n
        ends[d + 1] = at
    return at


@kernel
def _learn(
    hidden: Array, outputs: Array, shares: Array, rate: Float, gradient: Array, scores: Array
) -> Float:
    """Change ``outputs`` by one step, write the gradient of ``hidden``; return the loss."""
    n_labels, dim = outputs.shape
    top = np.float32(-1e30)
    for label in range(n_labels):
        score = np.float32(0)
        for c in range(dim):
            score += outputs[label, c] * hidden[c]
        scores[label] = score
        top = max(top, score)
    total = np.float32(0)
    for label in range(n_labels):
        scores[label] = np.exp(scores[label] - top)
        total += scores[label]
    gradient[:] = 0
    loss = np.float32(0)
    for label in range(n_labels):
        p = scores[label] / total
        step = rate * (shares[label] - p)
        if shares[label] > 0:
            loss -= shares[label] * np.log(max(p, np.float32(1e-30)))
        for c in range(dim):
            gradient[c] += step * outputs[label, c]
            outputs[label, c] += step * hidden[c]
    return loss


@kernel
def _pass(
    ends: Array,
    features: Array,
    shares: Array,
    weights: Array,
    order: Array,
    inputs: Array,
    outputs: Array,
    lr: Float,
    lr_end: Float,
) -> Float:
    """Go once over the texts; return the mean loss. The learning rate falls linearly."""
    dim, n_labels = inputs.shape[1], outputs.shape[0]
    hidden, gradient = np.empty(dim, np.float32), np.empty(dim, np.float32)
    scores = np.empty(n_labels, np.float32)
    loss = 0.0
    for step in range(len(order)):
        rate = np.float32(lr + (lr_end - lr) * step / len(order))
        d = order[step]
        n = ends[d + 1] - ends[d]
        if n == 0:
            continue
        share = np.float32(1.0) / np.float32(n)
        hidden[:] = 0
        for k in range(ends[d], ends[d + 1]):
            for c in range(dim):
                hidden[c] += inputs[features[k], c]
        for c in range(dim):
            hidden[c] *= share
        loss += _learn(hidden, outputs, shares[d], rate * weights[d], gradient, scores)
        for c in range(dim):
            gradient[c] *= share
        for k in range(ends[d], ends[d + 1]):
            for c in range(dim):
                inputs[features[k], c] += gradient[c]
    return loss / max(len(order), 1)


def train_fasttext(
    lines: Texts,
    targets: np.ndarray,
    labels: Sequence[str],
    *,
    dim: int,
    epochs: int,
    lr: float,
    word_ngrams: int,
    min_count: int,
    n_buckets: int,
    seed: int,
    weights: np.ndarray | None = None,
) -> tuple[bytes, list[float]]:
    """Train a classifier.

    Args:
        lines: Prepared texts.
        targets: Number of the label of each, int64 [n_texts], or the share of every label in each,
            [n_texts, n_labels], rows adding up to 1.
        labels: Names of the labels.
        dim: Dimension of the vectors.
        epochs: Passes.
        lr: Learning rate, falling to 0.
        word_ngrams: Longest word n-gram.
        min_count: Rarer words are left out of the vocabulary.
        n_buckets: Hash buckets of the n-grams.
        seed: Seed of the initial vectors and of the order.
        weights: How much each text counts, beside the others; by default all the same.

    Returns:
        The content of a fastText model file, and the mean loss of each pass (nats).

    Raises:
        PunaError: There is no word to learn from, or the training diverged.
    """
    vocabulary = _vocabulary(lines, min_count)
    n_buckets = n_buckets if word_ngrams > 1 else 0
    settings = fixed(np.array([word_ngrams, 0, 0, len(vocabulary), n_buckets], np.int64))
    word_data = np.frombuffer(b"".join(word for word, _ in vocabulary), np.uint8)
    sizes = [len(word) for word, _ in vocabulary]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    slots = fixed(word_slots(fixed(word_data), fixed(offsets)))
    tables = (slots, fixed(word_data), fixed(offsets), settings)
    ends = np.zeros(len(lines) + 1, np.int64)
    n_features = _all_features(lines.data, lines.offsets, *tables, ends, np.empty(0, np.int32))
    features = np.empty(n_features, np.int32)
    _all_features(lines.data, lines.offsets, *tables, ends, features)
    random = np.random.Generator(np.random.PCG64(seed))
    inputs = random.random((len(vocabulary) + n_buckets, dim), np.float32) * np.float32(2 / dim)
    inputs -= np.float32(1 / dim)
    used = np.zeros(len(inputs), bool)
    used[features] = True
    inputs[~used] = 0
    outputs = np.zeros((len(labels), dim), np.float32)
    shares = targets if targets.ndim == 2 else np.eye(len(labels))[targets]
    shares = fixed(shares.astype(np.float32))
    scale = np.ones(len(lines)) if weights is None else weights / weights.mean()
    scale = fixed(scale.astype(np.float32))
    losses = []
    for epoch in range(epochs):
        order = random.permutation(len(lines))
        at, end = (lr * (1 - done / epochs) for done in (epoch, epoch + 1))
        loss = _pass(ends, features, shares, scale, order, inputs, outputs, at, end)
        if not np.isfinite(loss) or not np.isfinite(outputs).all():
            raise PunaError(f"the training diverged in pass {epoch + 1}", "lower `lr`")
        losses.append(float(loss))
    settings_of_file = {
        "dim": dim, "ws": 5, "epoch": epochs, "min_count": min_count, "neg": 5,
        "word_ngrams": word_ngrams, "loss": 3, "model": 3, "bucket": n_buckets, "minn": 0,
        "maxn": 0, "lr_update_rate": 100,
    }  # fmt: skip
    counts = np.rint(shares.sum(0, dtype=np.float64)).astype(int)
    named = [
        (f"{LABEL_PREFIX}{name}".encode(), int(n)) for name, n in zip(labels, counts, strict=True)
    ]
    return _to_file(settings_of_file, vocabulary, named, inputs, outputs), losses


def _vocabulary(lines: Texts, min_count: int) -> list[tuple[bytes, int]]:
    """Return the words and their counts, the most frequent first."""
    counts: Counter[bytes] = Counter()
    for index in range(len(lines)):
        counts.update(bytes(lines.bytes_of(index)).split())
    counts[_END] = len(lines)
    kept = [(word, n) for word, n in counts.items() if n >= min_count]
    if len(kept) < 2:
        raise PunaError(
            f"no word occurs at least {min_count} times in the training texts",
            "give more texts, or lower `min_count`",
        )
    return sorted(kept, key=lambda item: (-item[1], item[0]))


def _to_file(
    settings: dict[str, int],
    words: list[tuple[bytes, int]],
    labels: list[tuple[bytes, int]],
    inputs: np.ndarray,
    outputs: np.ndarray,
) -> bytes:
    """Write the file of the fastText library."""
    n_tokens = sum(n for _, n in (*words, *labels))
    parts = [
        struct.pack(f"<{2 + len(MODEL_ARGS)}id", MODEL_MAGIC, MODEL_VERSION,
                    *(settings[name] for name in MODEL_ARGS), 1e-4),
        struct.pack("<iiiqq", len(words) + len(labels), len(words), len(labels), n_tokens, -1),
        *(word + b"\0" + struct.pack("<qb", n, 0) for word, n in words),
        *(label + b"\0" + struct.pack("<qb", n, 1) for label, n in labels),
    ]  # fmt: skip
    for matrix in (inputs, outputs):
        parts += [struct.pack("<?qq", False, *matrix.shape), matrix.astype("<f4").tobytes()]
    return b"".join(parts)
