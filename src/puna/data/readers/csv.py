r"""CSV and TSV (RFC 4180): one record per row, a header with the names, exact places of errors.

Every row that is not blank is one record: it becomes a document or is set aside with line and byte
offset. The standard library splits rows into fields; what it accepts in silence is checked here:
quotes that are not closed, rows of another length than the header, NUL bytes, wrong encodings.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from puna.data.readers.jsonl import ALL_FIELDS, Fields
from puna.data.readers.lines import Line, read_lines
from puna.data.readers.records import (
    DEFAULT_MAX_RECORD_BYTES,
    BadRecord,
    RawRecord,
    UnusableError,
)


def read_csv(
    chunks: Iterable[bytes],
    path: str,
    fields: Fields,
    media_type: str,
    *,
    delimiter: str = ",",
    quotes: bool = True,
    encoding: str = "utf-8",
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> Iterator[RawRecord | BadRecord]:
    r"""Read the rows of a CSV file; a row is called ``path#line``, the header being line 1.

    A field in double quotes may hold delimiters, line ends and doubled quotes, and may be as large
    as a record. When the quotes of a row are wrong (never closed, or text behind the closing one),
    only its first line is set aside and reading goes on with the next: a stray quote does not take
    good rows along.

    Args:
        chunks: Decompressed content; may raise :class:`UnusableError` where the file is damaged.
        path: Path of the file inside its source.
        fields: The columns to use.
        media_type: Media type of the texts.
        delimiter: What stands between two fields.
        quotes: Whether double quotes may enclose a field; otherwise they are text.
        encoding: An encoding based on ASCII.
        max_record_bytes: Larger rows are set aside; a quote that is not closed in so many bytes
            counts as stray.

    Yields:
        One item per row that is not blank; a single one for all rows when the header does not
        tell the columns that are asked for.
    """
    lines = read_lines(chunks, max_record_bytes)
    rows = _Rows(lines, delimiter, quotes, encoding, max_record_bytes)
    header = next(rows, None)
    if header is None:
        return
    names = header.values
    problem = header.problem or _header_problem(names, fields, delimiter)
    if problem is not None:
        sizes = [row.n_bytes for row in rows]
        error = f"the header: {problem.error}; no row can be read without it"
        yield BadRecord(path, problem.reason, error, sum(sizes), header.line.number,
                        header.line.offset, max(1, len(sizes)))  # fmt: skip
        return
    for row in rows:
        place = row.line.number, row.line.offset
        try:
            if row.problem is not None:
                raise row.problem
            if len(row.values) != len(names):
                raise UnusableError("csv", f"{len(row.values)} fields, the header has {len(names)}")
            record = dict(zip(names, row.values, strict=True))
            metadata = fields.pick_metadata(record)
            name = fields.identify(record, f"{path}#{row.line.number}", metadata)
        except UnusableError as error:
            yield BadRecord(path, error.reason, error.error, row.n_bytes, *place)
            continue
        text = record[fields.text]
        yield RawRecord(name, media_type, text, row.n_bytes, metadata, None, *place)


def _header_problem(names: Sequence[str], fields: Fields, delimiter: str) -> UnusableError | None:
    wanted = [fields.text, *([fields.id] if fields.id else [])]
    known = f"columns (split at {delimiter!r}): {', '.join(names[:20])[:200]}"
    for name in wanted:
        if name not in names:
            what = f"column {name!r} is missing: set `text_field` (`id_field`, `delimiter`)"
            return UnusableError("schema", f"{what}; {known}")
    used = names if fields.metadata == (ALL_FIELDS,) else [*wanted, *fields.metadata]
    twice = next((name for name in used if names.count(name) > 1), None)
    if twice is not None:
        return UnusableError("schema", f"column {twice!r} stands there twice; {known}")
    return None


@dataclass(slots=True)
class _Row:
    line: Line
    n_bytes: int
    values: list[str] = field(default_factory=list)
    problem: UnusableError | None = None


class _Rows:
    """Splits lines into rows, and goes back to the second line of a row whose quotes are wrong."""

    def __init__(
        self, lines: Iterator[Line], delimiter: str, quotes: bool, encoding: str, max_bytes: int
    ) -> None:
        # This limit is one of the whole process; it guards against quotes that are never closed,
        # which `max_bytes` does here.
        csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
        quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        self._feed = _Feed(lines, encoding, max_bytes)
        self._reader = csv.reader(self._feed, delimiter=delimiter, quoting=quoting, strict=True)

    def __iter__(self) -> _Rows:
        return self

    def __next__(self) -> _Row:
        feed = self._feed
        line = feed.start()
        if line.damage is not None:
            return _Row(line, line.n_bytes, problem=line.damage)
        try:
            values = next(self._reader)
        except csv.Error as error:
            problem = UnusableError("csv", f"quoting: {feed.why or error}")
            feed.go_back()
            return _Row(line, line.n_bytes, problem=problem)
        return _Row(line, feed.n_bytes, values, feed.problem())


class _Feed:
    """Hands lines to the parser of the standard library and remembers those of the open row."""

    def __init__(self, lines: Iterator[Line], encoding: str, max_bytes: int) -> None:
        self._lines, self._encoding, self._max_bytes = lines, encoding, max_bytes
        self._waiting: deque[Line] = deque()
        self._taken: list[Line] = []
        self._undecodable: UnicodeDecodeError | None = None
        self.n_bytes = -1
        """Size of the open row, inner line ends counted."""
        self.why = ""

    def start(self) -> Line:
        """Begin a row; return its first line, which is taken at once when it is damaged.

        Raises:
            StopIteration: There is none.
        """
        self._taken, self._undecodable, self.n_bytes, self.why = [], None, -1, ""
        line = self._next_line()
        while line.damage is None and line.content in (b"", b"\r"):
            line = self._next_line()
        if line.damage is None:
            self._waiting.appendleft(line)
        return line

    def go_back(self) -> None:
        """Let the next row begin at the second line of the open one."""
        self._waiting.extendleft(reversed(self._taken[1:]))

    def problem(self) -> UnusableError | None:
        """Return what is wrong with the bytes of the open row, if anything."""
        if self._undecodable is not None:
            return UnusableError("encoding", str(self._undecodable))
        for line in self._taken:
            if (at := line.content.find(b"\0")) >= 0:
                where = f"at byte {line.offset + at:,} of the file"
                return UnusableError("nul", f"a NUL byte in line {line.number}, {where}")
        return None

    def _next_line(self) -> Line:
        return self._waiting.popleft() if self._waiting else next(self._lines)

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        """Return the next line of the open row; a row that stops here has an open quote."""
        if self._taken and self.n_bytes > self._max_bytes:
            self.why = f"a quote is not closed in {self._max_bytes:,} bytes"
            raise StopIteration
        line = self._next_line()
        if line.damage is not None:
            self._waiting.appendleft(line)
            self.why = f"a quote is not closed before line {line.number}, which cannot be read"
            raise StopIteration
        self._taken.append(line)
        self.n_bytes += line.n_bytes + 1
        try:
            return line.content.decode(self._encoding) + "\n"
        except UnicodeDecodeError as error:
            self._undecodable = self._undecodable or error
            return line.content.decode(self._encoding, "surrogateescape") + "\n"
