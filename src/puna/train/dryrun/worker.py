"""What the processes of a dry run call; imports no torch, as the one that asks needs none."""

from __future__ import annotations

from puna.train.dryrun.records import RankRecord, RankTask


def step_through(task: RankTask) -> RankRecord:
    """See :func:`puna.train.dryrun.rank.step_through`."""
    from puna.train.dryrun import rank

    return rank.step_through(task)


def local_shapes(task: RankTask) -> dict[str, tuple[int, ...]]:
    """See :func:`puna.train.dryrun.rank.local_shapes`."""
    from puna.train.dryrun import rank

    return rank.local_shapes(task)
