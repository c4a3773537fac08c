"""Shards that are not all of one size: which, and where; imports no torch.

A dimension is cut as ``torch.chunk`` cuts: every part is as long as the first one, but for the last
ones, which may be shorter or empty. FSDP pads them in memory to the size of the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut.

    Attributes:
        name: Of the parameter.
        shape: Of the whole.
        tp_dim: Dimension that tensor parallel cuts; None when each rank has all of it.
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None

    @property
    def n_params(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def local_shape(self, tp_rank: int, tp: int, shard_rank: int, shards: int) -> tuple[int, ...]:
        """Shape of a rank's part: tensor parallel cuts first, FSDP the rows of what is left."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = part_size(shape[self.tp_dim], tp_rank, tp)
        shape[0] = part_size(shape[0], shard_rank, shards)
        return tuple(shape)


def part_size(size: int, index: int, n_parts: int) -> int:
    """Length of one part of a dimension that is cut into ``n_parts``."""
    longest = -(-size // n_parts)
    return max(0, min(longest, size - longest * index))


def distinct_places(cuts: Iterable[Cut], tp: int, shards: int) -> list[tuple[int, int]]:
    """Return one (TP rank, FSDP rank) of every set of ranks whose parts have equal shapes.

    The first is (0, 0), whose parts are the largest.
    """
    unique = {(cut.shape, cut.tp_dim): cut for cut in cuts}.values()
    # Where no part changes its size between two neighbours there is nothing to look at.
    places: dict[tuple[tuple[int, ...], ...], tuple[int, int]] = {}
    for tp_rank in _turns(tp, [c.shape[c.tp_dim] for c in unique if c.tp_dim is not None]):
        rows = {c.local_shape(tp_rank, tp, 0, 1)[0] for c in unique}
        for shard_rank in _turns(shards, rows):
            shapes = tuple(c.local_shape(tp_rank, tp, shard_rank, shards) for c in unique)
            places.setdefault(shapes, (tp_rank, shard_rank))
    return list(places.values())


def _turns(n_parts: int, sizes: Iterable[int]) -> list[int]:
    """Numbers of the parts at which the size of some dimension changes, and 0."""
    turns = {0}
    for size in set(sizes):
        longest = -(-size // n_parts)
        full = size // longest if longest else n_parts  # parts of full length
        turns |= {part for part in (full, full + 1) if part < n_parts}
    return sorted(turns)


def uneven(cuts: Iterable[Cut], tp: int, shards: int) -> list[str]:
    """Name what is not cut into equal parts."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for cut in cuts:
        if cut.tp_dim is not None and cut.shape[cut.tp_dim] % tp:
            found.setdefault(("tp", cut.shape[cut.tp_dim], tp), []).append(cut.name)
        rows = cut.local_shape(0, tp, 0, 1)[0]
        if rows % shards:
            found.setdefault(("FSDP", rows, shards), []).append(cut.name)
    lines = []
    for (what, size, n_parts), names in found.items():
        longest, last = part_size(size, 0, n_parts), part_size(size, n_parts - 1, n_parts)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(
            f"{names[0]}{more}: {size} rows over {n_parts} {what} ranks, {longest} on the first, "
            f"{last} on the last"
        )
    return lines
