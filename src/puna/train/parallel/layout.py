"""Which rank does what, and which layouts cannot work; imports no torch.

Ranks are numbered as Llama 3 did (Llama 3, section 3.3.2): the innermost dimension needs the
network most. ``rank = (((replica * shard + s) * pp + p) * cp + c) * tp + t``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from puna.core.errors import PunaError
from puna.model.config import LlamaConfig
from puna.train.config import ParallelConfig, TrainingConfig

REPLICATE, SHARD, PP, CP, TP = "replicate", "shard", "pp", "cp", "tp"
"""Names of the mesh's dimensions, outermost first."""
DIMS = (REPLICATE, SHARD, PP, CP, TP)

_V_SHAPED = {"zbv", "dualpipev"}
_SPLIT = {"interleaved_zero_bubble", *_V_SHAPED}
_ONE_STAGE = {"gpipe", "1f1b"}


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's dimensions, outermost first."""

    replicate: int = 1
    shard: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig, n_ranks: int) -> Layout:
        """Give what is left of the ranks to the sharded data dimension.

        Raises:
            ValueError: The other dimensions do not divide the ranks.
        """
        p = parallel
        shard, rest = divmod(n_ranks, p.tp * p.cp * p.pp * p.replicate)
        if rest or not shard:
            raise ValueError(f"{p} does not divide {n_ranks} ranks")
        return cls(p.replicate, shard, p.pp, p.cp, p.tp)

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of :data:`DIMS`."""
        return (self.replicate, self.shard, self.pp, self.cp, self.tp)

    @property
    def n_ranks(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    @property
    def data(self) -> int:
        """Ranks that take different rows."""
        return self.replicate * self.shard

    @property
    def copies(self) -> int:
        """Ranks that compute the same numbers of a step's loss: TP ranks of every stage."""
        return self.tp * self.pp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Place of a rank in every dimension."""
        found = {}
        for name, size in zip(reversed(DIMS), reversed(self.sizes), strict=True):
            rank, found[name] = divmod(rank, size)
        return found


@dataclass(frozen=True)
class StagePlan:
    """The stages of a pipeline.

    Attributes:
        layers: Of each stage, in order: number of its first layer and one past its last.
        owners: Pipeline rank of each stage.
    """

    layers: tuple[tuple[int, int], ...]
    owners: tuple[int, ...]

    @property
    def n_stages(self) -> int:
        """Number of stages."""
        return len(self.layers)

    def of(self, pp_rank: int) -> list[int]:
        """Stages of a pipeline rank, ascending."""
        return [stage for stage, owner in enumerate(self.owners) if owner == pp_rank]


def plan_stages(parallel: ParallelConfig, n_layers: int) -> StagePlan:
    """Cut the layers into stages and place them.

    Stages are as equal as can be; what is left over goes to the stages from the second on, one
    each, after the first and the last one have got ``less_first`` and ``less_last`` layers less.

    Raises:
        PunaError: The number of stages fits neither ranks, schedule nor layers.
    """
    p, n_stages = parallel, n_stages_of(parallel)
    is_v = p.pp > 1 and p.schedule in _V_SHAPED
    if n_stages % p.pp:
        near = [n for n in (n_stages // p.pp * p.pp, (n_stages // p.pp + 1) * p.pp) if n]
        raise PunaError(
            f"parallel.stages = {n_stages} do not divide among pp = {p.pp} ranks",
            f"use parallel.stages = {' or '.join(map(str, near))}",
        )
    per_rank = n_stages // p.pp
    if p.pp > 1 and p.schedule in _ONE_STAGE and per_rank != 1:
        raise PunaError(
            f"the schedule {p.schedule} has one stage per rank, not {per_rank}",
            f'use parallel.stages = {p.pp}, or parallel.schedule = "interleaved_1f1b"',
        )
    if is_v and per_rank != 2:
        raise PunaError(
            f"the schedule {p.schedule} has two stages per rank, not {per_rank}",
            f'use parallel.stages = {2 * p.pp}, or parallel.schedule = "interleaved_zero_bubble"',
        )
    shares = _shares(n_layers, n_stages, p.less_first, p.less_last)
    if min(shares) < 0 or (n_stages > 1 and min(shares[1:-1], default=1) < 1):
        raise PunaError(
            f"{n_layers} layers give {n_stages} stages of {shares} layers",
            "use fewer stages (parallel.pp, parallel.stages), or lower less_first and less_last",
        )
    bounds = [sum(shares[:i]) for i in range(n_stages + 1)]
    owners = [stage % p.pp for stage in range(n_stages)]
    if is_v:
        owners = [stage if stage < p.pp else n_stages - 1 - stage for stage in range(n_stages)]
    return StagePlan(tuple(itertools.pairwise(bounds)), tuple(owners))


def n_stages_of(parallel: ParallelConfig) -> int:
    """Return the number of stages of the whole pipeline."""
    if parallel.stages is not None:
        return parallel.stages
    if parallel.pp == 1:
        return 1
    return parallel.pp * (1 if parallel.schedule in _ONE_STAGE else 2)


def _shares(n_layers: int, n_stages: int, less_first: int, less_last: int) -> list[int]:
    if n_stages == 1:
        return [n_layers]
    # As if the first and last stage had the missing layers, too.
    base, rest = divmod(n_layers + less_first + less_last, n_stages)
    shares = [base] * n_stages
    shares[0] -= less_first
    shares[-1] -= less_last
    for i in range(rest):
        shares[(1 + i) % n_stages] += 1
    return shares


def check_layout(cfg: TrainingConfig, model: LlamaConfig) -> None:
    """Refuse a layout that cannot work for a model, with the nearest that can.

    Raises:
        PunaError: Heads, feed-forward, vocabulary, tokens, layers or micro-batches do not divide.
    """
    for problem in _problems(cfg, model):
        raise problem
    plan_stages(cfg.parallel, model.n_layers)


def _problems(cfg: TrainingConfig, model: LlamaConfig) -> Iterator[PunaError]:
    p = cfg.parallel
    for name, size in (
        ("n_heads", model.n_heads),
        ("n_kv_heads", model.n_kv_heads),
        ("ffn_dim", model.ffn_dim),
    ):
        if size % p.tp:
            fitting = _divisors(
                p.tp, lambda n: not any(x % n for x in (model.n_kv_heads, model.ffn_dim))
            )
            yield PunaError(
                f"parallel.tp = {p.tp} does not divide the model's {name} = {size}",
                f"use parallel.tp = {fitting}",
            )
    if p.tp > model.vocab_size:
        yield PunaError(
            f"parallel.tp = {p.tp} ranks have only {model.vocab_size} tokens of the vocabulary",
            "lower parallel.tp",
        )
    pieces = p.tp * (2 * p.cp if p.cp > 1 else 1)
    for _, seq_len in cfg.batch_shapes:
        if seq_len % pieces:
            low = seq_len // pieces * pieces
            near = " or ".join(str(n) for n in (low, low + pieces) if n)
            yield PunaError(
                f"seq_len = {seq_len} does not divide into the {pieces} pieces that "
                f"parallel.tp = {p.tp} and parallel.cp = {p.cp} need",
                f"use seq_len = {near}",
            )
    if cfg.float8 != "off":
        yield from _float8_problems(p, model)
    recomputes = cfg.memory.budget_gib is not None or cfg.memory.recompute != "none"
    if p.pp > 1 and p.schedule in _SPLIT and recomputes:
        yield PunaError(
            f"the schedule {p.schedule} computes the gradients of inputs and weights apart; with "
            "[memory] each of the two would compute the layers again",
            'use parallel.schedule = "interleaved_1f1b", or remove the section `memory`',
        )
    if p.pp > 1 and p.schedule != "gpipe":
        rows = min(n_rows for n_rows, _ in cfg.batch_shapes) // cfg.data_ranks
        n_micro = rows // (cfg.micro_batch or rows)
        need = 2 * p.pp if p.schedule == "dualpipev" else p.pp
        if n_micro < need or (p.schedule != "1f1b" and n_micro % p.pp):
            rows = cfg.data_ranks * need * (cfg.micro_batch or 1)
            yield PunaError(
                f"a step has {n_micro} micro-batches per data-parallel rank; the schedule "
                f"{p.schedule} needs at least {need}"
                + ("" if p.schedule == "1f1b" else f", in multiples of pp = {p.pp}"),
                f"use micro_batch = {cfg.micro_batch or 1} with global_batch = {rows} or a "
                'multiple of it, or parallel.schedule = "gpipe"',
            )


def _float8_problems(p: ParallelConfig, model: LlamaConfig) -> Iterator[PunaError]:
    if p.tp > 1:
        yield PunaError(
            f"float8 does not go with parallel.tp = {p.tp}",
            'use parallel.tp = 1, or float8 = "off"',
        )
    for name, size in (("dim", model.dim), ("kv_dim", model.kv_dim), ("ffn_dim", model.ffn_dim)):
        if size % 16:
            yield PunaError(
                f"float8 takes matrices whose sides are multiples of 16, the model has {name} = "
                f"{size}",
                'use another model, or float8 = "off"',
            )


def _divisors(limit: int, works: Callable[[int], bool]) -> str:
    return " or ".join(str(n) for n in range(1, limit) if works(n))
