"""Repair of a checkpoint shard by shard, from whatever place still has the right bytes.

A shard is asked for by its hash, so any place may serve: a snapshot in memory, another checkpoint
on disk, a store. What a place gives is hashed again before it is taken. Imports no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from puna.core.fsio import atomic_path, remove_tree
from puna.train.checkpoint.manifest import (
    DamagedCheckpointError,
    Manifest,
    Shard,
    explain_damage,
    find_damage,
    list_steps,
    read_manifest,
    read_shard,
    step_dir,
)


class ShardSource(Protocol):
    """A place that may have the bytes of a shard.

    Attributes:
        tier: Its name in the ledger.
    """

    tier: str

    def find(self, n_bytes: int, xxh3_128: str) -> bytes | None:
        """Return bytes that should have this hash; None where there are none."""
        ...


@dataclass(frozen=True)
class Served:
    """A shard that was not loaded from where it should have been.

    Attributes:
        shard: File and tensor, or the tensor alone.
        tier: Where it came from.
        rank: Whose it is; None for a file.
    """

    shard: str
    tier: str
    rank: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that say something."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def find_shard(
    sources: Sequence[ShardSource], n_bytes: int, xxh3_128: str
) -> tuple[bytes, str] | None:
    """Return the bytes with this hash and the tier that has them; the first source that does."""
    for source in sources:
        data = source.find(n_bytes, xxh3_128)
        if data is not None and xxhash.xxh3_128_hexdigest(data) == xxh3_128:
            return data, source.tier
    return None


def repair(folder: Path, manifest: Manifest, sources: Sequence[ShardSource]) -> list[Served]:
    """Check every shard of a checkpoint and replace those that are damaged.

    Args:
        folder: Of the checkpoint; files may be missing.
        manifest: With a root that fits.
        sources: Asked in this order.

    Returns:
        The replaced shards.

    Raises:
        DamagedCheckpointError: No source has one of them; the folder is as it was, but for files
            that were repaired whole.
    """
    damage = find_damage(folder, manifest)
    files = {file.path: file for file in manifest.files}
    served: list[Served] = []
    for path, shards in damage.items():
        if path not in files:
            remove_tree(folder / path)
            continue
        with atomic_path(folder / path) as fresh:
            if (folder / path).is_file():
                shutil.copyfile(folder / path, fresh)
            with fresh.open("r+b" if fresh.exists() else "w+b") as out:
                out.truncate(files[path].n_bytes)
                for shard in shards:
                    found = find_shard(sources, shard.n_bytes, shard.xxh3_128)
                    if found is None:
                        raise DamagedCheckpointError(explain_damage(folder, manifest, damage))
                    out.seek(shard.offset)
                    out.write(found[0])
                    served.append(Served(f"{path}:{shard.name}", found[1]))
    return served


class DiskShards:
    """The shards of checkpoints on disk.

    Args:
        folder: Holds one folder per checkpoint.
    """

    tier = "disk"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: dict[str, list[tuple[Path, Shard]]] | None = None

    def find(self, n_bytes: int, xxh3_128: str) -> bytes | None:
        """Return bytes that have this hash."""
        if self._index is None:
            self._index = self._read()
        for path, shard in self._index.get(xxh3_128, []):
            data = read_shard(path, shard.offset, n_bytes, xxh3_128)
            if data is not None:
                return data
        return None

    def _read(self) -> dict[str, list[tuple[Path, Shard]]]:
        index: dict[str, list[tuple[Path, Shard]]] = {}
        for step in list_steps(self._folder):
            folder = step_dir(self._folder, step)
            try:
                manifest = read_manifest(folder)
            except DamagedCheckpointError:  # told where that checkpoint is the one to be loaded
                continue
            for file in manifest.files:
                for shard in file.shards:
                    index.setdefault(shard.xxh3_128, []).append((folder / file.path, shard))
        return index
