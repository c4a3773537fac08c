"""Scoring documents outside a run: a table of scores, and what a share to keep would cost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path
from puna.data.kernels.buffers import texts_from
from puna.data.quality.classifier import Classifier
from puna.data.quality.examples import Example

_BATCH_ROWS = 1024


@dataclass
class Scored:
    """Scores of documents, in reading order.

    Attributes:
        ids: Ids or places.
        sources: Sources.
        values: Scores, or labels.
        confidences: Probability of each label; empty for other tasks.
        n_bytes: UTF-8 bytes of all texts.
    """

    ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    n_bytes: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per document: id, source, and score or label with its score."""
        base = [{"id": i, "source": s} for i, s in zip(self.ids, self.sources, strict=True)]
        if not self.confidences:
            return [row | {"score": v} for row, v in zip(base, self.values, strict=True)]
        pairs = zip(base, self.values, self.confidences, strict=True)
        return [row | {"label": label, "score": score} for row, label, score in pairs]

    def by_source(self) -> list[dict[str, Any]]:
        """Summarise per source: documents, and quartiles or the most frequent label."""
        names, rows = np.asarray(self.sources, object), []
        for name in sorted(set(self.sources)):
            inside = np.flatnonzero(names == name)
            values = [self.values[k] for k in inside]
            row: dict[str, Any] = {"source": name, "docs": len(inside)}
            if self.confidences:
                labels, counts = np.unique(np.asarray(values, str), return_counts=True)
                row |= {"label": str(labels[counts.argmax()]),
                        "share": float(counts.max() / len(values))}  # fmt: skip
            else:
                low, middle, high = np.percentile(values, [25, 50, 75])
                row |= {"p25": float(low), "median": float(middle), "p75": float(high)}
            rows.append(row)
        return rows


def score_texts(judged: Classifier, items: Iterable[Example]) -> Scored:
    """Score texts in batches.

    Raises:
        PunaError: There is no text.
    """
    scored, waiting = Scored(), iter(items)
    while batch := list(islice(waiting, _BATCH_ROWS)):
        texts = texts_from([item.text for item in batch])
        columns = judged.score(texts)
        scored.ids += [item.id for item in batch]
        scored.sources += [item.source for item in batch]
        scored.values += list(columns[0]) if len(columns) > 1 else columns[0].tolist()
        scored.confidences += columns[1].tolist() if len(columns) > 1 else []
        scored.n_bytes += len(texts.data)
    if not scored.ids:
        raise PunaError("there is no document to score", "give a place that holds some")
    return scored


def write_scores(scored: Scored, path: Path) -> None:
    """Write the rows as JSON Lines or, by the file's suffix, as Parquet.

    Raises:
        PunaError: The suffix tells neither.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise PunaError(f"{os.fspath(path)}: the name ends with neither .jsonl nor .parquet",
                        "give such a name")  # fmt: skip
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(scored.rows()), temporary, compression="zstd")
        else:
            temporary.write_text("".join(_lines(scored)), encoding="utf-8")


def _lines(scored: Scored) -> Iterator[str]:
    for row in scored.rows():
        yield json.dumps(row, ensure_ascii=False) + "\n"
