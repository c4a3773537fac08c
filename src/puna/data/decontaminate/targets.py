"""What is looked for by meaning, and the search: embeddings of examples, cosines with windows.

Embeddings are rounded to small integers, so that every product is exact, as in
:mod:`puna.data.semantic.clusters`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from puna.core.fsio import hash_file, hash_json, write_json
from puna.data.decontaminate.examples import Example
from puna.data.decontaminate.windows import Windows, size_class, windows_of
from puna.data.semantic.clusters import BLOCK, cosines, quantise, squares_of
from puna.data.semantic.embedder import Embedder
from puna.data.semantic.passages import Passages, frame

CUT = Passages(256, 1)
"""An embedder is opened with this: tokens of the longest window; windows are cut here."""
_NAMES_FILE, _VECTORS_FILE, _THRESHOLDS_FILE = "targets.json", "targets.npy", "thresholds.npy"
_TEXTS = 128
"""Texts whose cosines with all targets are in memory at once, beside the blocks."""
_USUAL = 3
"""Largest cosines of clean texts whose mean is what is usual for a target (ours)."""
_ALIKE = 0.99
"""Highest cosine that counts as usual (ours): a copy among the clean texts hides no example."""


class Targets(NamedTuple):
    """The embeddings that are looked for.

    Attributes:
        vectors: int8 [n, dim].
        sizes: Size of the windows that each is compared with, int64 [n].
        examples: Number of each one's example, int64 [n].
        sets: Names of the sets.
        owners: Set and record of each example, int64 [n_examples, 2].
        thresholds: Cosine of a hit of each, float64 [n].
    """

    vectors: np.ndarray
    sizes: np.ndarray
    examples: np.ndarray
    sets: list[str]
    owners: np.ndarray
    thresholds: np.ndarray


class Found(NamedTuple):
    """Pairs of a window and an example at or above a cosine.

    Attributes:
        document: int64 [n].
        example: int64 [n].
        cosine: float64 [n].
        start: Character of the document where the window begins, int64 [n].
        end: Where it ends, int64 [n].
        threshold: Of the example, float64 [n].
    """

    document: np.ndarray
    example: np.ndarray
    cosine: np.ndarray
    start: np.ndarray
    end: np.ndarray
    threshold: np.ndarray


def embed_tokens(embedder: Embedder, passages: list[list[int]]) -> np.ndarray:
    """Return the quantised embeddings of token ids without special tokens: int8 [n, dim]."""
    if not passages:
        return np.zeros((0, embedder.model.dim), np.int8)
    if embedder.special:
        before, behind = frame(embedder.model.tokenizer)
        room = embedder.passages.n_tokens - len(before) - len(behind)
        passages = [[*before, *ids[:room], *behind] for ids in passages]
    return quantise(embedder.model.embed(passages))


class Block(NamedTuple):
    """Windows of some documents, and the targets that they are compared with.

    Attributes:
        vectors: Of the windows, int8 [n, dim].
        documents: Of each, int64 [n].
        spans: Characters where each begins and ends, int64 [n, 2].
        targets: Numbers of the targets, int64 [m].
    """

    vectors: np.ndarray
    documents: np.ndarray
    spans: np.ndarray
    targets: np.ndarray


def blocks_of(embedder: Embedder, targets: Targets, texts: list[str]) -> Iterator[Block]:
    """Embed the windows of texts, at most 4096 at a time; each block has one size of windows."""
    of_size = {
        int(size): np.flatnonzero(targets.sizes == size) for size in np.unique(targets.sizes)
    }
    for first, waiting in _groups(embedder, texts, list(of_size)):
        owners = np.repeat(np.arange(len(waiting)), [len(one.windows) for one in waiting])
        starts = np.cumsum([0, *(len(one.windows) for one in waiting)])
        for low in range(0, len(owners), BLOCK):
            rows = np.arange(low, min(low + BLOCK, len(owners)))
            places = [(waiting[owner], int(row - starts[owner]))
                      for owner, row in zip(owners[rows].tolist(), rows, strict=True)]  # fmt: skip
            vectors = embed_tokens(embedder, [one.tokens(k) for one, k in places])
            spans = np.array([one.span(k) for one, k in places], np.int64)
            for size, wanted in of_size.items():
                chosen = np.concatenate([
                    one.of_size[size] + start
                    for one, start in zip(waiting, starts[:-1], strict=True)
                ])  # fmt: skip
                chosen = chosen[(chosen >= low) & (chosen < low + BLOCK)]
                here = chosen - low
                yield Block(vectors[here], owners[chosen] + first, spans[here], wanted)


def _groups(
    embedder: Embedder, texts: list[str], sizes: list[int], step: int = 64
) -> Iterator[tuple[int, list[Windows]]]:
    """Yield the windows of some documents at a time, and the first one's number."""
    for first in range(0, len(texts), step):
        yield first, windows_of(embedder.model.tokenizer, texts[first : first + step], sizes)


def _pairs(
    a: np.ndarray, b: np.ndarray, thresholds: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the pairs of rows with at least the cosine of the second, block by block."""
    roots_a = np.sqrt(squares_of(a))
    wide = a.astype(np.float32)
    for start in range(0, len(b), BLOCK):
        part = b[start : start + BLOCK]
        roots_b = np.sqrt(squares_of(part))
        products = wide @ part.astype(np.float32).T  # exact
        # float32 chooses candidates, float64 decides
        wanted = thresholds[start : start + BLOCK]
        limit = np.outer(roots_a, wanted * roots_b).astype(np.float32)
        rows, columns = np.nonzero(products >= limit - np.float32(1e-3) * np.abs(limit))
        found = products[rows, columns] / (roots_a[rows] * roots_b[columns])
        right = found >= wanted[columns]
        yield rows[right], columns[right] + start, found[right]


def find_examples(embedder: Embedder, targets: Targets, texts: list[str]) -> Found:
    """Return, for every document and example, all windows at or above the example's threshold.

    Ordered by document, example, start, end.
    """
    columns: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in range(6)]
    columns[2], columns[5] = [np.empty(0)], [np.empty(0)]
    for block in blocks_of(embedder, targets, texts):
        limits = targets.thresholds[block.targets]
        for rows, which, cosine in _pairs(block.vectors, targets.vectors[block.targets], limits):
            examples, spans = targets.examples[block.targets[which]], block.spans[rows]
            parts = (block.documents[rows], examples, cosine, spans[:, 0], spans[:, 1],
                     limits[which])  # fmt: skip
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
    joined = Found(*(np.concatenate(column) for column in columns))
    order = np.lexsort((joined.end, joined.start, joined.example, joined.document))
    return Found(*(column[order] for column in joined))


def best_cosines(embedder: Embedder, targets: Targets, texts: list[str]) -> Iterator[np.ndarray]:
    """Yield, for some texts at a time, the largest cosine of a window with every target.

    Yields:
        float32 [n, n_targets]; -1 for a text without a window.
    """
    for start in range(0, len(texts), _TEXTS):
        part = texts[start : start + _TEXTS]
        best = np.full((len(part), len(targets.vectors)), -1, np.float32)
        for block in blocks_of(embedder, targets, part):
            firsts = np.flatnonzero(np.diff(block.documents, prepend=-1))
            for low in range(0, len(block.targets) if len(firsts) else 0, BLOCK):
                which = block.targets[low : low + BLOCK]
                found = cosines(block.vectors, targets.vectors[which]).astype(np.float32)
                place = np.ix_(block.documents[firsts], which)
                best[place] = np.maximum(best[place], np.maximum.reduceat(found, firsts))
        yield best


@dataclass(frozen=True)
class Calibration:
    """Thresholds found on texts that hold no example.

    Attributes:
        usual: Cosine that texts have with each target anyway, float64 [n_targets].
        above: Share of the way from there to 1 that is a hit.
    """

    usual: np.ndarray
    above: float

    def thresholds(self) -> np.ndarray:
        """Return the cosine of a hit of each target, float64 [n_targets]."""
        return self.usual + self.above * (1 - self.usual)


def calibrate(
    embedder: Embedder, targets: Targets, texts: list[str], false_positives: float
) -> Calibration:
    """Find the thresholds at which at most a share of clean texts is hit.

    Many texts are near to an example that says little ("See the following table"), few to one that
    says something: each has a threshold of its own (after the local scaling of Conneau et al. 2018,
    "Word Translation Without Parallel Data"; this form is ours). Every second text tells what is
    usual: the mean of its three largest cosines; the others tell how much more is a hit.

    Args:
        embedder: The embedder.
        targets: What is looked for; at least one.
        texts: The clean texts, at least six.
        false_positives: The share.
    """
    top = np.zeros((0, len(targets.vectors)), np.float32)
    for best in best_cosines(embedder, targets, texts[::2]):
        top = np.sort(np.concatenate([top, best]), axis=0)[-_USUAL:]
    usual = np.minimum(top.mean(0, dtype=np.float64), _ALIKE)
    above = [((best - usual) / (1 - usual)).max(1)
             for best in best_cosines(embedder, targets, texts[1::2])]  # fmt: skip
    ordered = np.sort(np.concatenate(above))[::-1]
    n_allowed = min(int(false_positives * len(ordered) + 1e-9), len(ordered) - 1)
    # a little above the best text that must not be hit: it was compared in float32
    return Calibration(usual, float(ordered[n_allowed]) + 1e-6)


def build_targets(
    embedder: Embedder, examples: Iterable[Example], min_words: int, folder: Path
) -> dict[str, dict[str, int]]:
    """Embed the examples, and each field, and write them to a folder.

    Returns:
        Per set: ``examples``, ``too_short`` (fewer words than ``min_words``, or no known token) and
        ``indexed``, the rest.
    """
    given = list(examples)
    texts, owners = [], []
    for number, example in enumerate(given):
        wholes = dict.fromkeys([" ".join(example.parts), *example.parts])
        long = [text for text in wholes if len(text.split()) >= min_words]
        texts += long
        owners += [number] * len(long)
    encoded = embedder.model.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = [one.ids[: CUT.n_tokens] for one in encoded]
    vectors = embed_tokens(embedder, [one or [0] for one in ids])
    known = vectors.any(1) & np.array([len(one) > 0 for one in ids], bool)
    sizes = np.array([size_class(len(one)) for one in ids], np.int64)
    sets = list(dict.fromkeys(example.set_name for example in given))
    numbers = {name: number for number, name in enumerate(sets)}
    np.save(folder / _VECTORS_FILE, vectors[known], allow_pickle=False)
    save_thresholds(folder, np.ones(int(known.sum())))
    kept = np.array(owners, np.int64)[known]
    write_json(
        folder / _NAMES_FILE,
        {
            "sets": sets, "sizes": sizes[known].tolist(), "examples": kept.tolist(),
            "owners": [(numbers[one.set_name], one.index) for one in given],
        },
    )  # fmt: skip
    indexed = np.isin(np.arange(len(given)), kept)
    names = np.array([one.set_name for one in given])
    return {
        name: {
            "examples": int((names == name).sum()),
            "too_short": int(((names == name) & ~indexed).sum()),
            "indexed": int(((names == name) & indexed).sum()),
        }
        for name in sets
    }


def save_thresholds(folder: Path, thresholds: np.ndarray) -> None:
    """Set the cosine of a hit of each target, float64 [n_targets]."""
    np.save(folder / _THRESHOLDS_FILE, thresholds, allow_pickle=False)


def hash_targets(folder: Path) -> str:
    """Return the digest of what :func:`build_targets` wrote."""
    return hash_json(
        {name: hash_file(folder / name) for name in (_NAMES_FILE, _VECTORS_FILE, _THRESHOLDS_FILE)}
    )


@lru_cache(maxsize=1)
def load_targets(folder: Path, digest: str) -> Targets:
    """Load what :func:`build_targets` wrote; kept by the process."""
    names: dict[str, Any] = json.loads((folder / _NAMES_FILE).read_text(encoding="utf-8"))
    vectors = np.load(folder / _VECTORS_FILE, allow_pickle=False)
    owners = np.array(names["owners"], np.int64).reshape(-1, 2)
    sizes, examples = (np.array(names[key], np.int64) for key in ("sizes", "examples"))
    thresholds = np.load(folder / _THRESHOLDS_FILE, allow_pickle=False)
    return Targets(vectors, sizes, examples, names["sets"], owners, thresholds)
