"""Parquet: one record per row; damage is confined to the row group that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from puna.core.errors import PunaError
from puna.data.readers.jsonl import ALL_FIELDS, Fields
from puna.data.readers.records import BadRecord, RawRecord, UnusableError

_BATCH_ROWS = 4096


def read_parquet(
    file: BinaryIO, path: str, fields: Fields, media_type: str
) -> Iterator[RawRecord | BadRecord]:
    """Read the rows of a Parquet file; a row is called ``path#row``, counted from 0.

    Texts that are not valid UTF-8 (a column of bytes, or a careless writer) are yielded as bytes
    and decoded later like files.

    Args:
        file: Open, seekable file.
        path: Path of the file inside its source.
        fields: The columns to use.
        media_type: Media type of the texts.

    Raises:
        PunaError: The file is sound but a column is missing or is not text.
    """
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield BadRecord(path, "corrupt-parquet", _first_line(error), _size(file), 0)
        return
    columns = _columns(parquet.schema_arrow, path, fields)
    row = 0
    for group in range(parquet.num_row_groups):
        meta = parquet.metadata.row_group(group)
        try:
            table = parquet.read_row_group(group, columns=columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            text = f"row group {group} ({meta.num_rows:,} rows): {_first_line(error)}"
            yield BadRecord(
                path, "corrupt-parquet", text, meta.total_byte_size, row, None, meta.num_rows
            )
        else:
            for batch in table.to_batches(_BATCH_ROWS):
                yield from _rows(batch, path, row, fields, media_type)
                row += batch.num_rows
            continue
        row += meta.num_rows


def _columns(schema: pa.Schema, path: str, fields: Fields) -> list[str]:
    wanted = [fields.text] + ([fields.id] if fields.id else [])
    if fields.metadata == (ALL_FIELDS,):
        wanted += [name for name in schema.names if name not in wanted]
    else:
        wanted += [name for name in fields.metadata if name in schema.names and name not in wanted]
    for name in wanted[: 2 if fields.id else 1]:
        if name not in schema.names:
            raise PunaError(
                f"{path}: column {name!r} is missing; columns: {', '.join(schema.names)}",
                "set `text_field` (and `id_field`) of this source, or exclude the file",
            )
    kind = schema.field(fields.text).type
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    if not (_is_text(kind) or _is_bytes(kind)):
        raise PunaError(
            f"{path}: column {fields.text!r} holds {kind}, not text",
            "set `text_field` of this source to a column of text",
        )
    return wanted


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view()


def _rows(
    batch: pa.RecordBatch, path: str, first_row: int, fields: Fields, media_type: str
) -> Iterator[RawRecord | BadRecord]:
    texts = _text_values(batch.column(fields.text))
    others = batch.schema.names[1:]
    records: list[dict[str, Any]] | None = None
    if others:
        records = _plain_rows(batch.select(others))
    for index, text in enumerate(texts):
        row = first_row + index
        n_bytes = len(text) if text is not None else 0
        if text is None:
            yield BadRecord(path, "schema", f"column {fields.text!r} is null", 0, row)
            continue
        try:
            record = {} if records is None else records[index]
            metadata = fields.pick_metadata(record)
            place = fields.identify(record, f"{path}#{row}", metadata)
        except UnusableError as error:
            yield BadRecord(path, error.reason, error.error, n_bytes, row)
            continue
        yield RawRecord(place, media_type, text, n_bytes, metadata, None, row)


def _text_values(column: pa.Array) -> list[str] | list[bytes] | list[str | None]:
    if isinstance(column.type, pa.DictionaryType):
        column = column.dictionary_decode()
    if _is_bytes(column.type):
        return column.to_pylist()
    try:
        column.validate(full=True)  # pyarrow reads invalid UTF-8 without a word
    except pa.ArrowInvalid:
        return pc.cast(column, pa.large_binary()).to_pylist()
    return column.to_pylist()


def _plain_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as JSON values; what has no form in JSON (times, decimals, bytes) becomes text."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        batch = pa.RecordBatch.from_arrays(
            [_repair(column) for column in batch.columns], names=batch.schema.names
        )
    return [{key: _plain(value) for key, value in row.items()} for row in batch.to_pylist()]


def _repair(column: pa.Array) -> pa.Array:
    if not _is_text(column.type):
        return column
    values = pc.cast(column, pa.large_binary()).to_pylist()
    return pa.array([None if v is None else v.decode("utf-8", "replace") for v in values])


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _size(file: BinaryIO) -> int:
    try:
        return file.seek(0, 2)
    except (OSError, ValueError):
        return 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
