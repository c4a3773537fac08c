"""The index of a run: what later runs need to find duplicates of the documents that it kept.

A folder ``index/`` beside ``documents/``::

    index.json             format, version, and with what the signatures were made
    rows/part-*.parquet    a row per kept document, in the shards and the order of ``documents/``

Columns: ``id``, ``source``, ``n_bytes``, ``quality`` (when the documents have it), ``text_hash``
(xxh3-128 of the normalised text), ``url_hash`` (xxh3-128 of the normalised URL, null without one),
``signature`` (128 little-endian uint32), ``shingles`` (the 32-bit hashes of the distinct word
5-grams, ascending, little-endian). A run reads any number of indexes and writes that of its own
documents only, so a series of runs hands on a list of folders and copies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from puna.core.fsio import hash_json, write_json
from puna.data.dedup.kernels import IndexKernel, KnownKernel
from puna.data.engine import Engine
from puna.data.engine.base import ROWS_DIR
from puna.data.engine.shardwork import open_schema
from puna.data.kernels.minhash import N_PERMUTATIONS, SHINGLE_WORDS, permutations
from puna.data.run_index import RECORD_FILE, rows_of
from puna.data.run_index import read_record as read_any_record

_FORMAT, _VERSION = "puna-dedup-index", 1


@dataclass(frozen=True)
class Index:
    """An index that was opened.

    Attributes:
        rows: Folder of its rows as they were written.
        first_node: Node of its first row in this run.
        n_docs: Documents in it.
        has_quality: Whether it has a column ``quality``.
    """

    rows: Path
    first_node: int
    n_docs: int
    has_quality: bool


def signature_identity() -> dict[str, Any]:
    """Return what two signatures must have in common to be comparable."""
    seeds = b"".join(np.ascontiguousarray(part, "<u4").tobytes() for part in permutations())
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "n_permutations": N_PERMUTATIONS,
        "shingle_words": SHINGLE_WORDS,
        "permutations": xxhash.xxh3_128_hexdigest(seeds),
    }


def write_index(
    engine: Engine, documents: Path, folder: Path, url_field: str | None, carry: list[str]
) -> None:
    """Write the index of documents; the record comes last.

    Args:
        engine: The engine.
        documents: Folder of the documents that were kept.
        folder: Folder of the index; what a stopped attempt left there is reused.
        url_field: Metadata that holds the URL, None: without URLs.
        carry: Columns of the documents to copy.
    """
    kernel = IndexKernel(url_field)
    manifest = engine.annotate("data.dedup: index", documents, folder, kernel, carry=carry)
    content = hash_json([report.ids_kept for report in manifest.shards])
    record = {**signature_identity(), "n_docs": manifest.rows_in, "content": content}
    write_json(folder / RECORD_FILE, record)


def read_record(path: str) -> tuple[Path, dict[str, Any]]:
    """Find an index and read its record.

    Args:
        path: Folder of the index, or of the stage that wrote it.

    Raises:
        PunaError: There is none, or its signatures cannot be compared with those of this version.
    """
    return read_any_record(
        path, "data.dedup", signature_identity(), "write the index again with this version of puna"
    )


def open_indexes(
    engine: Engine, paths: tuple[str, ...], n_new: int, n_bands: int, work: Path
) -> list[Index]:
    """Give the documents of indexes nodes behind the new ones, and find their buckets.

    Writes for index ``k`` the rows ``work/known-k/rows``.

    Raises:
        PunaError: As :func:`read_record`; or rows are missing.
    """
    indexes, first_node = [], n_new
    for number, path in enumerate(paths):
        folder, record = read_record(path)
        rows, n_docs = folder / ROWS_DIR, record["n_docs"]
        shards = rows_of(folder, record)
        has_quality = "quality" in open_schema(shards[0].path).names
        carry = ["source", "n_bytes", "text_hash", "url_hash", "signature"]
        engine.annotate(
            "data.dedup: known documents", rows, work / f"known-{number}",
            KnownKernel(n_bands, first_node), carry=[*carry, *["quality"] * has_quality],
        )  # fmt: skip
        indexes.append(Index(rows, first_node, n_docs, has_quality))
        first_node += n_docs
    return indexes
