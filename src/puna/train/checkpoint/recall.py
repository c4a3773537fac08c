"""The newest state that the memory of all ranks together still has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puna.train.checkpoint.repair import Served, ShardSource, find_shard
from puna.train.checkpoint.replica import Replicas
from puna.train.checkpoint.snapshot import SnapshotNote, Snapshots
from puna.train.parallel.world import World

_PEER = "peer"
_Held = dict[int, tuple[str, list[str]]]


def recall(
    snapshots: Snapshots,
    world: World,
    sources: Sequence[ShardSource],
    at_least: int,
    replicas: Replicas | None = None,
) -> tuple[int, list[Served]] | None:
    """Load the newest snapshot that every rank has, or of which others have what a rank lacks.

    Args:
        snapshots: Of this rank.
        world: Ranks; all of them must call it.
        sources: Asked for the parts that are damaged.
        at_least: Older ones are of no use.
        replicas: Copies in the memory of other ranks, which are asked first.

    Returns:
        Its step, and the parts of all ranks that another place had to give; None without one.
    """
    mine = sorted(snapshots.damage())
    of_ranks: list[tuple[list[int], _Held]] = world.gather(
        (mine, replicas.held() if replicas is not None else {})
    )
    own = [set(steps) for steps, _ in of_ranks]
    copies: list[_Held] = [
        of_ranks[replicas.holder(rank)][1] if replicas is not None else {}
        for rank in range(world.size)
    ]
    common = set.intersection(*(own[rank] | set(copies[rank]) for rank in range(world.size)))
    for step in sorted((step for step in common if step >= at_least), reverse=True):
        if step not in own[world.rank]:
            note = SnapshotNote.from_json(copies[world.rank][step][0])
            if note is not None:
                snapshots.adopt(note)
        wanted: list[dict[str, Any] | None] = world.gather(snapshots.damage().get(step))
        if any(parts is None for parts in wanted):
            continue
        served = _from_peers(snapshots, world, replicas, step, wanted, copies)
        rest = _mend(snapshots, step, world.rank, sources)
        all_served = world.gather(None if rest is None else [*served, *rest])
        if all(part is not None for part in all_served):
            snapshots.load(step)
            return step, [one for part in all_served for one in part]
    return None


def _from_peers(
    snapshots: Snapshots,
    world: World,
    replicas: Replicas | None,
    step: int,
    wanted: Sequence[dict[str, Any] | None],
    copies: Sequence[_Held],
) -> list[Served]:
    """Send what others lack, receive what this rank lacks; return what now fits its hash."""
    if replicas is None:
        return []
    asked: list[str] = []
    for rank, (parts, copy) in enumerate(zip(wanted, copies, strict=True)):
        if not parts or step not in copy:
            continue
        names = [name for name in parts if name not in copy[step][1]]
        if world.rank == replicas.holder(rank):
            replicas.give(step, names, rank)
        if world.rank == rank:
            for name in names:
                data = replicas.take(replicas.holder(rank), parts[name][0])
                snapshots.replace(step, name, data)
            asked = names
    rest = snapshots.damage()[step]
    return [Served(name, _PEER, world.rank) for name in asked if name not in rest]


def _mend(
    snapshots: Snapshots, step: int, rank: int, sources: Sequence[ShardSource]
) -> list[Served] | None:
    """Replace the parts that are still damaged; None when one is nowhere."""
    served = []
    for name, (n_bytes, digest) in snapshots.damage()[step].items():
        found = find_shard(sources, n_bytes, digest)
        if found is None:
            return None
        snapshots.replace(step, name, found[0])
        served.append(Served(name, found[1], rank))
    return served
