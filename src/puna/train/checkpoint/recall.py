"""The newest state that the memory of all ranks together still has."""

from __future__ import annotations

from collections.abc import Sequence

from puna.train.checkpoint.repair import Served, ShardSource, find_shard
from puna.train.checkpoint.snapshot import Snapshots
from puna.train.parallel.world import World


def recall(
    snapshots: Snapshots, world: World, sources: Sequence[ShardSource], at_least: int
) -> tuple[int, list[Served]] | None:
    """Load the newest snapshot that every rank has, after the repair of its damaged parts.

    Args:
        snapshots: Of this rank.
        world: Ranks; all of them must call it.
        sources: Asked for the parts that are damaged.
        at_least: Older ones are of no use.

    Returns:
        Its step, and the parts of all ranks that another place had to give; None without one.
    """
    damage = snapshots.damage()
    common = set.intersection(*map(set, world.gather(list(damage))))
    for step in sorted((step for step in common if step >= at_least), reverse=True):
        served = _mend(snapshots, step, damage[step], world.rank, sources)
        of_ranks = world.gather(served)
        if all(part is not None for part in of_ranks):
            snapshots.load(step)
            return step, [one for part in of_ranks for one in part]
    return None


def _mend(
    snapshots: Snapshots,
    step: int,
    damaged: dict[str, tuple[int, str]],
    rank: int,
    sources: Sequence[ShardSource],
) -> list[Served] | None:
    """Replace the damaged parts of a snapshot; None when one is nowhere."""
    served = []
    for name, (n_bytes, digest) in damaged.items():
        found = find_shard(sources, n_bytes, digest)
        if found is None:
            return None
        snapshots.replace(step, name, found[0])
        served.append(Served(name, found[1], rank))
    return served
