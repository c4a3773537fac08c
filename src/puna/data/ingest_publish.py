"""The end of an ingest: duplicate ids across units, final shard names, and the count of everything.

Nothing here trusts the counters of the workers: ids and rows are read again from the Parquet files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puna.core.fsio import atomic_path, write_json
from puna.data.ingest_plan import Unit
from puna.data.ingest_unit import (
    QUARANTINE,
    Tally,
    duplicate,
    ids_digest,
    quarantine_line,
    strict_error,
    write_documents,
)
from puna.data.schema import DOCUMENTS_DIR, QUARANTINE_FILE, shard_name

MANIFEST_FILE = "manifest.json"


@dataclass
class _Part:
    unit: Unit
    path: Path
    record: dict[str, Any]
    ids: pa.ChunkedArray
    drop: list[int] = field(default_factory=list)


def publish(units: Sequence[Unit], states: Sequence[dict[str, Any]], out: Path) -> dict[str, Tally]:
    """Write ``documents/``, ``quarantine.jsonl`` and ``manifest.json`` from the finished units.

    Args:
        units: The plan.
        states: The state of each unit.
        out: Folder of the stage.

    Returns:
        The flow per source.

    Raises:
        PunaError: Two records have the same id, and the ingest is strict.
        RuntimeError: The files do not hold what the workers wrote (never seen; a guard).
    """
    tallies: dict[str, Tally] = defaultdict(Tally)
    for state in states:
        tallies[state["source"]].add(state["flow"])
    parts = [
        _Part(unit, unit.part_file(index), record, _read_ids(unit.part_file(index)))
        for unit, state in zip(units, states, strict=True)
        for index, record in enumerate(state["parts"])
    ]
    _mark_duplicates(parts)
    duplicates = {part.path: _take_duplicates(part, tallies) for part in parts if part.drop}
    _write_quarantine(units, parts, duplicates, out / QUARANTINE_FILE)
    folder = out / DOCUMENTS_DIR
    shards = []
    for part in parts:
        if len(part.drop) < part.record["rows"]:
            shards.append(_publish_part(part, folder / shard_name(len(shards))))
    write_json(out / MANIFEST_FILE, {"shards": shards})
    _check_conservation(tallies, shards, folder)
    return dict(tallies)


def _read_ids(path: Path) -> pa.ChunkedArray:
    return pq.read_table(path, columns=["id"]).column("id")


def _mark_duplicates(parts: Sequence[_Part]) -> None:
    """Mark rows whose id stands in an earlier part. Inside a part ids are unique already."""
    heads = [_id_heads(part.ids) for part in parts]
    if not heads:
        return
    ordered = np.sort(np.concatenate(heads))
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return
    seen: set[str] = set()
    for part, head in zip(parts, heads, strict=True):
        for row in np.flatnonzero(np.isin(head, twice)).tolist():
            identifier = part.ids[row].as_py()
            if identifier in seen:
                part.drop.append(row)
            seen.add(identifier)


def _id_heads(ids: pa.ChunkedArray) -> np.ndarray:
    """Return the first 64 bits of each id: 8 bytes per document are enough to look for twins."""
    joined = b"".join(
        chunk.buffers()[2].to_pybytes()[chunk.offset * 32 : (chunk.offset + len(chunk)) * 32]
        for chunk in ids.chunks
        if len(chunk)
    )
    return np.frombuffer(bytes.fromhex(joined.decode("ascii")), dtype=">u8")[::2]


def _take_duplicates(part: _Part, tallies: dict[str, Tally]) -> list[bytes]:
    """Count the marked rows of a part as rejected; return their quarantine lines."""
    table = pq.read_table(part.path, columns=["path", "metadata", "n_bytes"]).take(part.drop)
    source, lines = part.unit.source.name, []
    tally = tallies[source]
    for row in table.to_pylist():
        bad = duplicate(row["path"], row["metadata"], row["n_bytes"])
        if part.unit.strict:
            raise strict_error(source, bad)
        tally.kept_docs -= 1
        tally.kept_bytes -= row["n_bytes"]
        tally.reject(f"{QUARANTINE}.{bad.reason}", 1, bad.n_bytes)
        lines.append(quarantine_line(source, bad))
    return lines


def _write_quarantine(
    units: Sequence[Unit], parts: Sequence[_Part], duplicates: dict[Path, list[bytes]], path: Path
) -> None:
    by_unit: dict[int, list[bytes]] = defaultdict(list)
    for part in parts:
        by_unit[part.unit.index] += duplicates.get(part.path, [])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for unit in units:
            with unit.quarantine_file.open("rb") as lines:
                while block := lines.read(1 << 20):
                    file.write(block)
            file.writelines(by_unit[unit.index])


def _publish_part(part: _Part, final: Path) -> dict[str, Any]:
    """Give a part its final name, without its duplicates; return its entry in the manifest."""
    rows, n_bytes = part.record["rows"], part.record["n_bytes"]
    digest = part.record["ids_digest"]
    if part.drop:
        table = pq.read_table(part.path)
        keep = np.ones(table.num_rows, dtype=bool)
        keep[part.drop] = False
        table = table.filter(pa.array(keep)).combine_chunks()
        rows, n_bytes = table.num_rows, sum(table.column("n_bytes").to_pylist())
        digest = f"{ids_digest(iter(table.column('id').to_pylist())):032x}"
        write_documents(final, table)
        part.path.unlink()
    else:
        part.path.rename(final)
    return {
        "file": f"{DOCUMENTS_DIR}/{final.name}", "source": part.unit.source.name, "rows": rows,
        "n_bytes": n_bytes, "ids_digest": digest,
    }  # fmt: skip


def _check_conservation(
    tallies: dict[str, Tally], shards: Sequence[dict[str, Any]], folder: Path
) -> None:
    """Compare what the workers counted with what the published files hold."""
    rows: dict[str, int] = defaultdict(int)
    for shard in shards:
        ids = _read_ids(folder.parent / shard["file"])
        rows[shard["source"]] += len(ids)
        if f"{ids_digest(iter(ids.to_pylist())):032x}" != shard["ids_digest"]:
            raise RuntimeError(f"{shard['file']} does not hold the ids that were written")
    for source, tally in tallies.items():
        counted = tally.kept_docs + tally.rejected_docs
        if tally.in_docs != counted or tally.kept_docs != rows[source]:
            raise RuntimeError(
                f"source {source!r}: {tally.in_docs} records in, {tally.kept_docs} kept, "
                f"{tally.rejected_docs} rejected, {rows[source]} in the files"
            )


def first_quarantined(path: Path, source: str) -> str:
    """Return the first thing that was set aside from a source, for messages."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            if entry["source"] == source:
                place = "" if entry["record"] is None else f"#{entry['record']}"
                return f"{entry['path']}{place}: {entry['reason']}: {entry['error']}"
    return ""
