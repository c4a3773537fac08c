"""Decompression that notices damage: many gzip members, Zstandard frames, xz or bzip2 streams.

The format is told by the first bytes, never by the file name. Library readers stop silently at a
truncated Zstandard frame; here the end of the input inside a member or frame is an error.
Formats: RFC 1952 (gzip), RFC 8878 (Zstandard), .xz 1.2.1 (tukaani.org), bzip2.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

from puna.data.readers.records import UnusableError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
XZ_MAGIC = b"\xfd7zXZ\0"
BZIP2_MAGIC = b"BZh"
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
CHUNK_BYTES = 1 << 18
_XZ_MEMORY_BYTES = 1 << 30
_ZSTD_STEP_BYTES = 1 << 16
_GZIP_WBITS = 31


def compression_of(head: bytes) -> str | None:
    """Tell the compression by the first bytes: ``gzip``, ``zstd``, ``xz``, ``bzip2`` or None."""
    if head.startswith(GZIP_MAGIC):
        return "gzip"
    if head.startswith(XZ_MAGIC):
        return "xz"
    if head.startswith(BZIP2_MAGIC) and head[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    is_skippable = len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50
    return "zstd" if head.startswith(ZSTD_MAGIC) or is_skippable else None


def decompressed(file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of a file in chunks, decompressed when it is gzip, Zstandard, xz, bzip2.

    Raises:
        UnusableError: The compressed data is damaged or ends too early (``corrupt-gzip``,
            ``corrupt-zstd``, ``corrupt-xz``, ``corrupt-bzip2``); every
            chunk before the damage has been yielded.
    """
    head = file.read(CHUNK_BYTES)
    kind = compression_of(head)
    chunks = _chunks(file, head)
    if kind == "gzip":
        yield from _gunzip(chunks)
    elif kind == "zstd":
        yield from _unzstd(chunks)
    elif kind == "xz":
        yield from _streams(chunks, _new_xz, "xz", lzma.LZMAError)
    elif kind == "bzip2":
        yield from _streams(chunks, bz2.BZ2Decompressor, "bzip2", OSError)
    else:
        yield from chunks


def read_all(file: BinaryIO, max_bytes: int) -> bytes:
    """Read a whole file, decompressed.

    Raises:
        UnusableError: Damaged, or larger than ``max_bytes`` after decompression (``too-large``).
    """
    pieces, n_bytes = [], 0
    for chunk in decompressed(file):
        n_bytes += len(chunk)
        if n_bytes > max_bytes:
            raise UnusableError("too-large", f"more than {max_bytes:,} bytes")
        pieces.append(chunk)
    return b"".join(pieces)


def _chunks(file: BinaryIO, head: bytes) -> Iterator[bytes]:
    chunk = head
    while chunk:
        yield chunk
        chunk = file.read(CHUNK_BYTES)


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    inflate = zlib.decompressobj(_GZIP_WBITS)
    try:
        for chunk in chunks:
            data = chunk
            while data:
                if inflate.eof:  # between members
                    data = data.lstrip(b"\0")  # zero padding is legal after a member
                    if not data:
                        break
                    inflate = zlib.decompressobj(_GZIP_WBITS)
                out = inflate.decompress(data, CHUNK_BYTES * 16)
                if out:
                    yield out
                data = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
        if not inflate.eof and (out := inflate.flush()):
            yield out
    except zlib.error as error:
        raise UnusableError("corrupt-gzip", str(error)) from error
    if not inflate.eof:
        raise UnusableError("corrupt-gzip", "the file ends inside a gzip member")


def _new_xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)


def _streams(
    chunks: Iterator[bytes], new: Callable[[], Any], name: str, failure: type[Exception]
) -> Iterator[bytes]:
    """Undo xz or bzip2, stream after stream; the two decompressors have one interface."""
    stream = new()
    try:
        for chunk in chunks:
            data = chunk
            while data or not (stream.eof or stream.needs_input):
                if stream.eof:  # between streams
                    data = data.lstrip(b"\0")  # padding is legal after a stream
                    if not data:
                        break
                    stream = new()
                out = stream.decompress(data, CHUNK_BYTES * 16)
                if out:
                    yield out
                data = stream.unused_data if stream.eof else b""
    except (failure, EOFError) as error:
        raise UnusableError(f"corrupt-{name}", str(error)) from error
    if not stream.eof:
        raise UnusableError(f"corrupt-{name}", f"the file ends inside a {name} stream")


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    context = zstandard.ZstdDecompressor()
    frame = context.decompressobj()
    used = False
    try:
        for chunk in chunks:
            # Small steps bound the output of one call: a few bytes can expand a lot.
            for start in range(0, len(chunk), _ZSTD_STEP_BYTES):
                data = chunk[start : start + _ZSTD_STEP_BYTES]
                while data:
                    if frame.eof:
                        frame, used = context.decompressobj(), False
                    out = frame.decompress(data)
                    used = True
                    if out:
                        yield out
                    data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise UnusableError("corrupt-zstd", str(error)) from error
    if used and not frame.eof:
        raise UnusableError("corrupt-zstd", "the file ends inside a Zstandard frame")
