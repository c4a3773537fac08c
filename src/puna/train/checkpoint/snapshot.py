"""Snapshots in shared memory: the newest state of a rank, which outlives the rank.

A rank copies its parts of all tensors into one of two buffers: files in a memory file system,
mapped and filled with zeros beforehand, since fresh memory costs five times the copy. A thread then
hashes every part (xxh3-128), and a small file beside the buffer commits it with the hashes, their
Merkle root and the step. A buffer without that file is no snapshot: the file
is removed before the first byte is overwritten, and while one buffer is written the other one
stays.

A process that is started again in the same place maps the buffers, compares every hash and copies
back. A snapshot is never trusted: memory is where bits flip.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from puna.core.fsio import write_json
from puna.train.checkpoint.manifest import merkle_root, read_shard

_ALIGN_BYTES = 64
_NAMES = ("a", "b")


@dataclass(frozen=True)
class SnapshotNote:
    """What commits a buffer.

    Attributes:
        step: Steps done.
        dtype: Dtype of the matrix products so far.
        key: What the snapshot belongs to: job, layout and rank.
        hashes: xxh3-128 of each tensor's part, in hexadecimal.
        spans: Where each part begins in the buffer, and how many bytes it has.
        root: Of the Merkle tree over these and the other fields.
    """

    step: int
    dtype: str
    key: str
    hashes: dict[str, str]
    spans: dict[str, tuple[int, int]]
    root: str

    @classmethod
    def make(
        cls,
        step: int,
        dtype: str,
        key: str,
        hashes: dict[str, str],
        spans: dict[str, tuple[int, int]],
    ) -> SnapshotNote:
        """Compute the root."""
        bare = cls(step, dtype, key, hashes, spans, "")
        return replace(bare, root=bare._root())

    @classmethod
    def read(cls, path: Path) -> SnapshotNote | None:
        """Read a note; None when there is none with a root that fits."""
        try:
            return cls.from_json(path.read_bytes())
        except OSError:
            return None

    @classmethod
    def from_json(cls, text: str | bytes) -> SnapshotNote | None:
        """Read a note; None when its root does not fit."""
        try:
            values = json.loads(text)
            values["spans"] = {name: (at, size) for name, (at, size) in values["spans"].items()}
            note = cls(**values)
            is_whole = note.root == note._root()
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return note if is_whole else None

    def _root(self) -> str:
        parts = [[name, *self.spans[name], self.hashes[name]] for name in sorted(self.hashes)]
        return merkle_root(json.dumps(leaf) for leaf in [[self.step, self.dtype, self.key], *parts])


class Snapshots:
    """The snapshots of one rank.

    Args:
        folder: In a memory file system; shared by the ranks of a machine.
        rank: This rank.
        key: What the snapshots belong to; others are not read.
        tensors: Live tensors, sharded or plain; their parts are copied.

    Raises:
        OSError: The memory file system has no room for two copies of the parts.
    """

    def __init__(self, folder: Path, rank: int, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._key = key
        self._tensors = tensors
        self._spans, size = _layout(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        self._notes = {name: folder / f"rank-{rank}.{name}.json" for name in _NAMES}
        self._buffers = {
            name: map_buffer(folder / f"rank-{rank}.{name}.bin", size, self._notes[name])
            for name in _NAMES
        }
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pinned: str | None = None
        self._taken: dict[int, str] = {}
        self.on_commit: Callable[[SnapshotNote, mmap.mmap], None] | None = None
        self.stall_s = 0.0

    def take(self, step: int, dtype: str) -> None:
        """Copy the tensors; returns when they may change again. ``stall_s`` tells what it took."""
        start_s = time.perf_counter()
        self.settle()
        name = self._oldest()
        self._notes[name].unlink(missing_ok=True)
        self._taken = {s: n for s, n in self._taken.items() if n != name} | {step: name}
        parts = self._parts(name)
        torch._foreach_copy_(list(parts.values()), [_local(t) for t in self._tensors.values()])
        self._thread = threading.Thread(target=self._commit, args=(name, step, dtype), daemon=True)
        self._thread.start()
        self.stall_s = time.perf_counter() - start_s

    def settle(self) -> None:
        """Wait until the last snapshot is committed.

        Raises:
            OSError: It could not be.
        """
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _join(self) -> None:
        thread = self._thread
        if thread is not None:
            thread.join()
            if self._thread is thread:  # whoever waits beside us may have started the next one
                self._thread = None

    def steps(self) -> list[int]:
        """Steps of the snapshots whose every hash fits, newest first."""
        self.settle()
        return sorted((note.step for _, note in self._valid()), reverse=True)

    def damage(self) -> dict[int, dict[str, tuple[int, str]]]:
        """Size and hash of the damaged parts of each snapshot, by step; empty where it is whole."""
        self.settle()
        found: dict[int, dict[str, tuple[int, str]]] = {}
        for name in _NAMES:
            note = self._note(name)
            if note is not None:
                now = self._hashes(name)
                found[note.step] = {
                    part: (self._spans[part][1], digest)
                    for part, digest in note.hashes.items()
                    if now[part] != digest
                }
        return found

    def adopt(self, note: SnapshotNote) -> None:
        """Take the note of a snapshot that is to be filled by :meth:`replace`; foreign ones not."""
        if note.key == self._key and note.spans == self._spans:
            name = self._oldest()
            self._notes[name].unlink(missing_ok=True)
            write_json(self._notes[name], asdict(note))

    @property
    def n_bytes(self) -> int:
        """Size of a buffer."""
        return len(self._buffers[_NAMES[0]])

    def replace(self, step: int, part: str, data: bytes) -> None:
        """Write a part of a snapshot anew; its hash is compared when it is loaded."""
        for name in _NAMES:
            note = self._note(name)
            if note is not None and note.step == step:
                start, n_bytes = self._spans[part]
                self._buffers[name][start : start + n_bytes] = data

    def load(self, step: int) -> str:
        """Copy a snapshot back into the tensors; return its dtype.

        Raises:
            ValueError: :meth:`steps` does not name it.
        """
        for name, note in self._valid():
            if note.step == step:
                parts = self._parts(name)
                live = [_local(tensor) for tensor in self._tensors.values()]
                torch._foreach_copy_(live, list(parts.values()))
                return note.dtype
        raise ValueError(f"no whole snapshot of step {step}")

    @contextlib.contextmanager
    def pinned(self, step: int) -> Iterator[dict[str, Tensor]]:
        """Keep a snapshot while somebody reads it; give its tensors, sharded like the live ones."""
        self._join()  # a note that could not be written is no reason not to read the buffer
        name = self._taken.get(step)
        if name is None:  # of a process before this one
            (name,) = [n for n in _NAMES if (note := self._note(n)) and note.step == step]
        self._pinned = name
        try:
            parts = self._parts(name)
            yield {key: _like(self._tensors[key], part) for key, part in parts.items()}
        finally:
            self._pinned = None

    def _oldest(self) -> str:
        """The buffer to overwrite: an empty one or the older one; never a pinned one."""
        steps = {n: (note.step if (note := self._note(n)) else -1) for n in _NAMES}
        return min((n for n in _NAMES if n != self._pinned), key=lambda n: steps[n])

    def _commit(self, name: str, step: int, dtype: str) -> None:
        try:
            note = SnapshotNote.make(step, dtype, self._key, self._hashes(name), self._spans)
            write_json(self._notes[name], asdict(note))
            if self.on_commit is not None:
                self.on_commit(note, self._buffers[name])
        except BaseException as error:  # noqa: BLE001 (raised by whoever waits)
            self._error = error

    def _hashes(self, name: str) -> dict[str, str]:
        buffer = self._buffers[name]
        return {
            key: xxhash.xxh3_128_hexdigest(memoryview(buffer)[start : start + n_bytes])
            for key, (start, n_bytes) in self._spans.items()
        }

    def _valid(self) -> Iterator[tuple[str, SnapshotNote]]:
        for name in _NAMES:
            note = self._note(name)
            if note is not None and note.hashes == self._hashes(name):
                yield name, note

    def _note(self, name: str) -> SnapshotNote | None:
        """The note of a buffer, if it is one of ours."""
        note = SnapshotNote.read(self._notes[name])
        is_ours = note is not None and note.key == self._key and note.spans == self._spans
        return note if is_ours else None

    def _parts(self, name: str) -> dict[str, Tensor]:
        found = {}
        for key, tensor in self._tensors.items():
            part, (start, n_bytes) = _local(tensor), self._spans[key]
            if n_bytes == 0:
                found[key] = torch.empty_like(part, device="cpu")
                continue
            flat = torch.frombuffer(
                self._buffers[name], dtype=part.dtype, count=part.numel(), offset=start
            )
            found[key] = flat.view(part.shape)
        return found


def _layout(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each part begins in a buffer, and how many bytes it has; size of the buffer."""
    spans, at = {}, 0
    for name, tensor in tensors.items():
        n_bytes = _local(tensor).nbytes
        spans[name] = (at, n_bytes)
        at += -(-n_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return spans, max(at, _ALIGN_BYTES)


def map_buffer(path: Path, size: int, note: Path) -> mmap.mmap:
    """Map a buffer; one of another size is none of ours and is made anew."""
    if not path.exists() or path.stat().st_size != size:
        note.unlink(missing_ok=True)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # now and not in the middle of training
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(live: Tensor, part: Tensor) -> Tensor:
    """Give a part the sharding of the live tensor."""
    if not isinstance(live, DTensor):
        return part
    return DTensor.from_local(
        part, live.device_mesh, live.placements, run_check=False, shape=live.shape,
        stride=live.stride(),
    )  # fmt: skip


class MemoryShards:
    """The parts in all snapshots of this machine, of whichever rank.

    Args:
        folder: Of the snapshots.
        tier: Its name in the ledger.
    """

    def __init__(self, folder: Path, tier: str = "memory") -> None:
        self._folder, self.tier = folder, tier
        self._index: dict[str, list[tuple[Path, int]]] | None = None

    def find(self, n_bytes: int, xxh3_128: str) -> bytes | None:
        """Return bytes that have this hash."""
        if self._index is None:
            self._index = {}
            for path in sorted(self._folder.glob("*.json")):
                note = SnapshotNote.read(path)
                if note is None:
                    continue
                for name, digest in note.hashes.items():
                    place = (path.with_suffix(".bin"), note.spans[name][0])
                    self._index.setdefault(digest, []).append(place)
        for path, start in self._index.get(xxh3_128, []):
            data = read_shard(path, start, n_bytes, xxh3_128)
            if data is not None:
                return data
        return None
