r"""The lines of a file with their places; a line ends at ``\n`` only (U+2028 is text)."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from puna.data.readers.records import UnusableError


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file.

    Attributes:
        number: From 1.
        offset: Byte offset in the decompressed file.
        content: The line without its end; empty when it cannot be used.
        n_bytes: Its size.
        damage: Why it cannot be used, if so.
    """

    number: int
    offset: int
    content: bytes
    n_bytes: int
    damage: UnusableError | None = None


def read_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[Line]:
    """Yield the lines of a file; what stands behind the last line end is one only if not empty.

    Args:
        chunks: Content; may raise :class:`UnusableError` where the file is damaged: the last line
            yielded then carries that damage.
        max_bytes: Longer lines are not held (``too-large``).
    """
    number, offset = 1, 0
    open_pieces: list[bytes] = []
    open_bytes = 0
    try:
        for chunk in chunks:
            *lines, rest = chunk.split(b"\n")
            for line in lines:
                n_bytes = open_bytes + len(line)
                whole = b"".join((*open_pieces, line)) if open_pieces else line
                open_pieces = []
                yield _line(number, offset, whole, n_bytes, max_bytes)
                number, offset, open_bytes = number + 1, offset + n_bytes + 1, 0
            open_bytes += len(rest)
            if rest and open_bytes - len(rest) <= max_bytes:
                open_pieces.append(rest)
    except UnusableError as error:
        # The open line is not trusted: the damage may lie inside it.
        yield Line(number, offset, b"", open_bytes, error)
        return
    if open_bytes:
        yield _line(number, offset, b"".join(open_pieces), open_bytes, max_bytes)


def _line(number: int, offset: int, line: bytes, n_bytes: int, max_bytes: int) -> Line:
    if number == 1 and line.startswith(codecs.BOM_UTF8):
        line = line[len(codecs.BOM_UTF8) :]
    if n_bytes > max_bytes:
        damage = UnusableError("too-large", f"the line has {n_bytes:,} bytes (max {max_bytes:,})")
        return Line(number, offset, b"", n_bytes, damage)
    return Line(number, offset, line, n_bytes)
