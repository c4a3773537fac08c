"""Documents, bytes and tokens of a corpus by any columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from puna.core.errors import PunaError
from puna.data.compose.kernels import NO_VALUE, group_values, read_by
from puna.data.engine.shards import read_batches
from puna.data.export.corpus import LICENCE, Corpus, licence_columns, licences, open_corpus

_BATCH_ROWS = 8192


@dataclass
class Sum:
    """What a group holds.

    Attributes:
        docs: Documents, each once.
        n_bytes: UTF-8 bytes of their texts, each once.
        n_tokens: Their tokens, each once.
        tokens_read: Tokens of one pass: those of repeated documents count each time.
    """

    docs: int = 0
    n_bytes: int = 0
    n_tokens: int = 0
    tokens_read: int = 0

    def add(self, other: Sum) -> None:
        """Add another group."""
        self.docs += other.docs
        self.n_bytes += other.n_bytes
        self.n_tokens += other.n_tokens
        self.tokens_read += other.tokens_read


@dataclass(frozen=True)
class Counts:
    """The result of a count.

    Attributes:
        by: Columns.
        groups: Values of these columns -> sums, in the order of the values.
        is_counted: Tokens are counted by the tokenizer; else estimated from bytes.
        bytes_per_token: Ratio of the estimate; None when counted.
    """

    by: tuple[str, ...]
    groups: dict[tuple[str, ...], Sum] = field(default_factory=dict)
    is_counted: bool = False
    bytes_per_token: float | None = None

    @property
    def total(self) -> Sum:
        """Sum of all groups."""
        total = Sum()
        for one in self.groups.values():
            total.add(one)
        return total

    def over(self, *columns: str) -> dict[tuple[str, ...], Sum]:
        """Sum up over all columns but the given ones."""
        at = [self.by.index(column) for column in columns]
        found: dict[tuple[str, ...], Sum] = {}
        for values, one in self.groups.items():
            found.setdefault(tuple(values[index] for index in at), Sum()).add(one)
        return dict(sorted(found.items()))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "by": list(self.by),
            "token_counts": "tokenizer" if self.is_counted else "estimate",
            "bytes_per_token": self.bytes_per_token,
            "groups": [
                {"values": dict(zip(self.by, values, strict=True)), **asdict(one)}
                for values, one in self.groups.items()
            ],
            "total": asdict(self.total),
        }


def count_corpus(run_dir: Path, by: Sequence[str]) -> Counts:
    """Count the documents that the last finished data stage of a run has left.

    Args:
        run_dir: Folder of the run.
        by: Columns; ``metadata.KEY`` reads the metadata, ``licence`` a licence wherever it stands.

    Raises:
        PunaError: There is no such run, or no such column.
    """
    return count(open_corpus(run_dir, final=False), by)


def count(corpus: Corpus, by: Sequence[str]) -> Counts:
    """Do the work of :func:`count_corpus` for an open corpus."""
    names = corpus.schema.names
    plain = tuple(column for column in by if column != LICENCE)
    missing = [name for name in read_by(plain) if name not in names]
    if missing:
        raise PunaError(
            f"the documents of {corpus.artifact.stage} have no column {missing[0]!r}",
            f"count by {', '.join(name for name in names if name not in ('text', 'id'))}, "
            f"{LICENCE}, or metadata.KEY",
        )
    optional = [name for name in ("n_tokens", "repeat") if name in names]
    wanted = [*read_by(plain), "n_bytes", *optional]
    if LICENCE in by:
        wanted += licence_columns(corpus.schema)
    groups: dict[tuple[str, ...], Sum] = {}
    for shard in corpus.shards:
        for batch in read_batches(shard.path, list(dict.fromkeys(wanted)), _BATCH_ROWS):
            _add(groups, batch, tuple(by), corpus)
    ratio = None if corpus.is_counted else corpus.bytes_per_token
    return Counts(tuple(by), dict(sorted(groups.items())), corpus.is_counted, ratio)


def _add(
    groups: dict[tuple[str, ...], Sum], batch: pa.RecordBatch, by: tuple[str, ...], corpus: Corpus
) -> None:
    columns = [
        [one or NO_VALUE for one in licences(batch)] if column == LICENCE
        else group_values(batch, column)
        for column in by
    ]  # fmt: skip
    keys = zip(*columns, strict=True) if columns else iter([()] * batch.num_rows)
    n_bytes = batch.column("n_bytes").to_pylist()
    names = batch.schema.names
    ratio = corpus.bytes_per_token
    tokens = (
        batch.column("n_tokens").to_pylist() if "n_tokens" in names
        else [math.ceil(size / ratio) for size in n_bytes]
    )  # fmt: skip
    repeats = batch.column("repeat").to_pylist() if "repeat" in names else [1] * len(n_bytes)
    for key, size, n, times in zip(keys, n_bytes, tokens, repeats, strict=True):
        groups.setdefault(key, Sum()).add(Sum(1, size, n, n * times))
