"""Reading one file of any supported format: from its bytes to raw records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Literal, get_args

from puna.data.readers.compression import decompressed, read_all
from puna.data.readers.jsonl import Fields, read_jsonl
from puna.data.readers.records import (
    DEFAULT_MAX_RECORD_BYTES,
    BadRecord,
    RawRecord,
    UnusableError,
)

Format = Literal[
    "jsonl", "csv", "tsv", "parquet", "warc", "text", "markdown", "rst", "html", "roff", "python",
    "code", "notebook", "tar", "zip",
]  # fmt: skip
FORMATS: tuple[str, ...] = get_args(Format)

RECORD_FORMATS = frozenset(("jsonl", "csv", "tsv", "parquet", "warc"))
"""Formats of files that hold many records."""
ARCHIVES = frozenset(("tar", "zip"))

_DELIMITERS = {"csv": ",", "tsv": "\t"}
_WHOLE_FILES = {
    "text": "text/plain",
    "markdown": "text/markdown",
    "rst": "text/x-rst",
    "html": "text/html",
    "roff": "text/troff",
    "python": "text/x-python",
    "code": "text/x-source",
    "notebook": "application/x-ipynb+json",
}
_BY_SUFFIX = {
    "jsonl": "jsonl", "ndjson": "jsonl", "csv": "csv", "tsv": "tsv", "tab": "tsv",
    "parquet": "parquet", "pq": "parquet", "warc": "warc",
    "wet": "warc",
    "txt": "text", "text": "text", "md": "markdown", "markdown": "markdown", "rst": "rst",
    "html": "html", "htm": "html", "xhtml": "html", "man": "roff", "py": "python",
    "ipynb": "notebook", "tar": "tar", "tgz": "tar", "tbz2": "tar", "txz": "tar", "tzst": "tar",
    "zip": "zip",
}  # fmt: skip
_COMPRESSED = re.compile(r"\.(gz|zst|zstd|xz|bz2)$", re.IGNORECASE)
_MAN_SECTION = re.compile(r"[1-9][a-z]{0,4}")


def format_of(path: str) -> str | None:
    """Tell the format from a path, compression suffixes left aside; None when unknown.

    ``.1`` to ``.9`` are manual pages only in a folder ``man*``; elsewhere it may be a version.
    """
    name = _COMPRESSED.sub("", path.rpartition("/")[2])
    suffix = name.rpartition(".")[2].lower() if "." in name else ""
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    in_manual = path.rpartition("/")[0].rpartition("/")[2].startswith("man")
    return "roff" if in_manual and _MAN_SECTION.fullmatch(suffix) else None


def read_file(
    file: BinaryIO,
    path: str,
    format: str,
    *,
    fields: Fields | None = None,
    media_type: str = "text/plain",
    delimiter: str | None = None,
    quotes: bool = True,
    encoding: str | None = None,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> Iterator[RawRecord | BadRecord]:
    """Read the records of an open file.

    Args:
        file: Open binary file, seekable for Parquet; gzip and Zstandard are undone.
        path: Path of the file inside its source.
        format: One of :data:`FORMATS`.
        fields: Fields of JSONL, CSV and Parquet records.
        media_type: Media type of the texts in them.
        delimiter: Of CSV; None takes the comma, or the tab for ``tsv``.
        quotes: Whether double quotes may enclose a field of CSV.
        encoding: Declared character encoding.
        max_record_bytes: Larger records are set aside.
    """
    limit = max_record_bytes
    if format == "jsonl":
        yield from read_jsonl(
            decompressed(file), path, fields or Fields(), media_type,
            encoding=encoding or "utf-8", max_record_bytes=limit,
        )  # fmt: skip
    elif format in _DELIMITERS:
        from puna.data.readers.csv import read_csv

        yield from read_csv(
            decompressed(file), path, fields or Fields(), media_type,
            delimiter=delimiter or _DELIMITERS[format], quotes=quotes,
            encoding=encoding or "utf-8", max_record_bytes=limit,
        )  # fmt: skip
    elif format == "parquet":
        from puna.data.readers.parquet import read_parquet

        yield from read_parquet(file, path, fields or Fields(), media_type)
    elif format == "warc":
        from puna.data.readers.warc import read_warc

        yield from read_warc(decompressed(file), path, max_record_bytes=limit)
    else:
        try:
            data = read_all(file, limit)
        except UnusableError as error:
            yield BadRecord(path, error.reason, error.error, file.tell())
            return
        yield RawRecord(path, _WHOLE_FILES[format], data, len(data), encoding=encoding)
