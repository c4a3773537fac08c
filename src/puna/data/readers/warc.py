"""WARC (ISO 28500): crawled pages. Framing is checked here, HTTP is decoded by fastwarc.

Records are framed by this module, because a truncated or damaged record must be reported with its
place, where a library reader would return a short payload or stop. After damage, reading goes on at
the next record header that can be found.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastwarc.warc import ArchiveIterator

from puna.data.extract.rights import header_rights
from puna.data.readers.records import (
    DEFAULT_MAX_RECORD_BYTES,
    BadRecord,
    RawRecord,
    UnusableError,
)
from puna.data.readers.stream import ByteStream

_DOCUMENT_TYPES = frozenset((b"response", b"resource", b"conversion"))
_OTHER_TYPES = frozenset((b"warcinfo", b"request", b"metadata", b"revisit", b"continuation"))
_HTTP_OK = 200
_MAX_HEADER_BYTES = 1 << 16
_START = re.compile(rb"WARC/1\.\d\r?\n")
_HEADER_END = re.compile(rb"\r?\n\r?\n")
_MEDIA_TYPES = {
    "text/html": "text/html",
    "application/xhtml+xml": "text/html",
    "text/plain": "text/plain",
    "text/markdown": "text/markdown",
}


@dataclass(slots=True)
class _Frame:
    """A framed record: header and block, or what is wrong with it."""

    offset: int
    header: bytes
    block: bytes
    damage: UnusableError | None = None
    n_bytes: int = 0


def read_warc(
    chunks: Iterable[bytes], path: str, *, max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
) -> Iterator[RawRecord | BadRecord]:
    """Read the pages of a WARC file; record number ``n`` of the file is called ``path#n``.

    ``response`` (HTTP status 200), ``resource`` and ``conversion`` records with a text media type
    become records; other responses are set aside (``http-status``, ``media-type``). Requests,
    revisits and other bookkeeping records are no documents and are not counted.

    Args:
        chunks: Decompressed content; may raise :class:`UnusableError` where the file is damaged.
        path: Path of the file inside its source.
        max_record_bytes: Larger records are set aside without being held in memory.
    """
    for number, frame in enumerate(_frames(chunks, max_record_bytes), 1):
        fields = _header_fields(frame.header)
        kind = fields.get(b"warc-type", b"").lower()
        if kind in _OTHER_TYPES and frame.damage is None:
            continue
        try:
            if frame.damage is not None:
                raise frame.damage
            if kind not in _DOCUMENT_TYPES:
                raise UnusableError("corrupt-warc", f"unknown WARC-Type {kind!r}")
            yield _to_record(frame, fields, f"{path}#{number}", number)
        except UnusableError as error:
            yield BadRecord(path, error.reason, error.error, frame.n_bytes, number, frame.offset)


def _to_record(frame: _Frame, fields: dict[bytes, bytes], place: str, number: int) -> RawRecord:
    content, media_type, encoding = frame.block, fields.get(b"content-type", b""), None
    rights: dict[str, str] = {}
    if media_type.startswith(b"application/http"):
        content, media_type, encoding, rights = _http_payload(frame)
    name = media_type.decode("latin-1").partition(";")[0].strip().lower()
    if name not in _MEDIA_TYPES:
        raise UnusableError("media-type", f"{name or 'no media type'} holds no text")
    if encoding is None and (declared := re.search(rb"charset=\"?([\w.:-]+)", media_type)):
        encoding = declared[1].decode("ascii", "replace")
    metadata: dict[str, Any] = dict(rights)
    for field, key in ((b"warc-target-uri", "url"), (b"warc-date", "date")):
        if value := fields.get(field):
            metadata[key] = value.decode("utf-8", "replace").strip("<>")
    return RawRecord(
        place, _MEDIA_TYPES[name], content, frame.n_bytes, metadata, encoding, number, frame.offset
    )


def _http_payload(frame: _Frame) -> tuple[bytes, bytes, str | None, dict[str, str]]:
    """Return body (transfer and content codings undone), media type, charset, owner's terms."""
    whole = frame.header + b"\r\n\r\n" + frame.block + b"\r\n\r\n"
    try:
        record = next(iter(ArchiveIterator(io.BytesIO(whole), auto_decode="all")))
        headers = record.http_headers
        body = record.reader.read()
    except (OSError, ValueError, StopIteration) as error:
        raise UnusableError("corrupt-warc", f"the HTTP message is damaged: {error}") from error
    status = headers.status_code if headers is not None else None
    if status != _HTTP_OK:
        raise UnusableError("http-status", f"status {status}, not {_HTTP_OK}")
    rights = header_rights(headers)
    return body, (record.http_content_type or "").encode(), record.http_charset, rights


def _header_fields(header: bytes) -> dict[bytes, bytes]:
    fields = {}
    for line in header.splitlines()[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            fields[name.strip().lower()] = value.strip()
    return fields


def _frames(chunks: Iterable[bytes], max_bytes: int) -> Iterator[_Frame]:
    stream = ByteStream(iter(chunks))
    while stream.fill(1):
        frame = _next_frame(stream, max_bytes)
        if frame is not None:
            yield frame
    if stream.damage is not None:
        yield _Frame(stream.offset, b"", b"", stream.damage)


def _next_frame(stream: ByteStream, max_bytes: int) -> _Frame | None:
    """Read one record; None when only blank lines were left."""
    while stream.fill(1) and stream.buffer[:1] in b"\r\n":
        stream.drop(1)
    if not stream.fill(1):
        return None
    start = stream.offset
    stream.fill(_MAX_HEADER_BYTES)
    end = _HEADER_END.search(stream.buffer, 0, _MAX_HEADER_BYTES)
    header = bytes(stream.buffer[: end.start()]) if end else b""
    length = _header_fields(header).get(b"content-length", b"")
    if not _START.match(header + b"\n") or end is None or not length.isdigit():
        error = UnusableError("corrupt-warc", "no sound WARC record header here")
        return _Frame(start, b"", b"", error, _resync(stream))
    stream.drop(end.end())
    n_bytes = int(length)
    if n_bytes > max_bytes:
        got = stream.skip(n_bytes)
        error = UnusableError("too-large", f"{n_bytes:,} bytes (max {max_bytes:,})")
        return _Frame(start, header, b"", error, got)
    if not stream.fill(n_bytes):
        error = UnusableError(
            "corrupt-warc",
            f"the file ends inside the record ({len(stream.buffer):,} of {length!r})",
        )
        return _Frame(start, header, b"", error, stream.skip(len(stream.buffer)))
    block = stream.take(n_bytes)
    stream.fill(2)
    if stream.buffer and not stream.buffer.startswith((b"\r\n", b"\n")):
        error = UnusableError("corrupt-warc", "the record does not end where its header says")
        return _Frame(start, header, b"", error, n_bytes + _resync(stream))
    return _Frame(start, header, block, None, n_bytes)


def _resync(stream: ByteStream) -> int:
    """Drop bytes up to the next record header; return how many."""
    dropped = stream.drop(1)
    while True:
        found = _START.search(stream.buffer)
        if found:
            return dropped + stream.drop(found.start())
        dropped += stream.drop(max(0, len(stream.buffer) - len(b"WARC/1.0\r\n")))
        if not stream.fill(len(stream.buffer) + 1):
            return dropped + stream.drop(len(stream.buffer))
