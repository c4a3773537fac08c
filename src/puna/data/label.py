"""What every filter of some profiles says about every document, without dropping any.

Each filter sees each document as it is, whatever the others say: so decisions can be compared one
by one with those of another implementation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path
from puna.data.filters.base import FilterConfig
from puna.data.filters.batch import TextBatch
from puna.data.filters.profiles import PROFILES, name_of
from puna.data.readers.files import format_of, read_file
from puna.data.readers.jsonl import Fields
from puna.data.readers.records import BadRecord

LABEL_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("profile", pa.string(), nullable=False),
        pa.field("filter", pa.string(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("detail", pa.string()),
        pa.field("values", pa.map_(pa.string(), pa.float64()), nullable=False),
    ]
)
"""One row per document, profile and filter. ``reason`` (without the filter's name), ``value`` and
``threshold`` are those of the first check that failed; ``values`` holds what every check measured,
by its reason."""
_FORMATS = ("jsonl", "parquet")
_BATCH_DOCS, _BATCH_BYTES = 1024, 32 << 20


@dataclass(frozen=True)
class Labelled:
    """What was done.

    Attributes:
        n_docs: Documents that were judged.
        n_bytes: Of their texts.
        n_kept: Profile and filter -> documents that it keeps.
        reasons: Profile, filter and reason -> documents.
    """

    n_docs: int
    n_bytes: int
    n_kept: dict[tuple[str, str], int]
    reasons: dict[tuple[str, str, str], int]


def label_documents(
    source: Path,
    out: Path,
    profiles: Sequence[str],
    *,
    text_field: str = "text",
    id_field: str = "id",
    on_batch: Callable[[int], None] = lambda _: None,
) -> Labelled:
    """Judge all documents of JSONL or Parquet files.

    Args:
        source: A file, or a folder of them (hidden files aside, subfolders included).
        out: Parquet file to write, in :data:`LABEL_SCHEMA`; replaced when it exists.
        profiles: Names of filter profiles.
        text_field: Field of the text.
        id_field: Field of the id, a text or a whole number; it is the path of the document for
            filters that look at the file's extension.
        on_batch: Told how many documents were judged after each batch.

    Raises:
        PunaError: A profile is unknown, there is no file of a known format, or a record cannot be
            read: nothing is written then.
    """
    filters = [(name, one) for name in profiles for one in PROFILES.get(name).filters]
    if not filters:
        raise PunaError(
            f"the profiles {', '.join(profiles)} have no filters",
            f"choose among {', '.join(name for name in PROFILES if PROFILES.get(name).filters)}",
        )
    n_docs = n_bytes = 0
    kept = {(profile, name_of(one)): 0 for profile, one in filters}
    reasons: Counter[tuple[str, str, str]] = Counter()
    fields = Fields(text_field, id_field)
    with atomic_path(out) as partial, pq.ParquetWriter(partial, LABEL_SCHEMA) as writer:
        for ids, texts in _batches(source, fields):
            array = pa.array(texts, pa.large_string())
            shared = TextBatch(array, ids)  # what filters measure, they measure once
            for profile, one in filters:
                docs = TextBatch(array, ids) if one.rewrites else shared
                batch = _label(ids, docs, profile, one)
                writer.write_batch(batch)
                key = (profile, name_of(one))
                given = [code for code in batch.column("reason").to_pylist() if code is not None]
                kept[key] += len(ids) - len(given)
                reasons.update((*key, code) for code in given)
            n_docs += len(ids)
            n_bytes += sum(len(text.encode()) for text in texts)
            on_batch(len(ids))
    return Labelled(n_docs, n_bytes, kept, dict(sorted(reasons.items())))


def _label(
    ids: list[str], docs: TextBatch, profile: str, document_filter: FilterConfig
) -> pa.RecordBatch:
    n, name = len(ids), name_of(document_filter)
    reason: list[str | None] = [None] * n
    detail: list[str | None] = [None] * n
    value, threshold = np.zeros(n), np.zeros(n)
    is_kept = np.ones(n, bool)
    checks, measured = [], []
    for finding in document_filter.judge(docs):
        check = finding.reason.removeprefix(f"{name}.")
        checks.append(check)
        measured.append(finding.value)
        newly = finding.failed & is_kept  # the first check that fails gives the reason
        is_kept &= ~finding.failed
        value[newly], threshold[newly] = finding.value[newly], finding.threshold
        for index in np.flatnonzero(newly).tolist():
            reason[index] = check
            if finding.details is not None:
                detail[index] = finding.details[index]
    values = pa.MapArray.from_arrays(
        pa.array(np.arange(n + 1) * len(checks), pa.int32()),
        pa.array(checks * n, pa.string()),
        pa.array(np.stack(measured, 1).ravel(), pa.float64()),
    )
    columns = [
        pa.array(ids, pa.string()), pa.array([profile] * n), pa.array([name] * n),
        pa.array(is_kept), pa.array(reason, pa.string()), pa.array(value, mask=is_kept),
        pa.array(threshold, mask=is_kept), pa.array(detail, pa.string()), values,
    ]  # fmt: skip
    return pa.RecordBatch.from_arrays(columns, schema=LABEL_SCHEMA)


def _batches(source: Path, fields: Fields) -> Iterator[tuple[list[str], list[str]]]:
    """Yield ids and texts."""
    ids: list[str] = []
    texts: list[str] = []
    n_bytes = 0
    for identifier, text in _records(source, fields):
        ids.append(identifier)
        texts.append(text)
        n_bytes += len(text)
        if len(ids) == _BATCH_DOCS or n_bytes > _BATCH_BYTES:
            yield ids, texts
            ids, texts, n_bytes = [], [], 0
    if ids:
        yield ids, texts


def _records(source: Path, fields: Fields) -> Iterator[tuple[str, str]]:
    for path in _files(source):
        with path.open("rb") as file:
            for record in read_file(file, str(path), format_of(path.name) or "", fields=fields):
                if isinstance(record, BadRecord):
                    raise PunaError(
                        f"{path}, record {record.record}: {record.error} ({record.reason})",
                        "correct the record or take it out; every document is labelled, or none",
                    )
                content = record.content
                text = content if isinstance(content, str) else content.decode()
                yield record.path, text


def _files(source: Path) -> list[Path]:
    if source.is_file():
        found = [source]
    elif source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.is_file())
        found = [path for path in found if not path.name.startswith((".", "_"))]
        found = [path for path in found if format_of(path.name) in _FORMATS]
    else:
        raise PunaError(f"{source} does not exist", "give a JSONL or Parquet file, or a folder")
    if not found or format_of(found[0].name) not in _FORMATS:
        raise PunaError(
            f"{source} holds no JSONL or Parquet file",
            "give files named *.jsonl, *.jsonl.gz, *.jsonl.zst or *.parquet",
        )
    return found
