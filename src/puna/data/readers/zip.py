"""Zip archives as streams of members: nothing is unpacked, damage is noticed with its offset."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from puna.data.readers.records import UnusableError
from puna.data.readers.tar import Member

_ENCRYPTED = 0x1


def read_zip(
    file: BinaryIO,
    max_member_bytes: Callable[[str], int],
    comments: list[str] | None = None,
    take: Callable[[int], None] | None = None,
) -> Iterator[Member]:
    """Read the files of a zip archive in the order of its directory.

    The directory stands at the end, so an archive that was cut has lost it, and with it the names
    and the number of its members: it is set aside whole.

    Args:
        file: Open, seekable file.
        max_member_bytes: Path of a member -> limit; larger ones are not read (``too-large``).
        comments: Takes the comment of the archive; `git archive` writes its commit there.
        take: Called with the size of each member before it is read; what it raises
            (:class:`UnusableError`) is that member's damage.
    """
    n_bytes = file.seek(0, 2)
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        damage = UnusableError(
            "corrupt-zip", f"{error}: the directory at the end is missing or damaged"
        )
        yield Member("", n_bytes, n_bytes, None, damage)
        return
    if comments is not None:
        comments.append(archive.comment.decode("utf-8", "replace"))
    for info in members:
        if not info.is_dir():
            yield _read_member(archive, info, max_member_bytes, take)


def _read_member(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    limit_of: Callable[[str], int],
    take: Callable[[int], None] | None,
) -> Member:
    path = info.filename.lstrip("/").removeprefix("./")
    limit = limit_of(path)
    place = Member(path, info.header_offset, info.file_size)
    if info.flag_bits & _ENCRYPTED:
        place.damage = UnusableError("encrypted", "the member is encrypted")
        return place
    if info.file_size > limit:
        place.damage = UnusableError("too-large", f"{info.file_size:,} bytes (max {limit:,})")
        return place
    try:
        if take is not None:
            take(info.file_size)  # not more comes out: the library stops at the declared size
        with archive.open(info) as member:
            data = member.read(limit + 1)
    except UnusableError as error:
        place.damage = error
        return place
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError,
            NotImplementedError) as error:  # fmt: skip
        what = str(error) or "the file ends inside the member"
        place.damage = UnusableError("corrupt-zip", what)
        return place
    if len(data) > limit:
        place.damage = UnusableError("too-large", f"more than {limit:,} bytes")
        return place
    place.content, place.n_bytes = data, len(data)
    return place
