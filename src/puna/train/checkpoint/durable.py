"""The durable tier: checkpoints in a store of any kind that fsspec opens.

Shards lie under their hash, so one that did not change is not written again; a checkpoint is its
manifest, which is written last. An upload runs in a thread after the commit on disk. It never ends
a training: what fails is told, and the next checkpoint tries again.

In the store, below one folder per job (the digest of its configuration)::

    shards/<first two digits>/<xxh3-128>
    step-00000100.json

Imports no torch.
"""

from __future__ import annotations

import errno
import json
import re
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import xxhash

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.train.checkpoint.manifest import DamagedCheckpointError, Manifest, step_dir

_MANIFEST = re.compile(r"step-(\d{8})\.json")
_BATCH_BYTES = 64 << 20
_ID_DIGITS = 16


class DurableStore:
    """The checkpoints of one job in a store.

    Args:
        url: ``s3://bucket/folder``, ``file:///mnt/nfs/folder``, ``memory://folder``.
        options: Of the store, for fsspec.
        identity: Digest of the job.
        keep: The newest that are kept.
        events: Ledger.

    Raises:
        PunaError: The kind of store is unknown.
    """

    tier = "store"

    def __init__(
        self, url: str, options: dict[str, Any], *, identity: str, keep: int, events: Ledger
    ) -> None:
        from puna.data.sources.remote import open_store

        self.url = f"{url.rstrip('/')}/{identity[:_ID_DIGITS]}"
        self._fs, root = open_store(self.url, options)
        self._root, self._keep, self._events = root.rstrip("/"), keep, events
        self._lock = threading.Lock()
        self._pending: tuple[Path, Manifest] | None = None
        self._running: int | None = None
        self._thread: threading.Thread | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the store, newest first.

        Raises:
            PunaError: The store cannot be read.
        """

        def find() -> list[str]:
            self._fs.invalidate_cache()
            return self._fs.ls(self._root, detail=False)

        try:
            names = self._retrying(find)
        except FileNotFoundError:
            return []
        found = [_MANIFEST.fullmatch(name.rpartition("/")[2]) for name in names]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def manifest(self, step: int) -> Manifest:
        """Read a manifest.

        Raises:
            DamagedCheckpointError: There is none, or its root does not fit.
            PunaError: The store cannot be read.
        """
        try:
            return Manifest.from_json(self._read(self._manifest_path(step)))
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{self.url} has no step {step}") from error

    def find(self, n_bytes: int, xxh3_128: str) -> bytes | None:
        """Return a shard whose hash fits; a damaged one is removed, so that it is written anew."""
        path = self._shard_path(xxh3_128)
        try:
            data = self._read(path)
            if len(data) == n_bytes and xxhash.xxh3_128_hexdigest(data) == xxh3_128:
                return data
            self._events.emit("train.store_damaged", shard=xxh3_128, url=self.url)
            self._remove([path])
        except FileNotFoundError:
            return None
        except PunaError as error:
            self._events.emit("train.store_failed", url=self.url, error=error.message)
        return None

    def put(self, folder: Path, manifest: Manifest) -> None:
        """Upload a checkpoint in the background; one that still waits for its turn is dropped."""
        with self._lock:
            self._pending = (folder, manifest)
            if self._running is None:
                self._running = manifest.step
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def in_use(self) -> set[int]:
        """Steps whose folders must stay on disk."""
        with self._lock:
            pending = {self._pending[1].step} if self._pending else set()
            return pending | ({self._running} if self._running is not None else set())

    def wait(self) -> None:
        """Wait for all uploads."""
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._pending is None:
                    self._running = None
                    return
                (folder, manifest), self._pending = self._pending, None
                self._running = manifest.step
            try:
                self._upload_or_make_room(folder, manifest)
            except Exception as error:  # noqa: BLE001 (an upload never ends a training; it is told)
                self._events.emit(
                    "train.upload_failed", step=manifest.step, url=self.url, error=str(error)
                )

    def _upload_or_make_room(self, folder: Path, manifest: Manifest) -> None:
        """Upload; in a full store, drop the oldest checkpoint and try again while there is one."""
        while True:
            try:
                self.upload(folder, manifest)
                return
            except PunaError as error:
                older = [step for step in self.steps() if step < manifest.step]
                if not is_no_room(error) or len(older) < 2:  # the last good one stays
                    raise
                self.remove(older[-1:])

    def upload(self, folder: Path, manifest: Manifest) -> None:
        """Write the shards that the store does not have, then the manifest; drop the oldest.

        Raises:
            DamagedCheckpointError: A file on disk has changed since the commit.
            PunaError: The store cannot be written.
        """
        start_s = time.monotonic()
        known, n_new, n_bytes = self._sizes(), 0, 0
        batch: dict[str, bytes] = {}
        for file in manifest.files:
            with (folder / file.path).open("rb") as opened:
                for shard in file.shards:
                    path = self._shard_path(shard.xxh3_128)
                    if path in batch or known.get(path.rpartition("/")[2]) == shard.n_bytes:
                        continue
                    opened.seek(shard.offset)
                    data = opened.read(shard.n_bytes)
                    if xxhash.xxh3_128_hexdigest(data) != shard.xxh3_128:
                        raise DamagedCheckpointError(f"{file.path} ({shard.name}) is damaged")
                    batch[path], n_new, n_bytes = data, n_new + 1, n_bytes + len(data)
                    if sum(map(len, batch.values())) >= _BATCH_BYTES:
                        self._write(batch)
                        known |= {name.rpartition("/")[2]: len(d) for name, d in batch.items()}
                        batch = {}
        self._write(batch)
        text = json.dumps(manifest.to_json()).encode()
        self._write({self._manifest_path(manifest.step): text})
        self._events.emit(
            "train.upload", step=manifest.step, url=self.url, seconds=time.monotonic() - start_s,
            n_bytes=manifest.n_bytes, written_bytes=n_bytes, written_shards=n_new,
        )  # fmt: skip
        self.remove(self.steps()[self._keep :])

    def remove(self, steps: list[int]) -> None:
        """Remove checkpoints, and the shards that no other one has."""
        if not steps:
            return
        self._remove([self._manifest_path(step) for step in steps])
        used = {
            shard.xxh3_128
            for step in self.steps()
            for file in self.manifest(step).files
            for shard in file.shards
        }
        self._remove([self._shard_path(name) for name in self._sizes() if name not in used])

    def _sizes(self) -> dict[str, int]:
        """Sizes of the shards in the store, by hash."""

        def find() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            return self._fs.find(f"{self._root}/shards", detail=True)

        try:
            found = self._retrying(find)
        except FileNotFoundError:
            return {}
        return {path.rpartition("/")[2]: int(info["size"]) for path, info in found.items()}

    def _write(self, files: dict[str, bytes]) -> None:
        """Write files, each whole or not at all."""
        if not files:
            return
        if "file" not in _protocols(self._fs):  # a put to an object store is whole or nothing
            self._retrying(lambda: self._fs.pipe(files))
            return

        def write_aside() -> None:
            for path, data in files.items():
                aside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(aside, data)
                self._fs.mv(aside, path)

        self._retrying(write_aside)

    def _remove(self, paths: list[str]) -> None:
        if paths:
            self._retrying(lambda: self._fs.rm(paths))

    def _read(self, path: str) -> bytes:
        return self._retrying(lambda: self._fs.cat_file(path))

    def _retrying(self, action: Any) -> Any:
        from puna.data.sources.remote import retrying

        return retrying(action, self.url)

    def _shard_path(self, xxh3_128: str) -> str:
        return f"{self._root}/shards/{xxh3_128[:2]}/{xxh3_128}"

    def _manifest_path(self, step: int) -> str:
        return f"{self._root}/{step_dir(Path(), step).name}.json"


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def is_no_room(error: BaseException | None) -> bool:
    """Tell whether an error, or what caused it, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
