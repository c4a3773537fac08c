"""Stage ``tokens.count``: how many tokens each document has, as a column of the documents."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.core.units import format_count
from puna.data.engine import EngineConfig, open_engine
from puna.data.engine.shards import VERDICT_FIELDS, list_shards, read_columns
from puna.data.engine.shardwork import open_schema
from puna.data.schema import DOCUMENTS_DIR
from puna.data.stagework import SCRATCH_DIR, documents_of, step_metrics

if TYPE_CHECKING:
    import pyarrow as pa

    from puna.data.engine.base import Shard
    from puna.tokens.tokenizer import Tokenizer

COLUMN = "n_tokens"


class CountConfig(EngineConfig):
    """Counting of the documents' tokens; everything that decides the counts is in the tokenizer."""


@dataclass(frozen=True)
class CountKernel:
    """Counts tokens as ``tokens.encode`` stores them: begin and end token included.

    Attributes:
        digest: Identity of the tokenizer.
        folder: Where it is; no part of its identity.
    """

    digest: str
    folder: Path = field(repr=False)
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the verdict columns (all null) and ``n_tokens``."""
        import pyarrow as pa

        return pa.schema([*VERDICT_FIELDS, pa.field(COLUMN, pa.int64())])

    def prepare(self) -> None:
        """Load the tokenizer, which compiles what it needs."""
        _tokenizer(self.folder)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document; all are kept."""
        import pyarrow as pa

        from puna.data.kernels.buffers import texts_of

        _, n_tokens = _tokenizer(self.folder).encode_documents(texts_of(batch.column("text")))
        nothing = [pa.nulls(batch.num_rows, one.type) for one in VERDICT_FIELDS]
        counts = pa.array(np.asarray(n_tokens, np.int64))
        return pa.RecordBatch.from_arrays([*nothing, counts], schema=self.adds())


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    from puna.tokens.tokenizer import load_tokenizer

    return load_tokenizer(folder)


@stage(
    "tokens.count",
    needs={"documents": "data.split", "tokenizer": "tokens.train|tokens.use"},
    resumable=True,
)
def count_tokens(cfg: CountConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Write the number of tokens of each document beside it, for exact shares and budgets.

    It stands before ``data.compose``, which needs the counts; what a pass then reads, repetitions
    counted, is in the composition's metrics. Writes ``documents/`` with a column ``n_tokens``;
    nothing is dropped.

    Raises:
        PunaError: The documents have such a column already.
    """
    started_s = time.monotonic()
    documents, folder = documents_of(inputs["documents"]), inputs["tokenizer"].path
    if COLUMN in open_schema(list_shards(documents)[0].path).names:
        raise PunaError(f"{documents}: the documents have a column {COLUMN!r} already",
                        "let tokens.count read from data.split")  # fmt: skip
    kernel = CountKernel(_tokenizer(folder).digest, folder)
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        manifest = engine.judge("tokens.count", documents, out, kernel)
    totals: dict[str, int] = {}
    for shard in list_shards(out / DOCUMENTS_DIR):
        table = read_columns(shard.path, ["source", COLUMN])
        sums = table.group_by("source", use_threads=False).aggregate([(COLUMN, "sum")])
        for row in sums.to_pylist():
            totals[row["source"]] = totals.get(row["source"], 0) + row[f"{COLUMN}_sum"]
    n_tokens = sum(totals.values())
    return {
        **step_metrics(manifest, started_s, events),
        "tokens": n_tokens,
        "sources": dict(sorted(totals.items())),
        "headline": f"{format_count(n_tokens)} tokens",
    }
