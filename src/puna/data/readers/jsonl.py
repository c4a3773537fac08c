r"""JSON Lines: one JSON object per line, UTF-8, with exact places of errors.

Every line that holds something is one record: it becomes a document or it is set aside with file,
line and byte offset. Blank lines are no records. Lines end at ``\n`` only (U+2028 is text).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from puna.data.readers.lines import read_lines
from puna.data.readers.records import (
    DEFAULT_MAX_RECORD_BYTES,
    BadRecord,
    RawRecord,
    UnusableError,
)

ALL_FIELDS = "*"


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are used.

    Attributes:
        text: Field of the text.
        id: Field that identifies the record; None takes the file and the record's number.
        metadata: Fields kept as metadata; ``("*",)`` keeps all others.
    """

    text: str = "text"
    id: str | None = None
    metadata: tuple[str, ...] = ()

    def pick_metadata(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the metadata fields that a record holds."""
        if self.metadata == (ALL_FIELDS,):
            return {k: v for k, v in record.items() if k not in (self.text, self.id)}
        return {key: record[key] for key in self.metadata if key in record}

    def identify(self, record: dict[str, Any], place: str, metadata: dict[str, Any]) -> str:
        """Return the document's path: the record's own id, or its place in the file.

        Raises:
            UnusableError: The id is missing, or neither text nor a whole number.
        """
        if self.id is None:
            return place
        value = record.get(self.id)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise UnusableError(
                "schema", f"field {self.id!r} (id) is {_shown(value)}, not text or a whole number"
            )
        metadata["file"] = place
        return str(value)


def read_jsonl(
    chunks: Iterable[bytes],
    path: str,
    fields: Fields,
    media_type: str,
    *,
    encoding: str = "utf-8",
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> Iterator[RawRecord | BadRecord]:
    r"""Read JSON Lines from the decompressed chunks of a file.

    Args:
        chunks: Decompressed content; may raise :class:`UnusableError` where the file is damaged.
        path: Path of the file inside its source; records are called ``path#line``.
        fields: The fields to use.
        media_type: Media type of the texts.
        encoding: An encoding in which the byte ``\n`` is always a line end.
        max_record_bytes: Longer lines are set aside without being held in memory.

    Yields:
        One item per line that is not blank, and one more where the file is damaged.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    for line in read_lines(chunks, max_record_bytes):
        number, offset, n_bytes = line.number, line.offset, line.n_bytes
        if not line.content.strip() and line.damage is None:
            continue
        try:
            if line.damage is not None:
                raise line.damage
            text = line.content.decode(encoding)
            record = decoder.decode(text)
            yield _to_record(record, path, number, fields, media_type, n_bytes, offset)
        except UnusableError as error:
            yield BadRecord(path, error.reason, error.error, n_bytes, number, offset)
        except UnicodeDecodeError as error:
            yield BadRecord(path, "encoding", str(error), n_bytes, number, offset)
        except (ValueError, RecursionError) as error:
            yield BadRecord(path, "json", str(error), n_bytes, number, offset)


def _to_record(
    record: Any, path: str, number: int, fields: Fields, media_type: str, n_bytes: int, offset: int
) -> RawRecord:
    if not isinstance(record, dict):
        raise UnusableError("schema", f"the line holds {_shown(record)}, not an object")
    text = record.get(fields.text)
    if not isinstance(text, str):
        known = ", ".join(sorted(record)[:10]) or "none"
        raise UnusableError(
            "schema",
            f"field {fields.text!r} (text) is {_shown(text)}, not text; fields here: {known}"
            if fields.text in record
            else f"field {fields.text!r} (text) is missing; fields here: {known}",
        )
    metadata = fields.pick_metadata(record)
    place = fields.identify(record, f"{path}#{number}", metadata)
    return RawRecord(place, media_type, text, n_bytes, metadata, None, number, offset)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
