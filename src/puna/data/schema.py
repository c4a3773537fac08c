"""The tables of the data stages: documents, rejected documents, quarantined input.

Every data stage reads and writes folders of Parquet shards::

    documents/part-00000.parquet ...   kept documents, ordered by id inside a shard
    rejected/part-00000.parquet ...    what this stage dropped: the reason and the measured value
    quarantine.jsonl                   input that could not become a document (ingest only)

A document's ``id`` is stable: it depends on the source's name and the path inside the source, never
on where the source is mounted, so it survives from the raw file to a training batch.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import xxhash

DOCUMENTS_DIR = "documents"
REJECTED_DIR = "rejected"
QUARANTINE_FILE = "quarantine.jsonl"

DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("n_bytes", pa.int64(), nullable=False),
    ]
)
"""``path`` is the path or URL (``file.jsonl#12`` for a record of a file), ``metadata`` a JSON
object, ``n_bytes`` the UTF-8 size of ``text``. Later stages append columns, and drop none."""

REJECTION_FIELDS = [
    pa.field("step", pa.string(), nullable=False),
    pa.field("reason", pa.string(), nullable=False),
    pa.field("value", pa.float64()),
    pa.field("threshold", pa.float64()),
    pa.field("detail", pa.string()),
]
"""Appended to the document columns in ``rejected/``. ``detail``: free text, for a duplicate the id
of the document that was kept."""


def document_id(source: str, path: str) -> str:
    """Return the stable id of a document: xxh3-128 of source and path, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(f"{source}\0{path}".encode())


def shard_name(index: int) -> str:
    """Return the file name of shard ``index``."""
    return f"part-{index:05d}.parquet"


def dump_metadata(metadata: dict[str, Any]) -> str:
    """Write metadata as canonical JSON (equal dicts give equal text)."""
    return json.dumps(metadata, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
