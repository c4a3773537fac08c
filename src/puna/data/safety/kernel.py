"""The kernel of ``data.safety``: verdicts, the redacted text, and what was found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from puna.data.engine.base import Shard
from puna.data.engine.shards import VERDICT_FIELDS
from puna.data.kernels.buffers import Texts, texts_of
from puna.data.safety.config import KINDS, ModelUse, PiiRules
from puna.data.safety.domains import BlockList, url_of
from puna.data.safety.numbers import Span
from puna.data.safety.pii import find_pii, redact
from puna.data.safety.terms import TermList

_ADDED = [pa.field("pii", pa.string()), pa.field("text", pa.large_string())]


@dataclass(frozen=True)
class TermCheck:
    """A list of terms with its limits."""

    reason: str
    terms: TermList
    max_per_1000: float
    min_distinct: int
    except_sources: tuple[str, ...]


@dataclass(frozen=True)
class ModelCheck:
    """A classifier with its limit; ``digest`` names the content of its file."""

    name: str
    use: ModelUse
    digest: str

    def scores(self, texts: Texts) -> np.ndarray:
        """Return the probability of the positive class, float64 [n_texts]."""
        from puna.data.safety.hashed_model import SUFFIX, load_hashed

        path = Path(self.use.path)
        if path.suffix == SUFFIX:
            return load_hashed(path, self.digest).values(texts)
        from puna.data.quality.classifier import load_classifier

        loaded = load_classifier(path, self.use.positive)
        return loaded.values(loaded.model.raw(texts))


class _Verdicts:
    """Reason, value, threshold and detail per row; the first check that fails a row decides."""

    def __init__(self, n: int) -> None:
        self.columns: list[list[Any]] = [[None] * n for _ in VERDICT_FIELDS]

    def drop(
        self, row: int, reason: str, value: float, threshold: float, detail: str | None
    ) -> None:
        if self.columns[0][row] is None:
            for column, item in zip(
                self.columns, (reason, float(value), float(threshold), detail), strict=True
            ):
                column[row] = item


@dataclass(frozen=True)
class SafetyKernel:
    """Judges documents by address, terms, classifiers and personal data, and redacts the latter.

    Attributes:
        pii: Rules for personal data and keys.
        block_lists: Checked against a document's address.
        terms: Checked in this order.
        models: Checked in this order.
    """

    pii: PiiRules
    block_lists: tuple[BlockList, ...] = ()
    terms: tuple[TermCheck, ...] = ()
    models: tuple[ModelCheck, ...] = ()
    columns: tuple[str, ...] = field(default=("source", "path", "metadata", "text"), repr=False)

    def adds(self) -> pa.Schema:
        """Return the verdict, ``pii`` (JSON: kind -> count; null when nothing was found), text."""
        return pa.schema([*VERDICT_FIELDS, *_ADDED])

    def prepare(self) -> None:
        """Compile the kernels and load lists and models."""
        texts = texts_of(pa.array(["a@b.de porn 1234567"], pa.large_string()))
        find_pii(texts, [frozenset()])
        for check in self.terms:
            check.terms.measure(texts)
        for model in self.models:
            model.scores(texts)
        for block_list in self.block_lists:
            block_list.match("https://example.org")

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return verdicts, findings and texts of a batch."""
        texts = texts_of(batch.column("text"))
        sources = batch.column("source").to_pylist()
        verdicts = _Verdicts(batch.num_rows)
        self._by_address(batch, verdicts)
        self._by_terms(texts, sources, verdicts)
        self._by_models(texts, sources, verdicts)
        found = find_pii(texts, self._ids(batch))
        counts = {row: Counter(kind for _, _, kind in spans) for row, spans in found.items()}
        self._by_pii(counts, verdicts)
        pii = [None] * batch.num_rows
        for row, of_kind in counts.items():
            pii[row] = json.dumps(dict(sorted(of_kind.items())), separators=(",", ":"))
        arrays = [
            pa.array(column, one.type)
            for column, one in zip(
                [*verdicts.columns, pii], [*VERDICT_FIELDS, _ADDED[0]], strict=True
            )
        ]
        return pa.RecordBatch.from_arrays(
            [*arrays, self._text(batch, texts, found)], schema=self.adds()
        )

    def _by_address(self, batch: pa.RecordBatch, verdicts: _Verdicts) -> None:
        if not self.block_lists:
            return
        pairs = zip(
            batch.column("path").to_pylist(), batch.column("metadata").to_pylist(), strict=True
        )
        for row, (path, metadata) in enumerate(pairs):
            url = url_of(path, metadata)
            if url is None:
                continue
            for block_list in self.block_lists:
                entry = block_list.match(url)
                if entry is not None:
                    verdicts.drop(row, "safety.url", 1, 0, f"{block_list.category}: {entry}")
                    break

    def _by_terms(self, texts: Texts, sources: Sequence[str], verdicts: _Verdicts) -> None:
        for check in self.terms:
            measured = check.terms.measure(texts)
            failed = (measured.per_1000 > check.max_per_1000) & (
                measured.n_distinct >= check.min_distinct
            )
            for row in np.flatnonzero(failed).tolist():
                if sources[row] not in check.except_sources:
                    verdicts.drop(
                        row, check.reason, measured.per_1000[row], check.max_per_1000,
                        f"{measured.n_distinct[row]} terms: {measured.top[row]}",
                    )  # fmt: skip

    def _by_models(self, texts: Texts, sources: Sequence[str], verdicts: _Verdicts) -> None:
        for check in self.models:
            scores = check.scores(texts)
            for row in np.flatnonzero(scores > check.use.max).tolist():
                if sources[row] not in check.use.except_sources:
                    verdicts.drop(row, "safety.model", scores[row], check.use.max, check.name)

    def _by_pii(self, counts: dict[int, Counter[str]], verdicts: _Verdicts) -> None:
        for row, of_kind in counts.items():
            for kind in KINDS:
                if self.pii.action_of(kind) == "drop" and of_kind[kind] > self.pii.drop_above:
                    verdicts.drop(row, f"pii.{kind}", of_kind[kind], self.pii.drop_above, None)

    def _ids(self, batch: pa.RecordBatch) -> list[frozenset[str]]:
        """Return the national ids to look for in each document, by its language if it has one."""
        if "language" not in batch.schema.names:
            return [self.pii.ids_of(None)] * batch.num_rows
        languages = batch.column("language").to_pylist()
        of_language = {language: self.pii.ids_of(language) for language in set(languages)}
        return [of_language[language] for language in languages]

    def _text(self, batch: pa.RecordBatch, texts: Texts, found: dict[int, list[Span]]) -> pa.Array:
        replacements = {
            kind: text for kind in KINDS if (text := self.pii.replacement_of(kind)) is not None
        }
        if not any(kind in replacements for spans in found.values() for _, _, kind in spans):
            return batch.column("text").cast(pa.large_string())
        data, offsets = redact(texts, found, replacements)
        return pa.LargeStringArray.from_buffers(
            batch.num_rows, pa.py_buffer(np.ascontiguousarray(offsets)), pa.py_buffer(data)
        )
