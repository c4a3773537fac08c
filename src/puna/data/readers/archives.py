"""Archives as trees of files: each member is read like a file of its own format."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from puna.data.readers.compression import decompressed
from puna.data.readers.records import BadRecord, RawRecord, UnusableError
from puna.data.readers.tar import Member, read_tar
from puna.data.readers.zip import read_zip

SEPARATOR = "!/"
MAX_DEPTH = 4
"""Archives that may stand inside each other, the outermost counted (ours)."""
_BOMB_FREE_BYTES = 1 << 30
_BOMB_RATIO = 250

ReadMember = Callable[[BinaryIO, str], Iterator[RawRecord | BadRecord]]


def read_archive(
    file: BinaryIO,
    path: str,
    format: str,
    read_member: ReadMember,
    *,
    wanted: Callable[[str], bool] | None = None,
    max_member_bytes: Callable[[str], int],
    comments: list[str] | None = None,
    format_inside: Callable[[str], str | None] | None = None,
) -> Iterator[RawRecord | BadRecord]:
    """Read the records of all members; a member is called ``archive!/path/of/member``.

    Records carry ``archive`` and ``member`` in their metadata. A second member of one name is
    read as well and set aside later by its id (``duplicate-id``).

    Args:
        file: Open file; for zip seekable. A tar may be compressed.
        path: Path of the archive inside its source.
        format: ``tar`` or ``zip``.
        read_member: Reads one member, given its content and its path inside the source.
        wanted: Called with a member's path in the archive; false leaves it out.
        max_member_bytes: Path of a member -> limit in bytes; larger ones are set aside.
        comments: Takes the comments of the archive, among them the commit of `git archive`.
        format_inside: Path of a member -> ``tar`` or ``zip`` when it is an archive to be opened in
            its turn, else None; by default no member is. Its members are called
            ``outer!/inner!/path``, and ``member`` is all behind the first ``!/``.
    """
    budget = _Budget(file, format)
    yield from _read(
        file, path, format, path, budget, 1,
        _Way(read_member, wanted, max_member_bytes, comments, format_inside),
    )  # fmt: skip


@dataclass(frozen=True)
class _Way:
    """How members are read; the arguments of :func:`read_archive`."""

    read_member: ReadMember
    wanted: Callable[[str], bool] | None
    max_member_bytes: Callable[[str], int]
    comments: list[str] | None
    format_inside: Callable[[str], str | None] | None


def _read(
    file: BinaryIO, path: str, format: str, top: str, budget: _Budget, depth: int, way: _Way
) -> Iterator[RawRecord | BadRecord]:
    """Read an archive that stands ``depth - 1`` archives deep in the one at ``top``."""
    within = f"{path}{SEPARATOR}"[len(top) + len(SEPARATOR) :]
    comments = way.comments if depth == 1 else None

    def limit(member: str) -> int:
        return way.max_member_bytes(within + member)

    for member in _members(file, format, limit, comments, budget):
        inner = f"{path}{SEPARATOR}{member.path}" if member.path else path
        if member.path and way.wanted is not None and not way.wanted(within + member.path):
            continue  # also when damaged: it would have been left out had it been sound
        if member.damage is not None:
            damage = member.damage
            yield BadRecord(inner, damage.reason, damage.error, member.n_bytes, None, member.offset)
            continue
        content = io.BytesIO(member.content or b"")
        nested = way.format_inside(inner) if way.format_inside is not None else None
        if nested is not None and depth >= MAX_DEPTH:
            what = f"archives stand more than {MAX_DEPTH} deep in each other"
            yield BadRecord(inner, "nested", what, member.n_bytes, None, member.offset)
            continue
        records = (
            way.read_member(content, inner)
            if nested is None
            else _read(content, inner, nested, top, budget, depth + 1, way)
        )
        for record in records:
            if nested is None and isinstance(record, RawRecord):
                place = {"archive": top, "member": within + member.path}
                record.metadata = {**record.metadata, **place}
            elif record.offset is None:
                record.offset = member.offset
            yield record


def _members(
    file: BinaryIO,
    format: str,
    limit: Callable[[str], int],
    comments: list[str] | None,
    budget: _Budget,
) -> Iterator[Member]:
    if format == "zip":
        return read_zip(file, limit, comments, budget.take)
    return read_tar(_bounded(budget.counted(file), budget), limit, comments)


def _bounded(file: BinaryIO, budget: _Budget) -> Iterator[bytes]:
    """Decompress as far as the budget goes.

    Raises:
        UnusableError: The budget is spent (``bomb``).
    """
    for chunk in decompressed(file):
        budget.take(len(chunk))
        yield chunk


class _Budget:
    """Stops what expands like a bomb and not like an archive of texts.

    An outermost archive and all archives in it may give 1 GiB together, and beyond that 250 times
    the bytes that were read of the outermost file (both limits are ours: source code in xz reaches
    about 20 times, logs 100).
    """

    def __init__(self, file: BinaryIO, format: str) -> None:
        self._file = file
        self._counted = _Counted(file)
        self._n_stored = file.seek(0, 2) if format == "zip" else None
        self._n_out = 0

    def counted(self, file: BinaryIO) -> BinaryIO:
        """Return the file; the outermost one counts what is read from it."""
        return self._counted if file is self._file else file  # type: ignore[return-value]

    def take(self, n_bytes: int) -> None:
        """Count bytes that came out.

        Raises:
            UnusableError: They are too many (``bomb``).
        """
        self._n_out += n_bytes
        n_in = self._counted.n_read if self._n_stored is None else self._n_stored
        if self._n_out > max(_BOMB_FREE_BYTES, _BOMB_RATIO * n_in):
            raise UnusableError("bomb", f"{n_in:,} bytes expand to more than {self._n_out:,} bytes")


class _Counted:
    """A file that counts what is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.n_read = file, 0

    def read(self, n_bytes: int = -1) -> bytes:
        """Read from the file."""
        data = self._file.read(n_bytes)
        self.n_read += len(data)
        return data
