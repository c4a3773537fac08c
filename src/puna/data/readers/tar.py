"""Tar archives as streams of members: nothing is unpacked, damage is noticed with its offset.

Headers are framed here, because the standard library takes an archive that was cut at a header for
a complete one. Formats: POSIX.1-1988 (ustar), POSIX.1-2001 (pax), GNU long names.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from puna.data.readers.records import UnusableError
from puna.data.readers.stream import ByteStream

BLOCK = 512
_MAX_HEADER_BYTES = 1 << 20
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


@dataclass(slots=True)
class Member:
    """A file in an archive.

    Attributes:
        path: Its path in the archive, without ``./`` or ``/`` in front.
        offset: Byte offset of its header in the (decompressed) archive.
        n_bytes: Its size.
        content: Its bytes; None when it was not wanted or is damaged.
        damage: What is wrong with it, if anything.
    """

    path: str
    offset: int
    n_bytes: int
    content: bytes | None = None
    damage: UnusableError | None = None


class _CutError(Exception):
    """The file ends inside a member."""

    def __init__(self, stream: ByteStream, path: str, start: int, size: int) -> None:
        super().__init__(path)
        got = len(stream.buffer)
        damage = stream.damage or UnusableError(
            "corrupt-tar", f"the file ends inside a member ({got:,} of {size:,} bytes)"
        )
        self.member = Member(path, start, got, None, damage)


def read_tar(
    chunks: Iterable[bytes],
    max_member_bytes: Callable[[str], int],
    comments: list[str] | None = None,
) -> Iterator[Member]:
    """Read the regular files of a tar archive, also of several joined together.

    Folders, links and devices are no documents and are left out. After a damaged header, reading
    goes on at the next sound one.

    Args:
        chunks: Decompressed content; may raise :class:`UnusableError` where the file is damaged.
        max_member_bytes: Path of a member -> limit; larger ones are skipped without being held
            (``too-large``).
        comments: Takes the comments of global pax headers; `git archive` writes its commit there.
    """
    stream = ByteStream(iter(chunks))
    extended: dict[str, str] = {}
    n_zero_blocks, n_headers, is_lost = 0, 0, False
    try:
        while stream.fill(BLOCK):
            start, header = stream.offset, stream.take(BLOCK)
            if not header.strip(b"\0"):
                n_zero_blocks += 1
                continue
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                if not is_lost:  # one report per damaged stretch
                    damage = UnusableError("corrupt-tar", f"no sound header here: {error}")
                    yield Member("", start, 0, None, damage)
                is_lost, n_zero_blocks, extended = True, 0, {}
                continue
            is_lost, n_zero_blocks, n_headers = False, 0, n_headers + 1
            if info.type in _LONG_NAMES or info.type in _PAX:
                _read_extension(stream, info, start, extended, comments)
                continue
            member = _read_member(stream, info, start, extended, max_member_bytes)
            extended = {}
            if member is not None:
                yield member
        yield from _ending(stream, n_headers, n_zero_blocks, is_lost)
    except _CutError as cut:
        yield cut.member


def _read_member(
    stream: ByteStream,
    info: tarfile.TarInfo,
    start: int,
    extended: dict[str, str],
    max_member_bytes: Callable[[str], int],
) -> Member | None:
    """Read what follows a header; None for what is no file.

    Raises:
        _CutError: The file ends before.
    """
    path = _path(extended.get("path", info.name))
    size = int(extended["size"]) if extended.get("size", "").isdigit() else info.size
    is_sparse = info.type == tarfile.GNUTYPE_SPARSE or "GNU.sparse.major" in extended
    if info.type not in _FILES and not is_sparse:
        n_bytes = _data_bytes(info, size)
        if stream.skip(n_bytes) < n_bytes:
            raise _CutError(stream, path, start, size)
        return None
    member, limit = Member(path, start, size), max_member_bytes(path)
    if is_sparse:
        member.damage = UnusableError("format", "sparse members are not read")
    elif size > limit:
        member.damage = UnusableError("too-large", f"{size:,} bytes (max {limit:,})")
    elif stream.fill(size):
        member.content = stream.take(size)
    if member.content is None and (member.damage is None or stream.skip(size) < size):
        raise _CutError(stream, path, start, size)
    stream.skip(-size % BLOCK)
    return member


def _ending(
    stream: ByteStream, n_headers: int, n_zero_blocks: int, is_lost: bool
) -> Iterator[Member]:
    """Report an archive that stops where it should not."""
    if stream.damage is not None:
        yield Member("", stream.offset, len(stream.buffer), None, stream.damage)
    elif stream.buffer.strip(b"\0"):
        raise _CutError(stream, "", stream.offset, BLOCK)
    elif not n_zero_blocks and not is_lost:
        what = "the end mark is missing: members may be lost" if n_headers else "the file is empty"
        yield Member("", stream.offset, 0, None, UnusableError("corrupt-tar", what))


def _data_bytes(info: tarfile.TarInfo, size: int) -> int:
    """Return the bytes that follow the header of a member that is no file (links have none)."""
    if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
                     tarfile.DIRTYPE, tarfile.FIFOTYPE):  # fmt: skip
        return 0
    return size + -size % BLOCK


def _read_extension(
    stream: ByteStream,
    info: tarfile.TarInfo,
    start: int,
    extended: dict[str, str],
    comments: list[str] | None,
) -> None:
    """Read a long name or the records of a pax header.

    Raises:
        _CutError: The file ends before, or the header is absurdly long.
    """
    if info.size > _MAX_HEADER_BYTES or not stream.fill(info.size):
        raise _CutError(stream, "", start, info.size)
    data = stream.take(info.size)
    stream.skip(-info.size % BLOCK)
    if info.type in _LONG_NAMES:
        extended[_LONG_NAMES[info.type]] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return
    records = _pax_records(data)
    if info.type == tarfile.XGLTYPE:
        if comments is not None and "comment" in records:
            comments.append(records["comment"])
        return
    extended.update(records)


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse ``length key=value`` records; what does not parse ends the list."""
    records, at = {}, 0
    while at < len(data):
        number, blank, _ = data[at : at + 20].partition(b" ")
        if not blank or not number.isdigit() or int(number) < len(number) + 3:
            break
        key, _, value = data[at + len(number) + 1 : at + int(number) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(number)
    return records


def _path(name: str) -> str:
    while name.startswith(("./", "/")):
        name = name[2:] if name.startswith("./") else name[1:]
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
