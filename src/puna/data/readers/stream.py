"""A buffer in front of the chunks of a file, for readers that frame records themselves."""

from __future__ import annotations

from collections.abc import Iterator

from puna.data.readers.records import UnusableError


class ByteStream:
    """A buffer in front of chunks that knows its offset and keeps the damage that ended it."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self.buffer = bytearray()
        self.offset = 0
        self.damage: UnusableError | None = None

    def fill(self, n_bytes: int) -> bool:
        """Hold at least ``n_bytes`` if the file has them; tell whether it does."""
        while len(self.buffer) < n_bytes and self.damage is None:
            try:
                chunk = next(self._chunks, None)
            except UnusableError as error:
                self.damage = error
                break
            if chunk is None:
                break
            self.buffer += chunk
        return len(self.buffer) >= n_bytes

    def drop(self, n_bytes: int) -> int:
        """Forget the first ``n_bytes`` of the buffer."""
        n_bytes = min(n_bytes, len(self.buffer))
        del self.buffer[:n_bytes]
        self.offset += n_bytes
        return n_bytes

    def take(self, n_bytes: int) -> bytes:
        """Return and forget the first ``n_bytes``, which are in the buffer."""
        taken = bytes(memoryview(self.buffer)[:n_bytes])
        self.drop(n_bytes)
        return taken

    def skip(self, n_bytes: int) -> int:
        """Read past ``n_bytes`` without holding them; return how many there were."""
        skipped = 0
        while skipped < n_bytes and self.fill(1):
            skipped += self.drop(n_bytes - skipped)
        return skipped
