"""Finding examples in documents, and what is done with the documents, as kernels of the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from puna.core.registry import Registry
from puna.data.decontaminate.examples import Example
from puna.data.decontaminate.grouping import group_hits, merge_spans
from puna.data.decontaminate.index import (
    NgramRule,
    build_index,
    hash_index,
    load_index,
    save_common,
)
from puna.data.decontaminate.kernels import find_examples
from puna.data.engine import Engine, Kernel, Shard
from puna.data.engine.base import ROWS_DIR
from puna.data.engine.shards import VERDICT_FIELDS
from puna.data.kernels.buffers import texts_from, texts_of

HIT_TYPE = pa.struct(
    [
        pa.field("set", pa.string()),
        pa.field("example", pa.int64()),
        pa.field("coverage", pa.float64()),
        pa.field("start", pa.int64()),
        pa.field("end", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("counts", pa.bool_()),
        pa.field("method", pa.string()),
        pa.field("threshold", pa.float64()),
    ]
)
"""An example in a document: its set and the number of its record, the share of its words that the
document has in common with it (or, of method `embedding`, the cosine), bytes of the document and
text of the longest piece in common (at most :data:`SHOWN_BYTES` of it), and whether the coverage is
enough; the method that found it, and the coverage or
cosine from which it counts."""

MATCH_SCHEMA = pa.schema(
    [
        pa.field("hits", pa.list_(HIT_TYPE)),
        pa.field("spans", pa.list_(pa.int64())),
    ]
)
"""What a matcher's kernel returns for each document: the hits, best first, and the bytes where the
pieces of those that count begin and end (begin, end, begin, end, ...; ordered, not overlapping)."""

SHOWN_BYTES = 1000


class Matcher(Protocol):
    """A way to find evaluation examples in documents.

    N-grams and embeddings (:mod:`puna.data.decontaminate.meaning`) are built in. Others are
    registered in :data:`MATCHERS` under their own names and have the same result.
    """

    def prepare(
        self, examples: Iterable[Example], folder: Path, engine: Engine, documents: Path
    ) -> tuple[Kernel, dict[str, dict[str, int]]]:
        """Index the examples.

        Args:
            examples: The records of all sets.
            folder: Empty folder for what the kernel needs.
            engine: For passes over the documents that are needed before.
            documents: Folder of the documents that will be searched.

        Returns:
            A kernel over the column ``text`` that adds :data:`MATCH_SCHEMA`, and counts per set:
            at least ``examples`` and ``indexed``, those that are looked for.
        """
        ...


MATCHERS: Registry[Any] = Registry("matcher")
"""Name -> function that makes a :class:`Matcher` from the stage's configuration."""


@dataclass(frozen=True)
class NgramMatcher:
    """Finds word n-grams of the examples.

    Attributes:
        rule: What is looked for.
        min_coverage: Share of an example's words from which a hit counts.
        max_docs: N-grams that stand in more documents are common phrases; 0: there is no limit.
    """

    rule: NgramRule
    min_coverage: float
    max_docs: int = 0

    def prepare(
        self, examples: Iterable[Example], folder: Path, engine: Engine, documents: Path
    ) -> tuple[Kernel, dict[str, dict[str, int]]]:
        """See :meth:`Matcher.prepare`."""
        counts = build_index(examples, self.rule, folder)
        if self.max_docs:
            self._leave_out_common(folder, engine, documents)
        return MatchKernel(self.rule, self.min_coverage, hash_index(folder), folder), counts

    def _leave_out_common(self, folder: Path, engine: Engine, documents: Path) -> None:
        """Count the documents in which each posting stands."""
        index_hash = hash_index(folder)
        out = folder.parent / "postings"
        engine.annotate(
            "data.decontaminate: common", documents, out, PostingKernel(index_hash, folder)
        )
        rows = engine.read(out / ROWS_DIR)
        rows = rows.select("id", posting=rows.postings.unnest())
        n_docs = rows.group_by("posting").agg(n=rows.id.count())
        common = engine.collect(n_docs.filter(n_docs.n > self.max_docs), ["posting"])
        is_common = np.zeros(len(load_index(folder, index_hash).is_common), bool)
        is_common[common["posting"].to_numpy()] = True
        save_common(folder, is_common)


@dataclass(frozen=True)
class PostingKernel:
    """Finds which postings of an index each document holds (column ``postings``, each once).

    Attributes:
        index_hash: Digest of the index.
        folder: Folder of the index.
    """

    index_hash: str
    folder: Path = field(repr=False)
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the column."""
        return pa.schema([pa.field("postings", pa.list_(pa.int64()))])

    def prepare(self) -> None:
        """Compile."""
        find_examples(texts_from(["a b c"]), load_index(self.folder, self.index_hash).index)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return the postings of each document."""
        texts = texts_of(batch.column("text"))
        rows = find_examples(texts, load_index(self.folder, self.index_hash).index)
        pairs = np.unique(rows[:, :2], axis=0)
        bounds = list_bounds(pairs[:, 0], len(texts))
        postings = pa.ListArray.from_arrays(bounds, pa.array(pairs[:, 1]))
        return pa.RecordBatch.from_arrays([postings], schema=self.adds())


@dataclass(frozen=True)
class MatchKernel:
    """Finds the examples of an index in documents.

    Attributes:
        rule: What is looked for.
        min_coverage: Share of an example's words from which a hit counts.
        index_hash: Digest of the index.
        folder: Folder of the index.
    """

    rule: NgramRule
    min_coverage: float
    index_hash: str
    folder: Path = field(repr=False)
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return :data:`MATCH_SCHEMA`."""
        return MATCH_SCHEMA

    def prepare(self) -> None:
        """Compile."""
        index = load_index(self.folder, self.index_hash).index
        rows = find_examples(texts_from(["a b c"]), index)
        group_hits(rows, index)
        merge_spans(rows)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return the hits of each document."""
        texts = texts_of(batch.column("text"))
        loaded = load_index(self.folder, self.index_hash)
        rows = find_examples(texts, loaded.index)
        rows = rows[~loaded.is_common[rows[:, 1]]]
        pairs = group_hits(rows, loaded.index)
        counts = pairs.coverage >= self.min_coverage
        spans = merge_spans(rows[counts[pairs.of_row]])
        owners = loaded.owners[pairs.example]
        order = np.lexsort((owners[:, 1], owners[:, 0], -pairs.coverage, pairs.document))
        shown = [
            bytes(texts.bytes_of(document)[start : min(end, start + SHOWN_BYTES)])
            for document, start, end in zip(
                pairs.document[order], pairs.start[order], pairs.end[order], strict=True
            )
        ]
        columns = [
            pa.array([loaded.sets[number] for number in owners[order, 0]], pa.string()),
            pa.array(owners[order, 1], pa.int64()),
            pa.array(pairs.coverage[order]),
            pa.array(pairs.start[order]),
            pa.array(pairs.end[order]),
            pa.array([raw.decode("utf-8", "ignore") for raw in shown], pa.string()),
            pa.array(counts[order]),
            pa.array(["ngrams"] * len(order), pa.string()),
            pa.array([self.min_coverage] * len(order), pa.float64()),
        ]
        hits = pa.StructArray.from_arrays(columns, fields=list(HIT_TYPE))
        arrays = [
            pa.ListArray.from_arrays(list_bounds(pairs.document, len(texts)), hits),
            pa.ListArray.from_arrays(list_bounds(np.repeat(spans[:, 0], 2), len(texts)),
                                     pa.array(spans[:, 1:].ravel())),
        ]  # fmt: skip
        return pa.RecordBatch.from_arrays(arrays, schema=MATCH_SCHEMA)


def list_bounds(documents: np.ndarray, n_docs: int) -> pa.Array:
    """Return where each document's entries begin, given the ordered documents of all entries."""
    return pa.array(np.searchsorted(documents, np.arange(n_docs + 1)), pa.int32())


@dataclass(frozen=True)
class DecontaminateKernel:
    """Drops documents with hits, or cuts the hits out of them.

    Attributes:
        action: ``drop`` or ``cut``.
        window_chars: Characters cut before and behind each piece in common.
        min_piece_chars: Shorter pieces between two cuts are cut, too.
        max_pieces: Documents that fall into more pieces are dropped.
        min_left_bytes: Documents of which less is left are dropped.
    """

    action: str
    window_chars: int
    min_piece_chars: int
    max_pieces: int
    min_left_bytes: int
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the verdict and, when hits are cut out, the new text and the number of cuts."""
        cut = [pa.field("text", pa.large_string()), pa.field("eval_spans_cut", pa.int32())]
        return pa.schema([*VERDICT_FIELDS, *(cut if self.action == "cut" else ())])

    def prepare(self) -> None:
        """Nothing to compile."""

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Judge the documents by the columns ``hits`` and ``spans`` of the side table."""
        n = batch.num_rows
        verdicts: list[tuple[Any, ...]] = [(None, None, None, None)] * n
        sizes = np.diff(batch.column("spans").offsets.to_numpy())
        new_texts: dict[int, str] = {}
        n_cut = np.zeros(n, np.int32)
        for row in np.flatnonzero(sizes).tolist():
            best = next(hit for hit in batch.column("hits")[row].as_py() if hit["counts"])
            detail = f"{best['set']}#{best['example']}"
            if self.action == "drop":
                reason = reason_of(best["method"])
                verdicts[row] = (reason, best["coverage"], best["threshold"], detail)
                continue
            text = batch.column("text")[row].as_py()
            spans = np.array(batch.column("spans")[row].as_py(), np.int64).reshape(-1, 2)
            pieces = self._pieces(text, spans)
            new_texts[row], n_cut[row] = "\n".join(pieces), len(spans)
            n_left = len(new_texts[row].encode())
            if len(pieces) > self.max_pieces:
                verdicts[row] = ("decontaminate.pieces", len(pieces), self.max_pieces, detail)
            elif n_left < self.min_left_bytes:
                verdicts[row] = ("decontaminate.emptied", n_left, self.min_left_bytes, detail)
        schema = self.adds()
        columns = [pa.array([v[i] for v in verdicts], schema[i].type) for i in range(4)]
        if self.action == "cut":
            columns += [_replaced(batch.column("text"), new_texts), pa.array(n_cut)]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _pieces(self, text: str, spans: np.ndarray) -> list[str]:
        """Return what is left between the spans (bytes) and their windows."""
        raw = text.encode()
        pieces, at = [], 0
        chars = [len(raw[: int(place)].decode()) for place in spans.ravel()]
        for start, end in zip(chars[::2], chars[1::2], strict=True):
            pieces.append(text[at : max(at, start - self.window_chars)])
            at = max(at, end + self.window_chars)
        pieces.append(text[at:])
        return [piece for piece in pieces if len(piece) >= max(self.min_piece_chars, 1)]


def reason_of(method: str) -> str:
    """Return the reason code of what a method drops."""
    return "decontaminate.meaning" if method == "embedding" else "decontaminate.match"


def _replaced(texts: pa.Array, new: dict[int, str]) -> pa.Array:
    """Put some texts in place of others."""
    if not new:
        return texts.cast(pa.large_string())
    parts, at = [], 0
    for row in sorted(new):
        parts += [texts.slice(at, row - at).cast(pa.large_string()),
                  pa.array([new[row]], pa.large_string())]  # fmt: skip
        at = row + 1
    return pa.concat_arrays([*parts, texts.slice(at).cast(pa.large_string())])


def _ngrams(cfg: Any) -> Matcher:
    rule = NgramRule(cfg.ngram, cfg.short_words, cfg.max_shared, cfg.min_different)
    return NgramMatcher(rule, cfg.min_coverage, cfg.max_docs)


MATCHERS.register("ngrams", _ngrams)
