"""Token shards in an object store or on a web server, with a cache on this machine's disk.

Tokens come in chunks of :data:`CHUNK_BYTES`, whose blocks are checked against their hashes when
they arrive and again when they are read. A chunk is written aside and renamed, so a killed download
leaves no half chunk, and what is there is not downloaded again. Processes of one machine share the
cache: a lock per chunk lets one of them download while the others wait. When the cache is full, the
chunks that were not opened for longest go. Offsets, ids and hashes come whole and stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import UInt64

from puna.core.errors import PunaError
from puna.tokens.integrity import BLOCK_BYTES, CheckedTokens, DamagedBlocksError, damaged_blocks

CHUNK_BYTES = 64 * BLOCK_BYTES
"""Bytes of one download, 4 MiB."""
_CHUNK_SUFFIX = ".chunk"
_OPEN_CHUNKS = 256
_DOWNLOADS = 16
_SURVEY_SHARE = 32
"""The cache is surveyed each time this part of its size was added by one process."""


@dataclass(frozen=True)
class Cache:
    """A folder that keeps what was downloaded.

    Attributes:
        folder: Where; several runs may share it.
        max_bytes: Of all chunks together. Each process looks after it as it adds, so it may be
            passed by a few percent for a moment.
        storage_options: Options of the store, for fsspec.
    """

    folder: Path
    max_bytes: int
    storage_options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values of which :meth:`of` makes this cache again."""
        return {**asdict(self), "folder": str(self.folder)}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Cache:
        """Read the JSON values of :meth:`to_json`."""
        return cls(Path(values["folder"]), values["max_bytes"], values["storage_options"])


class Store:
    """The files below a URL, by way of a cache.

    Args:
        url: ``s3://bucket/folder``, ``https://...``, anything that fsspec opens.
        cache: Keeps what comes.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self.url = url.rstrip("/")
        self.cache = cache
        self._added = cache.max_bytes  # of an earlier run: survey at the first chunk
        self._added_lock = threading.Lock()
        try:
            cache.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PunaError(f"the shard cache {cache.folder} cannot be made: {error}",
                            "give another folder: `cache.folder`") from error  # fmt: skip

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Read a file or a part of it from the store.

        Raises:
            PunaError: The store cannot be reached or has no such file.
        """
        from puna.data.sources.remote import open_store, retrying

        location = f"{self.url}/{name}"
        fs, path = open_store(location, self.cache.storage_options)
        try:
            data = retrying(lambda: fs.cat_file(path, start=start, end=end), location)
        except FileNotFoundError as error:
            raise PunaError(f"{location} does not exist", "check the URL of the shards") from error
        if end is not None and start is not None and len(data) > end - start:
            raise PunaError(
                f"{location}: asked for bytes {start} to {end}, got {len(data)} bytes",
                "use a store that gives parts of files",
            )
        return data

    def whole(self, name: str, digest: str) -> Path:
        """Return a local copy of a small file with a known xxh3-128."""
        path = self.cache.folder / digest[:2] / f"{digest}-{Path(name).name}"

        def load() -> bytes:
            data = self.read(name)
            if xxhash.xxh3_128_hexdigest(data) != digest:
                raise PunaError(f"{self.url}/{name} is not the file that the index names",
                                "upload the folder of tokens.encode again")  # fmt: skip
            return data

        return self._kept(path, load)

    def chunk(
        self, key: str, number: int, load: Callable[[], bytes], *, anew: bool = False
    ) -> Path:
        """Return a local copy of a part of a file.

        Args:
            key: Names the file's content in the cache.
            number: Which part.
            load: Downloads it.
            anew: Forget the copy that is there.
        """
        path = self.cache.folder / key[:2] / f"{key}-{number}{_CHUNK_SUFFIX}"
        if anew:
            path.unlink(missing_ok=True)
        return self._kept(path, load)

    def _kept(self, path: Path, load: Callable[[], bytes]) -> Path:
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # used now: it goes last
            return path
        path.parent.mkdir(exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if path.exists():
                return path
            data = load()
            self._make_room(len(data))
            aside = path.with_name(f".{path.name}.tmp")  # ours alone, or left by a killed holder
            try:
                aside.write_bytes(data)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        return path

    def _make_room(self, n_bytes: int) -> None:
        with self._added_lock:
            self._added += n_bytes
            if self._added < self.cache.max_bytes // _SURVEY_SHARE:
                return
            self._added = 0
        with _locked(self.cache.folder / "survey.lock"):
            found = sorted(self._chunks())
            total = n_bytes + sum(size for _, size, _ in found)
            for _, size, path in found:
                if total <= self.cache.max_bytes:
                    break
                path.unlink(missing_ok=True)  # who has it mapped keeps it
                path.with_suffix(".lock").unlink(missing_ok=True)
                total -= size

    def _chunks(self) -> Iterator[tuple[float, int, Path]]:
        for path in self.cache.folder.glob(f"??/*{_CHUNK_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_mtime, status.st_size, path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine; it ends with the process at the latest."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.fstat(file.fileno()).st_ino == path.stat().st_ino
            except FileNotFoundError:
                same = False  # removed while we waited: another may have made a new one
            if same:
                yield
                return


class RemoteTokens:
    """The tokens of a file in a store, downloaded chunk by chunk as they are asked for.

    Args:
        store: Where.
        name: The file.
        key: Names its content in the cache.
        dtype: Of the ids.
        n_tokens: How many there are.
        hashes: Of the blocks.
    """

    def __init__(
        self, store: Store, name: str, key: str, dtype: np.dtype[Any], n_tokens: int,
        hashes: UInt64[np.ndarray, " blocks"],
    ) -> None:  # fmt: skip
        self._store, self._name, self._key = store, name, key
        self.dtype, self._n_tokens, self._hashes = dtype, n_tokens, hashes
        self._per_chunk = CHUNK_BYTES // dtype.itemsize
        self._open: OrderedDict[int, CheckedTokens] = OrderedDict()
        self._renewed: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, key: slice) -> np.ndarray:
        """Return some tokens, downloaded when they are not here.

        Raises:
            DamagedBlocksError: The store does not have what was written.
            PunaError: It cannot be reached.
        """
        start, end, _ = key.indices(len(self))
        if end <= start:
            return np.empty(0, self.dtype)
        parts = []
        for number in range(start // self._per_chunk, (end - 1) // self._per_chunk + 1):
            begin = number * self._per_chunk
            parts.append(self._read(number, slice(max(start - begin, 0), end - begin)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Download what is not here yet of several ranges of tokens, many chunks at a time."""
        wanted = {
            number
            for start, end in ranges
            if end > start
            for number in range(start // self._per_chunk, (end - 1) // self._per_chunk + 1)
        }
        missing = sorted(number for number in wanted if number not in self._open)
        if len(missing) < 2:
            return

        with ThreadPoolExecutor(min(_DOWNLOADS, len(missing))) as pool:
            list(pool.map(self._file, missing))

    def _read(self, number: int, key: slice) -> np.ndarray:
        """Read tokens of a chunk; a copy on this disk that has gone bad is downloaded once more."""
        try:
            return self._chunk(number)[key]
        except DamagedBlocksError as error:
            if number not in self._renewed:
                self._renewed.add(number)
                self._file(number, anew=True)
                with self._lock:
                    self._open.pop(number, None)
                return self._read(number, key)
            begin = number * self._per_chunk
            raise DamagedBlocksError(begin + error.first, begin + error.end, error.why) from error

    def _chunk(self, number: int) -> CheckedTokens:
        with self._lock:
            found = self._open.get(number)
            if found is not None:
                self._open.move_to_end(number)
                return found
        start, end = self._bytes(number)
        found = CheckedTokens(self._mapped(number), self._hashes[_blocks(start, end)])
        with self._lock:
            self._open[number] = found
            while len(self._open) > _OPEN_CHUNKS:
                self._open.popitem(last=False)
        return found

    def _mapped(self, number: int) -> np.ndarray:
        start, end = self._bytes(number)
        n_tokens = (end - start) // self.dtype.itemsize
        for anew in (False, True):
            with contextlib.suppress(FileNotFoundError, ValueError):  # dropped just now; cut short
                return np.memmap(self._file(number, anew), self.dtype, "r", shape=(n_tokens,))
        return np.frombuffer(self._load(number), self.dtype)

    def _file(self, number: int, anew: bool = False) -> Path:
        return self._store.chunk(self._key, number, lambda: self._load(number), anew=anew)

    def _load(self, number: int) -> bytes:
        """Download a chunk, twice when it does not arrive as it was written."""
        start, end = self._bytes(number)
        data = self._store.read(self._name, start, end)
        if damaged_blocks(data, self._hashes[_blocks(start, end)]):
            data = self._store.read(self._name, start, end)
        return data.ljust(end - start, b"\0")  # of a file cut short: blocks with a wrong hash

    def _bytes(self, number: int) -> tuple[int, int]:
        start = number * CHUNK_BYTES
        return start, min(start + CHUNK_BYTES, self._n_tokens * self.dtype.itemsize)


def _blocks(start: int, end: int) -> slice:
    """Return the blocks of some bytes of a file that begin with a block."""
    return slice(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))
