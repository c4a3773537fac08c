"""Archives as trees of files: each member is read like a file of its own format."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

from puna.data.readers.compression import decompressed
from puna.data.readers.records import BadRecord, RawRecord, UnusableError
from puna.data.readers.tar import Member, read_tar
from puna.data.readers.zip import read_zip

SEPARATOR = "!/"
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
    """
    for member in _members(file, format, max_member_bytes, comments):
        inner = f"{path}{SEPARATOR}{member.path}" if member.path else path
        if member.damage is not None:
            if member.path and wanted is not None and not wanted(member.path):
                continue  # would have been left out had it been sound
            damage = member.damage
            yield BadRecord(inner, damage.reason, damage.error, member.n_bytes, None, member.offset)
            continue
        if wanted is not None and not wanted(member.path):
            continue
        for record in read_member(io.BytesIO(member.content or b""), inner):
            if isinstance(record, RawRecord):
                record.metadata = {**record.metadata, "archive": path, "member": member.path}
            elif record.offset is None:
                record.offset = member.offset
            yield record


def _members(
    file: BinaryIO, format: str, limit: Callable[[str], int], comments: list[str] | None
) -> Iterator[Member]:
    if format == "zip":
        return read_zip(file, limit, comments)
    return read_tar(_bounded(file), limit, comments)


def _bounded(file: BinaryIO) -> Iterator[bytes]:
    """Decompress, and stop at what expands like a bomb and not like an archive of texts.

    Raises:
        UnusableError: More than 1 GiB, and more than 250 times what was read, came out (``bomb``;
            both limits are ours: source code in xz reaches about 20 times, logs 100).
    """
    counted = _Counted(file)
    n_out = 0
    for chunk in decompressed(counted):  # type: ignore[arg-type]
        n_out += len(chunk)
        if n_out > _BOMB_FREE_BYTES and n_out > _BOMB_RATIO * counted.n_read:
            raise UnusableError(
                "bomb", f"{counted.n_read:,} bytes expand to more than {n_out:,} bytes"
            )
        yield chunk


class _Counted:
    """A file that counts what is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.n_read = file, 0

    def read(self, n_bytes: int = -1) -> bytes:
        """Read from the file."""
        data = self._file.read(n_bytes)
        self.n_read += len(data)
        return data
