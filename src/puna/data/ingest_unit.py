"""The worker's part of an ingest: read a unit's items, extract, write its shard of documents."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path, hash_file, write_json
from puna.data.extract import extract_record
from puna.data.extract.decode import UTF8
from puna.data.ingest_plan import Unit
from puna.data.readers.records import BadRecord, RawRecord, UnusableError
from puna.data.schema import DOCUMENT_SCHEMA, document_id, dump_metadata
from puna.data.sources import open_source

EMPTY = "empty"
ROBOTS = "robots"
REPAIRED = "repaired"
QUARANTINE = "quarantine"
_ROW_GROUP_ROWS = 2048
_ID_MODULUS = 2**128


@dataclass
class Tally:
    """What went in and what became of it; ``in_docs == kept_docs + all rejected docs`` holds."""

    in_docs: int = 0
    in_bytes: int = 0
    kept_docs: int = 0
    kept_bytes: int = 0
    rejected: dict[str, dict[str, int]] = field(default_factory=dict)

    def reject(self, reason: str, docs: int, n_bytes: int) -> None:
        """Count rejected input."""
        entry = self.rejected.setdefault(reason, {"docs": 0, "bytes": 0})
        entry["docs"] += docs
        entry["bytes"] += n_bytes

    def add(self, other: dict[str, Any]) -> None:
        """Add the flow of a unit."""
        for key in ("in_docs", "in_bytes", "kept_docs", "kept_bytes"):
            setattr(self, key, getattr(self, key) + other[key])
        for reason, entry in other["rejected"].items():
            self.reject(reason, entry["docs"], entry["bytes"])

    @property
    def rejected_docs(self) -> int:
        """All rejected input."""
        return sum(entry["docs"] for entry in self.rejected.values())

    def flow(self) -> dict[str, Any]:
        """Return the form that metrics hold."""
        return {
            "in_docs": self.in_docs, "in_bytes": self.in_bytes, "kept_docs": self.kept_docs,
            "kept_bytes": self.kept_bytes, "rejected": dict(sorted(self.rejected.items())),
        }  # fmt: skip


def process_unit(unit: Unit) -> dict[str, Any]:
    """Read one unit and write its documents, its quarantine and, last, its state.

    Args:
        unit: The work; travels to the worker by value.

    Returns:
        The state: flow, parts with rows and digests, bytes read, encodings, worker seconds.

    Raises:
        PunaError: An item cannot be read; with ``strict``, any input that must be set aside.
    """
    start_s = time.monotonic()
    with atomic_path(unit.quarantine_file) as path, path.open("wb") as quarantine:
        writer = _UnitWriter(unit, quarantine)
        source = open_source(unit.source)
        for item in unit.items:
            for record in source.read(item):
                writer.add(record)
        writer.flush()
    state = {
        "unit": unit.index,
        "source": unit.source.name,
        "digest": unit.digest,
        "flow": writer.tally.flow(),
        "parts": writer.parts,
        "read_bytes": unit.n_bytes,
        "encodings": dict(sorted(writer.encodings.items())),
        "repaired": writer.n_repaired,
        "worker_s": time.monotonic() - start_s,
    }
    write_json(unit.state_file, state)
    return state


def load_state(unit: Unit) -> dict[str, Any] | None:
    """Return the state of a unit that an earlier attempt finished; None when it must be done."""
    try:
        state = json.loads(unit.state_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if state.get("digest") != unit.digest or not unit.quarantine_file.exists():
        return None
    for index, part in enumerate(state["parts"]):
        path = unit.part_file(index)
        if not path.exists() or hash_file(path) != part["xxh3_128"]:
            return None
    return state


def quarantine_line(source: str, bad: BadRecord) -> bytes:
    """Write one line of ``quarantine.jsonl``."""
    entry = {
        "source": source, "path": bad.path, "record": bad.record, "offset": bad.offset,
        "reason": bad.reason, "error": bad.error, "n_records": bad.n_records,
        "n_bytes": bad.n_bytes,
    }  # fmt: skip
    # A lone surrogate in a path or message becomes \udcXX, which is its JSON escape.
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def strict_error(source: str, bad: BadRecord) -> PunaError:
    """Make the message for bad input in strict mode."""
    place = "" if bad.record is None else f", record {bad.record}"
    place += "" if bad.offset is None else f" (byte {bad.offset:,})"
    return PunaError(
        f"source {source!r}: {bad.path}{place}: {bad.reason}: {bad.error}",
        "repair or exclude it, or set data.ingest.strict=false to set bad input aside",
    )


def write_documents(path: Path, table: pa.Table) -> None:
    """Write a shard: equal tables give equal bytes."""
    with atomic_path(path) as temporary:
        pq.write_table(
            table, temporary, compression="zstd", row_group_size=_ROW_GROUP_ROWS,
            use_dictionary=["source"], write_statistics=["id"], store_schema=True,
        )  # fmt: skip


def ids_digest(ids: Iterator[str]) -> int:
    """Return a digest of ids that does not depend on their order: their sum modulo 2**128."""
    return sum(int(text, 16) for text in ids) % _ID_MODULUS


def original_place(path: str, metadata: str) -> str:
    """Return file and record of a document, also when its path is an id of the user's."""
    return json.loads(metadata).get("file", path)


class _RefusedError(Exception):
    """The owner of a document does not want it used so."""

    def __init__(self, directive: str) -> None:
        super().__init__(directive)
        self.directive = directive


@dataclass
class _Row:
    id: str
    path: str
    text: str
    metadata: str
    n_bytes: int
    raw_bytes: int


class _UnitWriter:
    """Turns records into rows, sets bad ones aside, and writes parts of ``shard_bytes``."""

    def __init__(self, unit: Unit, quarantine: BinaryIO) -> None:
        self._unit, self._quarantine = unit, quarantine
        self._rows: list[_Row] = []
        self._open_bytes = 0
        self.tally = Tally()
        self.parts: list[dict[str, Any]] = []
        self.encodings: Counter[str] = Counter()
        self.n_repaired = 0

    def add(self, record: RawRecord | BadRecord) -> None:
        """Take one record."""
        if isinstance(record, BadRecord):
            self._count_in(record.n_records, record.n_bytes)
            self._set_aside(record)
            return
        self._count_in(1, record.n_bytes)
        try:
            row = self._to_row(record)
        except UnusableError as error:
            bad = BadRecord(
                record.path.partition("#")[0] if record.record is not None else record.path,
                error.reason, error.error, record.n_bytes, record.record,
                _sum_of_known(record.offset, error.offset),
            )  # fmt: skip
            self._set_aside(bad)
            return
        except _RefusedError as refusal:
            self._refuse(record, refusal)
            return
        if row is None:
            self.tally.reject(EMPTY, 1, record.n_bytes)
            return
        self._rows.append(row)
        self._open_bytes += row.n_bytes
        if self._open_bytes >= self._unit.shard_bytes:
            self.flush()

    def _count_in(self, docs: int, n_bytes: int) -> None:
        self.tally.in_docs += docs
        self.tally.in_bytes += n_bytes

    def _set_aside(self, bad: BadRecord) -> None:
        if self._unit.strict:
            raise strict_error(self._unit.source.name, bad)
        self.tally.reject(f"{QUARANTINE}.{bad.reason}", bad.n_records, bad.n_bytes)
        self._quarantine.write(quarantine_line(self._unit.source.name, bad))

    def _refuse(self, record: RawRecord, refusal: _RefusedError) -> None:
        """Count a document whose owner does not want it used; name its place like bad input."""
        reason = f"{ROBOTS}.{refusal.directive}"
        self.tally.reject(reason, 1, record.n_bytes)
        file = record.path.partition("#")[0] if record.record is not None else record.path
        bad = BadRecord(file, reason, f"the owner says {refusal.directive!r}", record.n_bytes,
                        record.record, record.offset)  # fmt: skip
        self._quarantine.write(quarantine_line(self._unit.source.name, bad))

    def _to_row(self, record: RawRecord) -> _Row | None:
        done = extract_record(record, self._unit.source.extract)
        text, encoding, metadata = done.text, done.encoding, done.metadata
        if done.refused_by is not None:
            raise _RefusedError(done.refused_by)
        if not text or text.isspace():
            return None
        self.n_repaired += bool(metadata.get(REPAIRED))
        if encoding != UTF8:
            self.encodings[encoding] += 1
            metadata = {**metadata, "encoding": encoding}
        n_bytes = _utf8_size(text, "the text")
        dumped = dump_metadata(metadata) if metadata else "{}"
        _utf8_size(dumped, "the metadata")
        _utf8_size(record.path, "the path or id")
        identifier = document_id(self._unit.source.name, record.path)
        return _Row(identifier, record.path, text, dumped, n_bytes, record.n_bytes)

    def flush(self) -> None:
        """Write the open rows as a part, ordered by id; of equal ids the first one read stays."""
        rows = sorted(self._rows, key=lambda row: row.id)  # stable: equal ids stay in reading order
        self._rows, self._open_bytes = [], 0
        kept: list[_Row] = []
        for row in rows:
            if kept and kept[-1].id == row.id:
                self._set_aside(duplicate(row.path, row.metadata, row.raw_bytes))
            else:
                kept.append(row)
        if not kept:
            return
        path = self._unit.part_file(len(self.parts))
        write_documents(path, self._table(kept))
        n_bytes = sum(row.n_bytes for row in kept)
        self.tally.kept_docs += len(kept)
        self.tally.kept_bytes += n_bytes
        self.parts.append({
            "rows": len(kept), "n_bytes": n_bytes, "xxh3_128": hash_file(path),
            "ids_digest": f"{ids_digest(row.id for row in kept):032x}",
        })  # fmt: skip

    def _table(self, rows: list[_Row]) -> pa.Table:
        columns = [
            [row.id for row in rows], [self._unit.source.name] * len(rows),
            [row.path for row in rows], [row.text for row in rows],
            [row.metadata for row in rows], [row.n_bytes for row in rows],
        ]  # fmt: skip
        arrays = [
            pa.array(column, field.type)
            for column, field in zip(columns, DOCUMENT_SCHEMA, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=DOCUMENT_SCHEMA)


def duplicate(path: str, metadata: str, n_bytes: int) -> BadRecord:
    """Describe a document whose id an earlier one has."""
    return BadRecord(
        original_place(path, metadata), "duplicate-id", f"an earlier record has the id {path!r}",
        n_bytes,
    )  # fmt: skip


def _sum_of_known(offset: int | None, inner: int | None) -> int | None:
    """Return the offset of damage inside a record that begins at ``offset``, as far as known."""
    return offset if inner is None else (offset or 0) + inner


def _utf8_size(text: str, what: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise UnusableError(
            "surrogate", f"{what} holds a lone surrogate at character {error.start:,}"
        ) from error
