"""Small inputs for tests of filters and stages, also of plugins: documents without an ingest."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from puna.core.artifact import Artifact, write_record
from puna.core.fsio import hash_json
from puna.data.engine import Shard
from puna.data.engine.shards import list_shards, read_batches, write_shard
from puna.data.schema import (
    DOCUMENT_SCHEMA,
    DOCUMENTS_DIR,
    REJECTED_DIR,
    document_id,
    dump_metadata,
    shard_name,
)


def make_documents(
    folder: Path,
    texts: Iterable[tuple[str, str, str]],
    *,
    n_shards: int = 1,
    stage: str = "data.ingest",
    extra: Mapping[str, Sequence[str]] | None = None,
) -> Artifact:
    """Write documents as a finished artifact.

    Args:
        folder: New folder of the artifact.
        texts: (source, path, text) of each document.
        n_shards: Shards to deal the documents to.
        stage: Stage that the artifact claims to come from.
        extra: More string columns, one value per document in the order of ``texts``.
    """
    columns = dict(extra or {})
    schema = pa.schema([*DOCUMENT_SCHEMA, *(pa.field(name, pa.string()) for name in columns)])
    rows = []
    for index, (source, path, text) in enumerate(texts):
        base = (
            document_id(source, path),
            source,
            path,
            text,
            dump_metadata({}),
            len(text.encode()),
        )
        rows.append((*base, *(values[index] for values in columns.values())))
    (folder / DOCUMENTS_DIR).mkdir(parents=True)
    for index in range(n_shards):
        part = sorted(rows[index::n_shards])
        values = list(zip(*part, strict=True)) or [()] * len(schema)
        arrays = [pa.array(value, f.type) for value, f in zip(values, schema, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=schema)
        write_shard(folder / DOCUMENTS_DIR / shard_name(index), table)
    write_record(
        folder,
        {"stage": stage, "fingerprint": hash_json([row[0] for row in rows]), "config": {},
         "metrics": {}, "inputs": {}},
    )  # fmt: skip
    return Artifact(folder)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read all rows of a folder of shards, in the order of shards and rows."""
    return [
        row
        for shard in list_shards(folder)
        for batch in read_batches(shard.path, None, 4096)
        for row in batch.to_pylist()
    ]


def kept_rows(stage_folder: Path) -> list[dict[str, Any]]:
    """Read what a stage kept."""
    return read_rows(stage_folder / DOCUMENTS_DIR)


def rejected_rows(stage_folder: Path) -> list[dict[str, Any]]:
    """Read what a stage rejected."""
    return read_rows(stage_folder / REJECTED_DIR)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder: relative path -> content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class KilledOnce:
    """A kernel whose process dies by SIGKILL at a shard, the first time.

    Attributes:
        kernel: What it does otherwise.
        shard_index: Where it dies.
        flag: File that remembers that it has died.
    """

    kernel: Any
    shard_index: int
    flag: Path

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the kernel."""
        return self.kernel.columns

    def adds(self) -> pa.Schema:
        """Return the schema of the kernel."""
        return self.kernel.adds()

    def prepare(self) -> None:
        """Prepare the kernel."""
        self.kernel.prepare()

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Die, or do what the kernel does."""
        if shard.index == self.shard_index and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.kernel(batch, shard, first_row)
