"""The plan of an ingest: which items are read together, decided before any worker starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.core.config import identity
from puna.core.fsio import hash_json
from puna.data.sources import WorkItem, list_source
from puna.data.sources.base import SourceConfig

WORK_DIR = ".work"


@dataclass(frozen=True)
class Unit:
    """Items of one source that one worker reads in one go; the unit of resuming.

    A unit writes one shard, or several when its texts exceed ``shard_bytes`` (one huge file).
    """

    index: int
    source: SourceConfig
    items: tuple[WorkItem, ...]
    shard_bytes: int
    strict: bool
    out: Path

    @property
    def n_bytes(self) -> int:
        """Bytes of its items as stored."""
        return sum(item.n_bytes for item in self.items)

    @property
    def digest(self) -> str:
        """Identifies the work: what an earlier attempt wrote is reused only if this is equal."""
        return hash_json([
            self.index, identity(self.source), self.shard_bytes,
            [(item.path, item.location, item.n_bytes, item.stamp) for item in self.items],
        ])  # fmt: skip

    @property
    def state_file(self) -> Path:
        """Written last, when the unit is done."""
        return self.out / WORK_DIR / f"unit-{self.index:05d}.json"

    @property
    def quarantine_file(self) -> Path:
        """What the unit has set aside."""
        return self.out / WORK_DIR / f"unit-{self.index:05d}.quarantine.jsonl"

    def part_file(self, part: int) -> Path:
        """Documents of the unit, part ``part``."""
        return self.out / WORK_DIR / f"unit-{self.index:05d}-{part:03d}.parquet"

    def __str__(self) -> str:
        span = f"{self.items[0].path} .. {self.items[-1].path}" if self.items else "nothing"
        return f"source {self.source.name!r}, {span}"


def make_plan(
    listings: Sequence[tuple[SourceConfig, Sequence[WorkItem]]],
    shard_bytes: int,
    strict: bool,
    out: Path,
) -> list[Unit]:
    """Group the items of each source, in the order of their paths, into units.

    The plan depends on the listing and ``shard_bytes`` only, never on the number of workers.
    """
    units: list[Unit] = []
    for source, items in listings:
        for group in _groups(items, shard_bytes):
            units.append(Unit(len(units), source, group, shard_bytes, strict, out))
    return units


def _groups(items: Sequence[WorkItem], shard_bytes: int) -> Iterator[tuple[WorkItem, ...]]:
    group: list[WorkItem] = []
    n_bytes = 0
    for item in items:
        if group and n_bytes + item.n_bytes > shard_bytes:
            yield tuple(group)
            group, n_bytes = [], 0
        group.append(item)
        n_bytes += item.n_bytes
    if group:
        yield tuple(group)


def listing_digest(sources: Sequence[SourceConfig]) -> dict[str, Any]:
    """Return, per source, number, bytes and a digest of the items that a listing finds now."""
    found = {}
    for source in sources:
        items = list_source(source)
        found[source.name] = {
            "items": len(items),
            "bytes": sum(item.n_bytes for item in items),
            "digest": hash_json([(item.path, item.n_bytes, item.stamp) for item in items]),
        }
    return found
