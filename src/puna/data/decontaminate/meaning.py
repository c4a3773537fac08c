"""Finding examples that a document says in other words: cosines of embeddings.

Every example, and each of its fields that is long enough, has an embedding; so have the windows of
the documents (:mod:`puna.data.decontaminate.windows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from puna.core.errors import PunaError
from puna.data.decontaminate.examples import Example
from puna.data.decontaminate.matching import (
    HIT_TYPE,
    MATCH_SCHEMA,
    MATCHERS,
    SHOWN_BYTES,
    Matcher,
    list_bounds,
)
from puna.data.decontaminate.targets import (
    CUT,
    Found,
    Targets,
    build_targets,
    calibrate,
    find_examples,
    hash_targets,
    load_targets,
    save_thresholds,
)
from puna.data.engine import Engine, Kernel, Shard
from puna.data.semantic.embedder import Embedder, cached_embedder, digest_of


@dataclass(frozen=True)
class MeaningMatcher:
    """Finds examples by the cosine of embeddings.

    Attributes:
        folder: Of the embedder.
        digest: Digest it must have; None: any.
        device: Where an encoder runs.
        min_words: Examples and fields with fewer words are not looked for.
        threshold: Cosine of a hit; None: found with ``negatives``.
        negatives: Places of texts that hold no example.
        false_positives: Share of them that may be hit.
    """

    folder: Path
    digest: str | None
    device: str
    min_words: int
    threshold: float | None
    negatives: Sequence[str]
    false_positives: float

    def prepare(
        self, examples: Iterable[Example], folder: Path, engine: Engine, documents: Path
    ) -> tuple[Kernel, dict[str, dict[str, int]]]:
        """See :meth:`puna.data.decontaminate.matching.Matcher.prepare`."""
        digest = digest_of(self.folder)
        if self.digest not in (None, digest):
            raise PunaError(
                f"data.decontaminate: {self.folder} has the digest {digest}, not {self.digest}",
                "give the right embedder, or correct `digest`",
            )
        embedder = cached_embedder(str(self.folder), digest, CUT, self.device)
        counts = build_targets(embedder, examples, self.min_words, folder)
        targets = load_targets(folder, hash_targets(folder))
        if self.threshold is not None:
            limit, thresholds = self.threshold, np.full(len(targets.vectors), self.threshold)
        else:
            limit, thresholds = self._calibrate(embedder, targets)
        save_thresholds(folder, thresholds)
        kernel = MeaningKernel(
            digest, hash_targets(folder), limit, folder, self.folder, self.device
        )  # fmt: skip
        return kernel, counts

    def _calibrate(self, embedder: Embedder, targets: Targets) -> tuple[float, np.ndarray]:
        from puna.data.quality.examples import Fields, read_place

        texts = [item.text for place in self.negatives for item in read_place(place, Fields())]
        if len(texts) < 20 or len(texts) // 2 * self.false_positives < 1:
            raise PunaError(
                f"data.decontaminate: {len(texts)} negatives are too few for a share of false "
                f"positives of {self.false_positives:g}",
                "give at least 2 / false_positives of them, and 20, or a `threshold`",
            )
        if not len(targets.vectors):
            return 1.0, np.ones(0)  # the stage refuses a set without any
        found = calibrate(embedder, targets, texts, self.false_positives)
        return found.above, found.thresholds()


@dataclass(frozen=True)
class MeaningKernel:
    """Finds the examples that documents say in other words.

    Attributes:
        digest: Of the embedder.
        targets_hash: Of what is looked for.
        threshold: Cosine of a hit, or how far above the usual it must be
            (:class:`puna.data.decontaminate.targets.Calibration`); for the metrics.
        folder: Of what is looked for.
        embedder: Folder of the embedder.
        device: Where an encoder runs.
    """

    digest: str
    targets_hash: str
    threshold: float
    folder: Path = field(repr=False)
    embedder: Path = field(repr=False)
    device: str = field(repr=False)
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return :data:`MATCH_SCHEMA`; ``coverage`` holds the cosine."""
        return MATCH_SCHEMA

    def prepare(self) -> None:
        """Load and compile."""
        self._find(["Some words. More of them."])

    def _find(self, texts: list[str]) -> tuple[Found, Targets]:
        embedder = cached_embedder(str(self.embedder), self.digest, CUT, self.device)
        targets = load_targets(self.folder, self.targets_hash)
        return find_examples(embedder, targets, texts), targets

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return the hits of each document: of an example, the window that is most like it."""
        texts = batch.column("text").to_pylist()
        found, targets = self._find(texts)
        best = _best(found)
        owners = targets.owners[best.example]
        order = np.lexsort((owners[:, 1], owners[:, 0], -best.cosine, best.document))
        best, owners = Found(*(column[order] for column in best)), owners[order]
        places = [_bytes(texts[d], a, b) for d, a, b in
                  zip(best.document, best.start, best.end, strict=True)]  # fmt: skip
        columns = [
            pa.array([targets.sets[number] for number in owners[:, 0]], pa.string()),
            pa.array(owners[:, 1], pa.int64()),
            pa.array(best.cosine),
            pa.array([place[0] for place in places], pa.int64()),
            pa.array([place[1] for place in places], pa.int64()),
            pa.array([place[2] for place in places], pa.string()),
            pa.array(np.ones(len(order), bool)),
            pa.array(["embedding"] * len(order), pa.string()),
            pa.array(best.threshold),
        ]
        hits = pa.StructArray.from_arrays(columns, fields=list(HIT_TYPE))
        documents, spans = _merged(found, texts)
        arrays = [
            pa.ListArray.from_arrays(list_bounds(best.document, len(texts)), hits),
            pa.ListArray.from_arrays(list_bounds(np.repeat(documents, 2), len(texts)),
                                     pa.array(spans.ravel())),
        ]  # fmt: skip
        return pa.RecordBatch.from_arrays(arrays, schema=MATCH_SCHEMA)


def _bytes(text: str, start: int, end: int) -> tuple[int, int, str]:
    """Return where a piece begins and ends in bytes, and what is shown of it."""
    first = len(text[:start].encode())
    raw = text[start:end].encode()
    return first, first + len(raw), raw[:SHOWN_BYTES].decode("utf-8", "ignore")


def _best(found: Found) -> Found:
    """Return the window of the largest cosine per document and example; of equal ones the first."""
    order = np.lexsort((found.end, found.start, -found.cosine, found.example, found.document))
    pairs = np.stack([found.document[order], found.example[order]], 1)
    is_first = np.ones(len(order), bool)
    is_first[1:] = (pairs[1:] != pairs[:-1]).any(1)
    return Found(*(column[order[is_first]] for column in found))


def _merged(found: Found, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Join the windows of all hits that overlap: documents [n] and bytes [n, 2], in order."""
    spans: list[list[int]] = []
    order = np.lexsort((found.end, found.start, found.document))
    for k in order.tolist():
        document, start, end = int(found.document[k]), int(found.start[k]), int(found.end[k])
        if spans and spans[-1][0] == document and start <= spans[-1][2]:
            spans[-1][2] = max(spans[-1][2], end)
        else:
            spans.append([document, start, end])
    places = [_bytes(texts[document], start, end)[:2] for document, start, end in spans]
    documents = np.array([one[0] for one in spans], np.int64)
    return documents, np.array(places, np.int64).reshape(-1, 2)


def _meaning(cfg: Any) -> Matcher:
    return MeaningMatcher(
        Path(cfg.embedder), cfg.digest, cfg.device, cfg.short_words, cfg.threshold, cfg.negatives,
        cfg.false_positives,
    )  # fmt: skip


MATCHERS.register("embedding", _meaning)
