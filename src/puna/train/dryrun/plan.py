"""What a training of any size will need: bytes per rank and collectives per step; a prediction.

One rank of every kind is built with the code that trains and takes a step on fake tensors, in a
process of its own (see :mod:`puna.train.dryrun.rank`); this module imports no torch. Ranks of one
kind have equal stages; their parts may differ in size where a dimension does not divide evenly, so
one of each size is built, too.

A step has many micro-batches that do the same. Recorded is a step of two of them, or of the fewest
that a schedule takes, and the rest goes on in a straight line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from puna.core.errors import PunaError
from puna.core.pool import usable_cores
from puna.model.accounting import account
from puna.model.config import LlamaConfig
from puna.train.config import ParallelConfig, TrainingConfig
from puna.train.dryrun.flight import has_single_stages, most_in_flight, single_stage_flight
from puna.train.dryrun.fresh import FreshProcesses
from puna.train.dryrun.records import Collective, RankRecord, RankTask, added
from puna.train.dryrun.uneven import Cut, distinct_places, uneven
from puna.train.dryrun.worker import local_shapes, step_through
from puna.train.parallel.layout import Layout, check_layout, plan_stages

_PRELOAD = ["puna.train.dryrun.rank", "puna.train.parallel.pipeline"]


@dataclass(frozen=True)
class RankPlan:
    """What the ranks at one place of the pipeline need.

    Attributes:
        pp_rank: Their place.
        n_ranks: How many they are.
        stages: Of each of their stages: number, first layer, one past the last.
        has_embedding: They have the embedding.
        has_head: They have the head and the loss.
        n_params: Parameters of these stages, over all ranks that share them.
        n_bytes: Bytes of one rank, by what they are for.
        in_flight: Micro-batches that wait for their backward pass, at most, over all stages.
        collectives: Of one step.
        recorded_at: Pipeline rank that was stepped through; it has equal stages.
    """

    pp_rank: int
    n_ranks: int
    stages: tuple[tuple[int, int, int], ...]
    has_embedding: bool
    has_head: bool
    n_params: int
    n_bytes: Mapping[str, int]
    in_flight: int
    collectives: Mapping[Collective, int]
    recorded_at: int

    @property
    def total_bytes(self) -> int:
        """All bytes of one rank."""
        return sum(self.n_bytes.values())

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return sum(stop - start for _, start, stop in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "pp_rank": self.pp_rank, "n_ranks": self.n_ranks, "n_layers": self.n_layers,
            "stages": [
                {"stage": number, "layers": [start, stop]} for number, start, stop in self.stages
            ],
            "embedding": self.has_embedding, "head": self.has_head, "n_params": self.n_params,
            "bytes": dict(self.n_bytes), "total_bytes": self.total_bytes,
            "micro_batches_in_flight": self.in_flight,
            "collectives": [
                {**asdict(one), "count": count, "sent_bytes": round(count * one.sent_bytes)}
                for one, count in sorted(self.collectives.items())
            ],
            "recorded_at_pp_rank": self.recorded_at,
        }  # fmt: skip


@dataclass(frozen=True)
class JobPlan:
    """What a training will need; every number is a prediction.

    Attributes:
        layout: Of the ranks.
        n_params: Of the model.
        n_micro: Micro-batches of a step of one data-parallel rank.
        tokens_per_step: Of all ranks.
        dtype: Of the matrix products.
        ranks: One entry per place in the pipeline.
        n_built: Ranks that were built.
        n_stepped: Of them, those that took a step.
        uneven: Dimensions that are not cut into equal parts.
        notes: What was not recorded but computed, and what is not counted.
        seconds: What the plan took.
    """

    layout: Layout
    n_params: int
    n_micro: int
    tokens_per_step: int
    dtype: str
    ranks: tuple[RankPlan, ...]
    n_built: int
    n_stepped: int
    uneven: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def largest(self) -> RankPlan:
        """The ranks that need the most memory."""
        return max(self.ranks, key=lambda rank: rank.total_bytes)

    def to_json(self, device_memory: int | None = None) -> dict[str, Any]:
        """Return JSON values.

        Args:
            device_memory: Bytes of a device, to compare with.
        """
        found = {
            "kind": "prediction", "world": self.layout.n_ranks, "layout": asdict(self.layout),
            "n_params": self.n_params, "micro_batches": self.n_micro,
            "tokens_per_step": self.tokens_per_step, "dtype": self.dtype,
            "ranks": [rank.to_json() for rank in self.ranks], "built": self.n_built,
            "stepped": self.n_stepped, "uneven": list(self.uneven), "notes": list(self.notes),
            "seconds": self.seconds,
        }  # fmt: skip
        if device_memory is not None:
            found["device_memory"] = device_memory
            found["fits"] = self.largest.total_bytes <= device_memory
        return found


def plan_job(cfg: TrainingConfig, model: LlamaConfig, workers: int = 0) -> JobPlan:
    """Plan a training.

    Args:
        cfg: With ``nproc`` of the real job.
        model: Its model.
        workers: Processes; 0 means one per usable core.

    Raises:
        PunaError: The layout cannot work.
    """
    start_s = time.monotonic()
    check_layout(cfg, model)
    planner = _Planner(cfg, model)
    with FreshProcesses(workers or usable_cores(), _PRELOAD) as pool:
        ranks, n_built = planner.run(pool)
    return JobPlan(
        planner.layout, account(model).n_params, planner.n_micro, cfg.tokens_per_step,
        "float32" if cfg.precision == "fp32" else "bfloat16", tuple(ranks), n_built,
        planner.n_stepped, tuple(planner.uneven), tuple(planner.notes()),
        time.monotonic() - start_s,
    )  # fmt: skip


class _Planner:
    """Asks for the ranks that differ and puts their answers together."""

    def __init__(self, cfg: TrainingConfig, model: LlamaConfig) -> None:
        self.cfg, self.model = cfg, model
        self.layout = Layout.of(cfg.parallel, cfg.nproc)
        self.stages = plan_stages(cfg.parallel, model.n_layers)
        self.n_micro = cfg.rank_batch // (cfg.micro_batch or cfg.rank_batch)
        self.parallel, self.numbers = self._shortened()
        self.n_stepped = 0
        self.uneven: list[str] = []

    def run(self, pool: FreshProcesses) -> tuple[list[RankPlan], int]:
        """Return the plan of every place of the pipeline, and how many ranks were built."""
        asked: dict[Any, tuple[int, list[Future[RankRecord]]]] = {}
        keys = [self._key(pp_rank) for pp_rank in range(self.layout.pp)]
        for pp_rank, key in enumerate(keys):
            if key not in asked:
                tasks = [self._task(pp_rank, 0, 0, n_micro) for n_micro in self.numbers]
                asked[key] = pp_rank, [pool.submit(step_through, task) for task in tasks]
                self.n_stepped += len(tasks)
        kinds = {key: (pp_rank, self._joined(runs)) for key, (pp_rank, runs) in asked.items()}
        shards = self.layout.shard * self.layout.cp
        others = []
        for pp_rank, kind in kinds.values():
            for place in distinct_places(kind.cuts, self.layout.tp, shards)[1:]:
                task = self._task(pp_rank, *place, self.numbers[0])
                others.append((place, kind.cuts, pool.submit(local_shapes, task)))
            found = uneven(kind.cuts, self.layout.tp, shards)
            self.uneven += [line for line in found if line not in self.uneven]
        for place, cuts, got in others:
            self._check(*place, cuts, got.result())
        ranks = [self._rank_plan(at, *kinds[key]) for at, key in enumerate(keys)]
        return ranks, self.n_stepped + len(others)

    def _key(self, pp_rank: int) -> Any:
        """Equal for pipeline ranks that compute and send the same."""
        last, numbers, memory = self.stages.n_stages - 1, self.stages.of(pp_rank), self.cfg.memory
        stages = []
        for number in numbers:
            start, stop = self.stages.layers[number]
            beside = [near - number for near in (number - 1, number + 1) if near in numbers]
            again = [layer % memory.every == 0 for layer in range(start, stop)]
            stages.append((number == 0, number == last, tuple(beside), tuple(again)))
        # A budget chooses by the micro-batches in flight, which differ from rank to rank.
        return tuple(stages), pp_rank if memory.budget_gib is not None else None

    def _shortened(self) -> tuple[ParallelConfig, list[int]]:
        """Return what is stepped through: a layout and one or two numbers of micro-batches."""
        # Offloading needs a GPU; what it moves to the host is left out of the sums instead.
        p = self.cfg.parallel.model_copy(update={"cpu_offload": False})
        if p.pp > 1 and self.cfg.memory.budget_gib is not None:
            return p, [self.n_micro]
        if not has_single_stages(p):
            fewest = 2 * p.pp if p.schedule == "dualpipev" else p.pp
            return p, [self.n_micro] if self.n_micro <= fewest else [fewest, fewest + p.pp]
        if p.pp > 1:
            # A micro-batch does the same in any order, and this one takes as few as two.
            p = p.model_copy(update={"schedule": "gpipe"})
        return p, [min(self.n_micro, 2)]

    def _task(self, pp_rank: int, tp_rank: int, shard_rank: int, n_micro: int) -> RankTask:
        """Ask for a rank of the first copy; the places among the shards count contexts first."""
        shard, cp_rank = divmod(shard_rank, self.layout.cp)
        pipelines = shard * self.layout.pp + pp_rank
        rank = (pipelines * self.layout.cp + cp_rank) * self.layout.tp + tp_rank
        return RankTask(self.cfg, self.model, self.parallel, rank, n_micro)

    def _joined(self, runs: list[Future[RankRecord]]) -> RankRecord:
        """Make of the steps that were recorded one with all micro-batches."""
        records = [run.result() for run in runs]
        found, one_more, per = records[-1], records[-1].one_more, 1
        if len(records) == 2:
            one_more = found.collectives - records[0].collectives
            per = self.numbers[1] - self.numbers[0]
        if one_more is not None:
            times = (self.n_micro - self.numbers[-1]) // per
            found.collectives = added(found.collectives, one_more, times)
        return found

    def _check(
        self, tp_rank: int, shard_rank: int, cuts: list[Cut], got: Mapping[str, tuple[int, ...]]
    ) -> None:
        layout = self.layout
        for cut in cuts:
            want = cut.local_shape(tp_rank, layout.tp, shard_rank, layout.shard * layout.cp)
            if got[cut.name] != want:
                raise ValueError(f"{cut.name} has the shape {got[cut.name]}, not {want}")

    def _rank_plan(self, pp_rank: int, recorded_at: int, record: RankRecord) -> RankPlan:
        numbers, last = self.stages.of(pp_rank), self.stages.n_stages - 1
        there = self.stages.of(recorded_at)
        kept = {own: record.kept[n] for own, n in zip(numbers, there, strict=True)}
        if not record.actions:
            alive = single_stage_flight(self.cfg.parallel, pp_rank, self.n_micro)
            activations = alive * sum(kept.values())
        elif self.parallel.schedule == "looped_bfs":  # all forward passes come first
            alive = self.n_micro * len(kept)
            activations = self.n_micro * sum(kept.values())
        else:
            alive = most_in_flight(record.actions[pp_rank], dict.fromkeys(kept, 1))
            activations = most_in_flight(record.actions[pp_rank], kept)
        n_bytes = {**record.n_bytes, "activations": activations}
        if self.cfg.average is not None:
            n_bytes["average"] = n_bytes["parameters"]
        if self.cfg.parallel.cpu_offload:
            for name in ("parameters", "gradients", "optimizer", "average"):
                n_bytes.pop(name, None)
        return RankPlan(
            pp_rank, self.layout.n_ranks // self.layout.pp,
            tuple((number, *self.stages.layers[number]) for number in numbers),
            0 in numbers, last in numbers, sum(cut.n_params for cut in record.cuts), n_bytes,
            alive, record.collectives, recorded_at,
        )  # fmt: skip

    def notes(self) -> list[str]:
        """Say what was computed instead of recorded, and what is not counted."""
        found = []
        if self.numbers[-1] != self.n_micro:
            found.append(
                f"collectives: recorded in a step of {' and one of '.join(map(str, self.numbers))} "
                f"micro-batches, in a straight line from there to {self.n_micro}"
            )
        if self.layout.pp > 1:
            found.append("activations: recorded for one micro-batch, times those that the "
                         f"schedule {self.cfg.parallel.schedule} has in flight")  # fmt: skip
        found.append("logits of a chunk: computed from the vocabulary and the tokens of a chunk")
        if self.parallel.reshard_after_forward:
            found.append("gathered parameters: computed, of the layer in work and those ahead")
        if self.cfg.precision == "auto":
            found.append("precision auto is taken as bf16, as on GPUs that have it")
        if self.cfg.parallel.cpu_offload:
            found.append("parameters, gradients and optimiser are in the host's memory")
        found.append("rows are whole documents and every token has a label")
        found.append(
            "not counted: temporaries inside a layer, workspaces of kernels, buffers of "
            "collectives, fragmentation"
        )
        return found


def parse_bytes(text: str, what: str) -> int:
    """Read an amount of memory: ``80GB``, ``141 GiB``, ``24e9``.

    Args:
        text: The amount.
        what: Name of it, for the error.

    Raises:
        PunaError: It is none.
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
             "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
    number = text.strip().rstrip("bBiIkKmMgGtT ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        found = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise PunaError(f"{what} = {text!r} is no amount of memory", "write 80GB or 80GiB")
    return found
