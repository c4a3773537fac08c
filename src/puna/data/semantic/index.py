"""The index of a run: the embeddings of what it kept, for later runs.

A folder ``index/`` beside ``documents/``::

    index.json             format, version, embedder and how it cut the texts
    rows/part-*.parquet    a row per kept document, in the shards and the order of ``documents/``

Columns: ``id``, ``source``, ``n_bytes``, ``quality`` (when the documents have it), ``embedding``
(an int8 per dimension). A run reads any number of indexes and writes that of its own documents
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.fsio import hash_json, write_json
from puna.data.engine.base import ROWS_DIR
from puna.data.engine.shards import ids_digest, list_shards, read_columns
from puna.data.engine.shardwork import open_schema
from puna.data.run_index import INDEX_DIR, RECORD_FILE, rows_of
from puna.data.run_index import read_record as read_any_record
from puna.data.semantic.kernels import EmbedKernel, KnownKernel

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from puna.data.engine import Engine

_FORMAT, _VERSION = "puna-semantic-index", 1


@dataclass(frozen=True)
class SemanticIndex:
    """An index that was opened.

    Attributes:
        rows: Folder of its rows, with their nodes.
        n_docs: Documents in it.
        has_quality: Whether it has a column ``quality``.
    """

    rows: Path
    n_docs: int
    has_quality: bool


def index_identity(kernel: EmbedKernel) -> dict[str, Any]:
    """Return what two embeddings must have in common to be comparable."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "embedder": kernel.digest,
        "passage_tokens": kernel.passages.n_tokens,
        "passages": kernel.passages.n_passages,
    }


def read_record(path: str, identity: dict[str, Any] | None = None) -> tuple[Path, dict[str, Any]]:
    """Find an index and read its record.

    Args:
        path: Folder of the index, or of the stage that wrote it.
        identity: Result of :func:`index_identity`, to be compared with; None: only the format is.

    Raises:
        PunaError: There is none, or its embeddings cannot be compared with those of this run.
    """
    return read_any_record(
        path, "data.semantic", identity or {"format": _FORMAT, "version": _VERSION},
        "use the embedder and the passages that the index was made with, or write it again",
    )  # fmt: skip


def open_indexes(
    engine: Engine, paths: tuple[str, ...], n_new: int, identity: dict[str, Any], work: Path
) -> list[SemanticIndex]:
    """Give the documents of indexes nodes behind the new ones.

    Writes for index ``k`` the rows ``work/known-k/rows``.

    Raises:
        PunaError: As :func:`read_record`; or rows are missing.
    """
    indexes, first_node = [], n_new
    for number, path in enumerate(paths):
        folder, record = read_record(path, identity)
        shards = rows_of(folder, record)
        has_quality = "quality" in open_schema(shards[0].path).names
        carry = ["source", "n_bytes", "embedding", *["quality"] * has_quality]
        known = work / f"known-{number}"
        engine.annotate(
            "data.semantic: known documents", folder / ROWS_DIR, known, KnownKernel(first_node),
            carry=carry,
        )  # fmt: skip
        indexes.append(SemanticIndex(known / ROWS_DIR, record["n_docs"], has_quality))
        first_node += record["n_docs"]
    return indexes


def write_index(
    engine: Engine, rows: ir.Table, decided: ir.Table, documents: Path, out: Path,
    identity: dict[str, Any], *, has_quality: bool,
) -> None:  # fmt: skip
    """Write the index of what is kept; the record comes last.

    Args:
        engine: The engine.
        rows: Embeddings of this run and of indexes.
        decided: What happens to the new documents; ``keeper`` is null for a kept one.
        documents: Folder of the documents that were read.
        out: Folder of the stage.
        identity: Result of :func:`index_identity`.
        has_quality: Copy the column ``quality``.
    """
    columns = ["id", "source", "n_bytes", *["quality"] * has_quality, "embedding"]
    kept = rows.semi_join(decided.filter(decided.keeper.isnull()), "node")
    n_shards = len(list_shards(documents))
    order = ["shard", "id"] if n_shards > 1 else ["id"]
    folder = out / INDEX_DIR
    relation = kept.select(*order[:-1], *columns)
    engine.write(relation, folder / ROWS_DIR, order_by=order, n_shards=n_shards)
    shards = list_shards(folder / ROWS_DIR)
    ids = [ids_digest(read_columns(shard.path, ["id"])["id"]) for shard in shards]
    record = {**identity, "n_docs": sum(shard.n_rows for shard in shards),
              "content": hash_json(ids)}  # fmt: skip
    write_json(folder / RECORD_FILE, record)
