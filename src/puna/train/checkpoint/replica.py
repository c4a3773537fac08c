"""Copies of snapshots in the memory of another node, for the day when a node is lost.

Rank ``r`` keeps the snapshots of rank ``r + ranks_per_node``, in two buffers like its own. They
go from rank to rank after each commit, in the thread that commits, through a group of their own. On
one node the next rank keeps them, which helps against a damaged snapshot, not a lost machine.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from puna.core.fsio import write_json
from puna.core.ledger import Ledger
from puna.train.checkpoint.snapshot import SnapshotNote, Snapshots, map_buffer
from puna.train.parallel.world import World

PEERS_DIR = "peers"
"""Folder of the copies, beside the snapshots."""
_NAMES = ("a", "b")


class Replicas:
    """What this rank keeps for another one.

    Args:
        folder: Of the snapshots.
        world: Ranks, two or more; all of them make one.
        ranks_per_node: Distance to the rank whose snapshots are kept here.
        snapshots: Of this rank; each is sent when it is committed.
        events: Ledger.

    Raises:
        OSError: The memory file system has no room for two copies; on any rank.
    """

    def __init__(
        self, folder: Path, world: World, ranks_per_node: int, snapshots: Snapshots, events: Ledger
    ) -> None:
        self._world, self._events = world, events
        shift = ranks_per_node % world.size or 1
        self._source = (world.rank + shift) % world.size
        self._target = (world.rank - shift) % world.size
        group = world.background_group()
        if group is None:
            raise ValueError("one rank alone has no peer")
        self._group, self._is_broken = group, False
        size = world.gather(snapshots.n_bytes)[self._source]
        folder = folder / PEERS_DIR
        self._notes = {name: folder / f"rank-{world.rank}.{name}.json" for name in _NAMES}
        problem = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._buffers = {
                name: map_buffer(note.with_suffix(".bin"), size, note)
                for name, note in self._notes.items()
            }
        except OSError as error:
            problem = str(error)
        problems = [text for text in world.gather(problem) if text]
        if problems:
            raise OSError(problems[0])
        snapshots.on_commit = self._exchange

    def held(self) -> dict[int, tuple[str, list[str]]]:
        """Note (JSON) and damaged parts of the snapshots that are kept here, by step."""
        found = {}
        for name in _NAMES:
            note = SnapshotNote.read(self._notes[name])
            if note is not None and self._fits(note, name):
                found[note.step] = json.dumps(asdict(note)), self._damaged(note, name)
        return found

    def holder(self, rank: int) -> int:
        """The rank that keeps a rank's snapshots."""
        return (rank + self._target - self._world.rank) % self._world.size

    def give(self, step: int, parts: Collection[str], rank: int) -> None:
        """Send parts of a snapshot to the rank that they belong to."""
        for name in _NAMES:
            note = SnapshotNote.read(self._notes[name])
            if note is not None and note.step == step and self._fits(note, name):
                for part in parts:
                    start, n_bytes = note.spans[part]
                    dist.send(_view(self._buffers[name], start, n_bytes), rank, self._group)
                return
        raise ValueError(f"no copy of step {step}")

    def take(self, rank: int, n_bytes: int) -> bytes:
        """Receive a part from the rank that keeps it."""
        data = torch.empty(n_bytes, dtype=torch.uint8)
        dist.recv(data, rank, self._group)
        return data.numpy().tobytes()

    def _fits(self, note: SnapshotNote, name: str) -> bool:
        end = max((start + n_bytes for start, n_bytes in note.spans.values()), default=0)
        return end <= len(self._buffers[name])

    def _damaged(self, note: SnapshotNote, name: str) -> list[str]:
        view = memoryview(self._buffers[name])
        return [
            part
            for part, (start, n_bytes) in note.spans.items()
            if xxhash.xxh3_128_hexdigest(view[start : start + n_bytes]) != note.hashes[part]
        ]

    def _exchange(self, note: SnapshotNote, buffer: mmap.mmap) -> None:
        """Send a snapshot and receive one. A failure is told; training goes on without copies."""
        if self._is_broken:
            return
        try:
            text = torch.frombuffer(bytearray(json.dumps(asdict(note)).encode()), dtype=torch.uint8)
            length = torch.zeros(1, dtype=torch.int64)
            self._swap(torch.tensor([len(text)]), length)
            their_text = torch.empty(int(length), dtype=torch.uint8)
            self._swap(text, their_text)
            name = self._oldest()
            self._notes[name].unlink(missing_ok=True)
            self._swap(_view(buffer), _view(self._buffers[name]))
            theirs = SnapshotNote.from_json(their_text.numpy().tobytes())
            if theirs is None or self._damaged(theirs, name):
                self._tell(note.step, "it came damaged")
            else:
                write_json(self._notes[name], asdict(theirs))
        except OSError as error:
            self._tell(note.step, str(error))
        except (RuntimeError, dist.DistError) as error:
            self._is_broken = True
            self._tell(note.step, str(error))

    def _swap(self, mine: Tensor, theirs: Tensor) -> None:
        works = [
            dist.isend(mine, self._target, self._group),
            dist.irecv(theirs, self._source, self._group),
        ]
        for work in works:
            if work is not None:
                work.wait()

    def _oldest(self) -> str:
        notes = {name: SnapshotNote.read(path) for name, path in self._notes.items()}
        steps = {name: -1 if note is None else note.step for name, note in notes.items()}
        return min(_NAMES, key=lambda name: steps[name])

    def _tell(self, step: int, why: str) -> None:
        self._events.emit(
            "train.replica_failed", step=step, rank=self._world.rank, of=self._source, why=why
        )


def _view(buffer: mmap.mmap, start: int = 0, n_bytes: int | None = None) -> Tensor:
    count = len(buffer) if n_bytes is None else n_bytes
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(buffer, dtype=torch.uint8, count=count, offset=start)
