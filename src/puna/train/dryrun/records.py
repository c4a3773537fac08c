"""What is asked of a dry run of one rank and what it tells; imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from puna.model.config import LlamaConfig
from puna.train.config import ParallelConfig, TrainingConfig
from puna.train.dryrun.uneven import Cut


@dataclass(frozen=True, order=True)
class Collective:
    """One kind of collective of a rank.

    Attributes:
        dim: Dimension of the mesh whose ranks take part (``tp``, ``cp``, ``pp``, ``shard``,
            ``replicate``; ``shard_cp`` and ``shard_cp_tp`` are several at once, ``all`` is every
            rank).
        kind: ``all_gather``, ``reduce_scatter``, ``all_reduce``, ``send``, ``receive`` ...
        n_ranks: Ranks of the group.
        n_bytes: Of the whole tensor on this rank: gathered, before it is scattered, reduced, sent.
    """

    dim: str
    kind: str
    n_ranks: int
    n_bytes: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends when ring algorithms are used (a prediction)."""
        share = (self.n_ranks - 1) / self.n_ranks
        factors = {"all_reduce": 2 * share, "send": 1.0, "receive": 0.0, "broadcast": share}
        return self.n_bytes * factors.get(self.kind, share)


@dataclass(frozen=True)
class RankTask:
    """One rank to build, and to take a step with.

    Attributes:
        cfg: Of the training.
        model: Its model.
        parallel: How the ranks share the work; may have another schedule than ``cfg``.
        rank: Number of the rank.
        n_micro: Micro-batches of the step.
    """

    cfg: TrainingConfig
    model: LlamaConfig
    parallel: ParallelConfig
    rank: int
    n_micro: int

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch."""
        return self.cfg.micro_batch or self.cfg.rank_batch


@dataclass
class RankRecord:
    """What a rank did in its step.

    Attributes:
        n_bytes: By what they are for.
        kept: Bytes that one forward pass of each of its stages keeps, by number of the stage.
        collectives: How often each was called.
        one_more: What one more micro-batch would add; None when that was not recorded.
        actions: With several stages per rank, for every pipeline rank in order: ``F``, ``B``, ``I``
            or ``W`` and the number of the stage.
        cuts: Its parameters.
    """

    n_bytes: dict[str, int]
    kept: dict[int, int]
    collectives: Counter[Collective]
    one_more: Counter[Collective] | None = None
    actions: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)


def added(
    counts: Mapping[Collective, int], one_more: Mapping[Collective, int], times: int
) -> Counter[Collective]:
    """Go on in a straight line: every further micro-batch does what the one before did.

    FSDP gathers before the first micro-batch and reduces after the last one.
    """
    return Counter({k: counts.get(k, 0) + times * one_more.get(k, 0) for k in {*counts, *one_more}})
