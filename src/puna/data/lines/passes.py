"""The two passes over the text: count lines and tokens, then cut lines and judge documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from puna.data.engine import Shard
from puna.data.engine.shards import VERDICT_FIELDS
from puna.data.kernels.buffers import Texts, texts_from, texts_of
from puna.data.kernels.repetition import COLUMNS, measure_repetition
from puna.data.lines.kernels import (
    LineTable,
    count_keys,
    fold_table,
    long_lines,
    mark_frequent,
    scan_lines,
    without_lines,
)
from puna.data.lines.tokens import count_tokens, divergence

_LINE_COUNTS = pa.list_(pa.struct([("key", pa.int64()), ("n", pa.int64())]))
_TOKEN_COUNTS = pa.list_(pa.struct([("token", pa.int32()), ("n", pa.int64())]))

_SAMPLE = "one two three four five six seven eight\n" * 30
"""Text that the kernels are compiled with."""


@dataclass(frozen=True)
class LineRule:
    """What is a line, and which of them are equal.

    Attributes:
        units: ``line``, ``paragraph`` or both.
        ignore: What does not count in a comparison: ``case``, ``digits``, ``space``.
        min_bytes: Shorter units (normalised) are not compared.
        bucket_docs: Documents of a bucket.
        skip_sources: Sources whose documents are neither counted nor changed.
    """

    units: tuple[str, ...]
    ignore: tuple[str, ...]
    min_bytes: int
    bucket_docs: int
    skip_sources: tuple[str, ...]

    def scan(self, texts: Texts, first_node: int, alive: np.ndarray) -> LineTable:
        """Find the lines of a batch whose first document has this number in the dataset."""
        buckets = (first_node + np.arange(len(texts))) // self.bucket_docs
        return scan_lines(
            texts, buckets, alive, fold_table("case" in self.ignore, "digits" in self.ignore),
            squeeze="space" in self.ignore, min_bytes=self.min_bytes,
        )  # fmt: skip

    def taken(self, sources: np.ndarray) -> np.ndarray:
        """Tell which documents are of a source that is not skipped: bool [n_docs]."""
        return ~np.isin(sources, np.array(self.skip_sources, str))


def _sources(batch: pa.RecordBatch) -> np.ndarray:
    return batch.column("source").to_numpy(zero_copy_only=False).astype(str)


@dataclass(frozen=True)
class CountKernel:
    """Counts the lines and the tokens of each batch, with the first document they belong to.

    Columns: ``node`` (number of the document in the dataset), ``lines`` (key and count in the batch
    of the lines that come first in this document), ``tokens`` (token and count of all documents of
    this source in the batch, with the first of them).

    Attributes:
        rule: What is a line.
        with_tokens: Whether tokens are counted.
    """

    rule: LineRule
    with_tokens: bool
    columns: tuple[str, ...] = field(default=("source", "text"), repr=False)

    def adds(self) -> pa.Schema:
        """Return the three columns."""
        return pa.schema(
            [
                pa.field("node", pa.int64()),
                pa.field("lines", _LINE_COUNTS),
                pa.field("tokens", _TOKEN_COUNTS),
            ]
        )

    def prepare(self) -> None:
        """Compile."""
        batch = pa.RecordBatch.from_arrays(
            [pa.array(["s"]), pa.array([_SAMPLE], pa.large_string())], ["source", "text"]
        )
        self(batch, Shard(0, Path(), 1, 0), 0)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row of counts per document."""
        texts, sources = texts_of(batch.column("text")), _sources(batch)
        first = shard.first_row + first_row
        alive = self.rule.taken(sources)
        lines = self.rule.scan(texts, first, alive)
        arrays = [
            pa.array(first + np.arange(len(texts), dtype=np.int64)),
            self._line_counts(lines, len(texts)),
            self._token_counts(texts, sources, alive),
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())

    def _line_counts(self, lines: LineTable, n_docs: int) -> pa.Array:
        parts = [_units(lines, unit) for unit in self.rule.units]
        counted = [count_keys(keys, bounds) for keys, bounds in parts]
        if not counted:
            return _lists(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(n_docs + 1, int),
                          _LINE_COUNTS)  # fmt: skip
        if len(counted) == 1:
            keys, counts, ends = counted[0]
        else:
            owner = np.concatenate(
                [np.repeat(np.arange(n_docs), np.diff(ends)) for _, _, ends in counted]
            )
            order = np.argsort(owner, kind="stable")
            keys = np.concatenate([part[0] for part in counted])[order]
            counts = np.concatenate([part[1] for part in counted])[order]
            ends = np.sum([part[2] for part in counted], 0)
        return _lists(keys.view(np.int64), counts, ends, _LINE_COUNTS)

    def _token_counts(self, texts: Texts, sources: np.ndarray, alive: np.ndarray) -> pa.Array:
        names, firsts, groups = np.unique(sources, return_index=True, return_inverse=True)
        tokens: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        sizes = np.zeros(len(sources) + 1, np.int64)
        if self.with_tokens:
            table = count_tokens(texts, np.where(alive, groups, -1), len(names))
            for group in np.argsort(firsts):
                found = np.flatnonzero(table[group])
                tokens.append(found)
                counts.append(table[group][found])
                sizes[firsts[group] + 1] = len(found)
        nothing = [np.zeros(0, np.int64)]
        return _lists(np.concatenate(tokens or nothing), np.concatenate(counts or nothing),
                      np.cumsum(sizes), _TOKEN_COUNTS)  # fmt: skip


def _units(lines: LineTable, unit: str) -> tuple[np.ndarray, np.ndarray]:
    if unit == "line":
        return lines.keys, lines.doc_lines
    return lines.paragraph_keys, lines.doc_paragraphs


def _lists(
    names: np.ndarray, counts: np.ndarray, ends: np.ndarray, list_type: pa.ListType
) -> pa.Array:
    fields = list(list_type.value_type)
    values = [pa.array(names).cast(fields[0].type), pa.array(counts)]
    return pa.ListArray.from_arrays(
        pa.array(ends, pa.int32()), pa.StructArray.from_arrays(values, fields=fields)
    )


@dataclass(frozen=True)
class CutRule:
    """Which lines are cut besides the frequent ones, and which documents are dropped.

    Attributes:
        keep_first: Leave the first occurrence of each frequent line.
        ngram_words: Words of the n-grams whose repetition is measured; 0 measures none.
        line_min_bytes: Shorter lines are not measured.
        line_coverage: Lines with a larger share of characters in repeated n-grams are cut.
        doc_coverage: Documents with a larger share are dropped.
        min_left_bytes: Documents of which less is left are dropped, if anything was cut.
        kl_max_nats: Documents with a larger divergence are dropped; 0 measures none.
        kl_min_words: Documents with fewer words are not measured.
        kl_prior_words: Words of the corpus added to each document.
    """

    keep_first: bool
    ngram_words: int
    line_min_bytes: int
    line_coverage: float
    doc_coverage: float
    min_left_bytes: int
    kl_max_nats: float
    kl_min_words: int
    kl_prior_words: int


@dataclass(frozen=True)
class CutKernel:
    """Cuts lines out of texts and judges what is left.

    Attributes:
        rule: What is a line.
        cut: What is cut and dropped.
        counts_hash: Digest of the frequent lines and the distributions.
        counts_dir: Folder of them (see :mod:`puna.data.lines.counts`).
    """

    rule: LineRule
    cut: CutRule
    counts_hash: str
    counts_dir: Path = field(repr=False)
    columns: tuple[str, ...] = field(default=("source", "text"), repr=False)

    def adds(self) -> pa.Schema:
        """Return the verdict, the new text and what was cut from it."""
        return pa.schema(
            [
                *VERDICT_FIELDS,
                pa.field("text", pa.large_string()),
                pa.field("lines_cut", pa.int32()),
                pa.field("ngram_lines_cut", pa.int32()),
                pa.field("bytes_cut", pa.int64()),
            ]
        )

    def prepare(self) -> None:
        """Compile."""
        texts = texts_from([_SAMPLE])
        alive = np.ones(1, bool)
        lines = self.rule.scan(texts, 0, alive)
        mark_frequent(lines.keys, lines.doc_lines, np.zeros(8, np.uint64), np.zeros(8, np.int64), 0,
                      False)  # fmt: skip
        without_lines(texts, lines, self._repetitive(texts, lines))
        measure_repetition(texts, alive)
        if self.cut.kl_max_nats:
            divergence(texts, np.zeros(1, np.int64), np.zeros((1, 1 << 16)), 1)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return verdict and text of each document."""
        texts, sources = texts_of(batch.column("text")), _sources(batch)
        first = shard.first_row + first_row
        alive = self.rule.taken(sources)
        lines = self.rule.scan(texts, first, alive)
        is_frequent = self._frequent(lines, first)
        is_repetitive = self._repetitive(texts, lines) & ~is_frequent
        left, n_cut = without_lines(texts, lines, is_frequent | is_repetitive)
        totals = np.concatenate([[0], np.cumsum(is_repetitive)])
        n_repetitive = np.diff(totals[lines.doc_lines])
        sizes = np.diff(texts.offsets), np.diff(left.offsets)
        verdict = self._judge(left, n_cut, alive, sources)
        arrays = [
            *verdict,
            strings_of(left),
            pa.array(n_cut, pa.int32()),
            pa.array(n_repetitive, pa.int32()),
            pa.array(sizes[0] - sizes[1], pa.int64()),
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())

    def _frequent(self, lines: LineTable, first: int) -> np.ndarray:
        """Mark the lines that are in the table, or whose paragraph is."""
        table, used, _, _ = load_counts(self.counts_dir, self.counts_hash)
        marked = np.zeros(len(lines.keys), bool)
        for unit in self.rule.units:
            keys, bounds = _units(lines, unit)
            found = mark_frequent(keys, bounds, table, used, first, self.cut.keep_first)
            marked |= found if unit == "line" else np.append(found, False)[lines.paragraphs]
        return marked

    def _repetitive(self, texts: Texts, lines: LineTable) -> np.ndarray:
        """Mark the long lines that consist of repeated n-grams."""
        marked = np.zeros(len(lines.keys), bool)
        if self.cut.ngram_words and self.cut.line_coverage < 1:
            numbers, view = long_lines(texts, lines, self.cut.line_min_bytes)
            is_line = np.arange(len(view)) % 2 == 1
            share = measure_repetition(view, is_line)[1::2, self._ngram_column()]
            marked[numbers] = share > self.cut.line_coverage
        marked &= lines.paragraphs >= 0  # not those of sources that are skipped
        return marked

    def _ngram_column(self) -> int:
        return COLUMNS.index(f"dup_{self.cut.ngram_words}gram_share")

    def _judge(
        self, left: Texts, n_cut: np.ndarray, alive: np.ndarray, sources: np.ndarray
    ) -> list[pa.Array]:
        """Return the four verdict columns; the first check that fails decides."""
        cut, n = self.cut, len(left)
        kept = np.ones(n, bool)
        reason, value, threshold = np.full(n, None), np.zeros(n), np.zeros(n)

        def drop(failed: np.ndarray, why: str, measured: np.ndarray, limit: float) -> None:
            newly = failed & alive & kept
            kept[newly] = False
            reason[newly], value[newly], threshold[newly] = why, measured[newly], limit

        sizes = np.diff(left.offsets)
        is_short = (n_cut > 0) & (sizes < cut.min_left_bytes)
        drop(is_short, "lines.emptied", sizes, cut.min_left_bytes)
        if cut.ngram_words and cut.doc_coverage < 1:
            share = measure_repetition(left, alive & ~is_short)[:, self._ngram_column()]
            drop(share > cut.doc_coverage, "lines.ngram_coverage", share, cut.doc_coverage)
        if cut.kl_max_nats:
            _, _, names, log_q = load_counts(self.counts_dir, self.counts_hash)
            groups = np.searchsorted(names, sources)
            nats, n_words = divergence(left, np.where(alive, groups, -1), log_q, cut.kl_prior_words)
            is_outlier = (n_words >= cut.kl_min_words) & (nats > cut.kl_max_nats)
            drop(is_outlier, "lines.kl_outlier", nats, cut.kl_max_nats)
        return [
            pa.array(reason.tolist(), pa.string()),
            pa.array(value, pa.float64(), mask=kept),
            pa.array(threshold, pa.float64(), mask=kept),
            pa.nulls(n, pa.string()),
        ]


def strings_of(texts: Texts) -> pa.Array:
    """Return texts as an Arrow array that shares their memory."""
    buffers = [None, pa.py_buffer(texts.offsets), pa.py_buffer(texts.data)]
    return pa.Array.from_buffers(pa.large_string(), len(texts), buffers)


@lru_cache(maxsize=1)
def load_counts(
    folder: Path, counts_hash: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Open what the counting left: keys and first documents of frequent lines, sources, log q.

    The table is mapped into memory, so that worker processes share it.

    Args:
        folder: Folder of the files.
        counts_hash: Their digest; a change is not missed by the cache.
    """
    table, used = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("keys", "firsts"))
    return table, used, np.load(folder / "sources.npy"), np.load(folder / "log_q.npy")
