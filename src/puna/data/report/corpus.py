"""A corpus in numbers: what there was before the first stage, and after the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from puna.data.filters.languages import language_of
from puna.data.kernels.buffers import texts_of
from puna.data.kernels.language import identify
from puna.data.kernels.minhash import normalised
from puna.data.report.folders import DataStage, Place, row_groups
from puna.data.report.histogram import histogram
from puna.data.report.sample import Sample

TOKENS_COLUMN = "n_tokens"
"""Tokens of each document, once a tokenizer has counted them."""
_COLUMNS = ("source", "path", "metadata", "n_bytes", TOKENS_COLUMN)
SEGMENT_WORDS = 1000
_WORD_DOCS, _WORD_CHARS = 5000, 10_000
_MAX_LISTED = 12
_HOST = r'(?i)(?:^|"url":")https?://(?:www\.)?(?P<host>[^/":?#\\]+)'


class Corpus:
    """Counts over all documents, and measures of a sample of them.

    Args:
        stage: Whose documents.
        places: What it kept, or both, which is what came to it.
        sample: Some of these documents.
    """

    def __init__(self, stage: DataStage, places: Sequence[Place], sample: Sample | None) -> None:
        sizes, hosts = [np.zeros(0, np.int64)], Counter[str]()
        sources: dict[str, list[int]] = {}
        self.n_tokens: int | None = None
        for place in places:
            for _, _, table in stage.tables(place, _COLUMNS):
                if TOKENS_COLUMN in table.column_names:
                    counts = table[TOKENS_COLUMN].to_numpy()
                    self.n_tokens = (self.n_tokens or 0) + int(np.nansum(counts))
                n_bytes = table["n_bytes"].to_numpy()
                sizes.append(n_bytes)
                for source, size in zip(table["source"].to_pylist(), n_bytes.tolist(), strict=True):
                    row = sources.setdefault(source, [0, 0])
                    row[0] += 1
                    row[1] += size
                hosts.update(_hosts(table))
        self.sizes = np.concatenate(sizes)
        self.sources, self.hosts = dict(sorted(sources.items())), hosts
        self.sampled = _Measures()
        if sample is not None:
            for positions, table in _texts(stage, sample):
                self.sampled.add(positions, table)

    def to_json(self, before: Corpus | None = None) -> dict[str, Any]:
        """Return the numbers; without a document the means are None.

        Args:
            before: What is most frequent there is listed, too, so that it can be compared.
        """
        n, sizes = len(self.sizes), self.sizes
        quantiles = np.quantile(sizes, [0.1, 0.5, 0.9]).tolist() if n else [None] * 3
        return {
            "docs": n,
            "bytes": int(sizes.sum()),
            "tokens": self.n_tokens,
            "mean_bytes": float(sizes.mean()) if n else None,
            "p10_bytes": quantiles[0],
            "median_bytes": quantiles[1],
            "p90_bytes": quantiles[2],
            "by_source": {name: {"docs": docs, "bytes": size}
                          for name, (docs, size) in self.sources.items()},
            "n_domains": len(self.hosts),
            "domains": _most(self.hosts, n, None if before is None else before.hosts),
            "sample": self.sampled.to_json(None if before is None else before.sampled),
        }  # fmt: skip


def _hosts(table: pa.Table) -> dict[str, int]:
    """Count the hosts of documents: of the path when it is an address, else of ``url``."""
    found: Counter[str] = Counter()
    pick = pc.StructFieldOptions([0])
    parts = []
    for column in ("path", "metadata"):
        options = pc.ExtractRegexOptions(_HOST)
        parts.append(
            pc.call_function(
                "struct_field", [pc.call_function("extract_regex", [table[column]], options)], pick
            )
        )
    hosts = pc.call_function("utf8_lower", [pc.call_function("coalesce", parts)])
    for row in pc.call_function("value_counts", [hosts.drop_null()]).to_pylist():
        found[row["values"]] += row["counts"]
    return found


def _most(
    counts: Counter[str], total: int, before: Counter[str] | None = None
) -> list[dict[str, Any]]:
    """List what is most frequent here or before, the most frequent here first."""
    names = {*_ranked(counts)[:_MAX_LISTED], *_ranked(before or Counter())[:_MAX_LISTED]}
    ordered = sorted(names, key=lambda name: (-counts[name], name))
    return [
        {"name": name, "docs": counts[name], "share": counts[name] / max(total, 1)}
        for name in ordered
    ]


def _ranked(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))


def _texts(stage: DataStage, sample: Sample) -> Iterator[tuple[list[int], pa.Table]]:
    """Yield positions in the sample and the documents as the stage holds them."""
    wanted: dict[tuple[Place, int], dict[int, int]] = {}
    places = sample.rows.select(["place", "shard", "row"]).to_pylist()
    for position, one in enumerate(places):
        wanted.setdefault((one["place"], one["shard"]), {})[one["row"]] = position
    for (place, index), rows in sorted(wanted.items()):
        shard = stage.shards[place][index]
        for _, first, table in row_groups(shard, ["path", "text"], set(rows)):
            here = [row for row in range(first, first + table.num_rows) if row in rows]
            taken = table.take(pa.array([row - first for row in here]))
            yield [rows[row] for row in here], taken.combine_chunks()


class _Measures:
    """What only the text tells, of a sample."""

    def __init__(self) -> None:
        self.n_docs = 0
        self.languages: Counter[str] = Counter()
        self.code: Counter[str] = Counter()
        self._texts: Counter[int] = Counter()
        self._starts: dict[int, str] = {}

    def add(self, positions: list[int], table: pa.Table) -> None:
        """Take documents in, with their positions in the sample."""
        strings = table["text"].to_pylist()
        texts = texts_of(table["text"])
        self.n_docs += len(strings)
        codes, _ = identify(texts, np.ones(len(strings), bool))
        plain = normalised(texts)
        for row, (position, text) in enumerate(zip(positions, strings, strict=True)):
            self._texts[xxhash.xxh3_64_intdigest(plain.bytes_of(row))] += 1
            language = language_of(table["path"][row].as_py(), text)
            if language is None:
                self.languages[codes[row] or "unknown"] += 1
            else:
                self.code[language] += 1
            if position < _WORD_DOCS:
                self._starts[position] = text[:_WORD_CHARS]

    def _distinct_words(self) -> list[int]:
        """Count the distinct words of segments of running words, in the order of the sample."""
        distinct: list[int] = []
        words: list[str] = []
        for position in sorted(self._starts):
            words += self._starts[position].lower().split()
            while len(words) >= SEGMENT_WORDS:
                distinct.append(len(set(words[:SEGMENT_WORDS])))
                del words[:SEGMENT_WORDS]
        return distinct

    def to_json(self, before: _Measures | None) -> dict[str, Any]:
        """Return the measures; None for those that need more text."""
        n, distinct = max(self.n_docs, 1), self._distinct_words()
        copies = sum(count - 1 for count in self._texts.values())
        return {
            "docs": self.n_docs,
            "distinct_words_per_1000": float(np.mean(distinct)) if distinct else None,
            "n_segments": len(distinct),
            "copies": copies,
            "copies_share": copies / n,
            "code_docs": sum(self.code.values()),
            "code_share": sum(self.code.values()) / n,
            "code_languages": _most(self.code, n, None if before is None else before.code),
            "languages": _most(self.languages, n, None if before is None else before.languages),
        }


def length_chart(before: Corpus, after: Corpus | None) -> dict[str, Any] | None:
    """Count the lengths of documents before and after in the same bins."""
    groups = {"before": before.sizes.astype(float)}
    if after is not None:
        groups["after"] = after.sizes.astype(float)
    return histogram(groups)
