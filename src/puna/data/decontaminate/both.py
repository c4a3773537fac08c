"""Both ways of finding examples at once: by n-grams, and by meaning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from puna.data.decontaminate.examples import Example
from puna.data.decontaminate.matching import MATCH_SCHEMA, MATCHERS, Matcher
from puna.data.decontaminate.meaning import MeaningKernel
from puna.data.engine import Engine, Kernel, Shard


@dataclass(frozen=True)
class BothMatcher:
    """Looks for n-grams, then for meanings.

    Attributes:
        words: Finds n-grams.
        meaning: Finds meanings.
    """

    words: Matcher
    meaning: Matcher

    def prepare(
        self, examples: Iterable[Example], folder: Path, engine: Engine, documents: Path
    ) -> tuple[Kernel, dict[str, dict[str, int]]]:
        """See :meth:`puna.data.decontaminate.matching.Matcher.prepare`."""
        given, kernels, counts = list(examples), [], []
        for name, matcher in (("words", self.words), ("meaning", self.meaning)):
            (folder / name).mkdir()
            kernel, found = matcher.prepare(given, folder / name, engine, documents)
            kernels.append(kernel)
            counts.append(found)
        words, meaning = counts
        sets = {
            name: {**one, "indexed_ngrams": words[name]["indexed"]} for name, one in meaning.items()
        }
        return BothKernel(*kernels), sets


@dataclass(frozen=True)
class BothKernel:
    """Joins what two kernels find; hits of n-grams stand before those of meaning.

    Attributes:
        words: Finds n-grams.
        meaning: Finds meanings.
    """

    words: Kernel
    meaning: MeaningKernel
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return :data:`MATCH_SCHEMA`."""
        return MATCH_SCHEMA

    def prepare(self) -> None:
        """Load and compile."""
        self.words.prepare()
        self.meaning.prepare()

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return the hits and spans of both."""
        found = [one(batch, shard, first_row) for one in (self.words, self.meaning)]
        hits, spans = (
            [one.column(name).to_pylist() for one in found] for name in ("hits", "spans")
        )
        columns = [
            [a + b for a, b in zip(*hits, strict=True)],
            [union(a, b) if a and b else a or b for a, b in zip(*spans, strict=True)],
        ]
        arrays = [pa.array(one, f.type) for one, f in zip(columns, MATCH_SCHEMA, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=MATCH_SCHEMA)


def union(a: list[int], b: list[int]) -> list[int]:
    """Join two lists of begin, end, begin, end, ..., each in order, to one that is, too."""
    joined: list[int] = []
    pairs = [*zip(a[::2], a[1::2], strict=True), *zip(b[::2], b[1::2], strict=True)]
    for start, end in sorted(pairs):
        if joined and start <= joined[-1]:
            joined[-1] = max(joined[-1], end)
        else:
            joined += [start, end]
    return joined


def _both(cfg: Any) -> Matcher:
    return BothMatcher(MATCHERS.get("ngrams")(cfg), MATCHERS.get("embedding")(cfg))


MATCHERS.register("ngrams+embedding", _both)
