"""What readers yield: a record that can become a document, or one that is set aside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DEFAULT_MAX_RECORD_BYTES = 32 * 2**20


@dataclass(slots=True)
class RawRecord:
    """One record as it stands in its file, before decoding, extraction and normalisation.

    Attributes:
        path: Stable path of the document inside its source, ``a/b.html`` or ``a.jsonl#12``.
        media_type: Which extraction applies (:data:`puna.data.extract.MEDIA_TYPES`).
        content: Bytes of a file still to be decoded, or text.
        n_bytes: Size of the record in its file, after decompression.
        metadata: JSON values that stay with the document.
        encoding: Declared character encoding of ``content``, when something declares one.
        record: Number of the record in its file (lines and WARC records count from 1, Parquet
            rows from 0); None for a whole file.
        offset: Byte offset of the record in the decompressed file, when known.
    """

    path: str
    media_type: str
    content: bytes | str
    n_bytes: int
    metadata: dict[str, Any] = field(default_factory=dict)
    encoding: str | None = None
    record: int | None = None
    offset: int | None = None


@dataclass(slots=True)
class BadRecord:
    """Input that cannot become a document.

    Attributes:
        path: Path of the file inside its source.
        reason: Reason code, ``json`` or ``corrupt-gzip``; counted as ``quarantine.<reason>``.
        error: What exactly is wrong.
        n_bytes: Bytes set aside, as far as known.
        record: As in :class:`RawRecord`; of the first one when this stands for several.
        offset: As in :class:`RawRecord`.
        n_records: Number of records this stands for (a damaged Parquet row group holds many).
    """

    path: str
    reason: str
    error: str
    n_bytes: int = 0
    record: int | None = None
    offset: int | None = None
    n_records: int = 1


class UnusableError(Exception):
    """A record or the rest of a file cannot be used; readers turn it into a :class:`BadRecord`.

    Args:
        reason: Reason code.
        error: What exactly is wrong.
        offset: Byte offset of the damage inside the record, when known.
    """

    def __init__(self, reason: str, error: str, offset: int | None = None) -> None:
        super().__init__(f"{reason}: {error}")
        self.reason, self.error, self.offset = reason, error, offset
