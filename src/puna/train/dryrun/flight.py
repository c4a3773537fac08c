"""Which micro-batches of a pipeline rank wait for their backward pass at the same time.

Their activations are what a pipeline costs in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from puna.train.config import ParallelConfig


def most_in_flight(actions: Iterable[tuple[str, int]], bytes_of: Mapping[int, int]) -> int:
    """Return the most bytes that the activations of a rank take at one time.

    Args:
        actions: Of a rank, in order: kind and stage. A backward pass in two parts (``I``, ``W``)
            frees the activations with the second one.
        bytes_of: Bytes of one micro-batch, by stage.
    """
    now = most = 0
    for kind, stage in actions:
        if kind == "F":
            now += bytes_of[stage]
            most = max(most, now)
        elif kind in ("B", "W"):
            now -= bytes_of[stage]
    return most


def passes(actions: Iterable[Any]) -> Iterator[tuple[str, int]]:
    """Yield kind and stage of the passes among a rank's actions, as PyTorch's schedules have them.

    Those that run at the same time (DualPipe) come one after the other.
    """
    for action in actions:
        if action is None:
            continue
        if action.sub_actions is not None:
            yield from passes(action.sub_actions)
        else:
            yield action.computation_type.value, action.stage_index


def single_stage_flight(parallel: ParallelConfig, pp_rank: int, n_micro: int) -> int:
    """Micro-batches in flight of the schedules with one stage per rank."""
    if parallel.pp == 1:
        return 1
    return n_micro if parallel.schedule == "gpipe" else min(parallel.pp - pp_rank, n_micro)


def has_single_stages(parallel: ParallelConfig) -> bool:
    """Tell whether every rank has one stage."""
    return parallel.pp == 1 or parallel.schedule in ("gpipe", "1f1b")
