"""Which layouts fit, which is fastest, what it costs, what binds, and which upgrade pays.

All layouts are priced side by side as arrays, so thousands take milliseconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.core.errors import PunaError
from puna.core.units import GIB
from puna.plan.constants import Constants
from puna.plan.energy import Bill, Site, bill
from puna.plan.estimate import Estimate, estimate
from puna.plan.failures import Reliability, at_best_intervals, closed_form
from puna.plan.job import Job, Layout, check, workload_of_job
from puna.plan.memory import peak_memory
from puna.plan.runs import own_factor
from puna.plan.shipped import calibration
from puna.plan.step import PARTS, StepTime, scaled, step_time
from puna.plan.workload import Workload, stack

USABLE = 0.9
"""Share of a GPU's memory that an estimate may take: the rest is context, NCCL, and error."""
_TP = (1, 2, 4, 8, 16)
_PP = (1, 2, 4, 8, 16, 32)
_CP = (1, 2, 4, 8, 16)
_MICRO = (1, 2, 4, 8)
_CHUNKS = (1, 2, 4, 8)
_COMPUTE = {"gemm", "attention"}

BOTTLENECKS = {
    "memory": "HBM, launches", "recompute": "memory size", "tensor": "NVLink (TP)",
    "context": "links (CP)", "pipeline": "network (PP)", "bubble": "bubble", "data": "network (DP)",
    "optimizer": "HBM (optimiser)", "jitter": "stragglers",
}  # fmt: skip
"""What a part of a step's time is bound by."""

PREMIUMS = {
    "network x2": 0.06, "no oversubscription": 0.03, "NVLink x2": 0.10, "memory +50 %": 0.12,
    "memory bandwidth +40 %": 0.12,
}  # fmt: skip
"""Assumed rise of the price of a GPU-hour by an upgrade: estimates, to compare with a quotation."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    n_gpus: int
    layout: Layout
    step_s: float
    tokens_per_s: float
    memory_gib: float
    margin_gib: float
    """Of the whole memory."""
    days: float
    """At the goodput of the search."""
    bill: Bill
    bottleneck: str
    """What the largest part beside products and attention is bound by, with its share."""

    def to_json(self) -> dict[str, Any]:
        """Return the candidate as JSON values."""
        return {**vars(self), "layout": self.layout.model_dump(), "bill": vars(self.bill)}


@dataclass(frozen=True)
class Upgrade:
    """What better hardware would change, with its own best layout."""

    name: str
    days: float
    usd: float
    """At the price with the premium."""
    premium: float

    def to_json(self) -> dict[str, Any]:
        """Return the upgrade as JSON values."""
        return vars(self)


@dataclass(frozen=True)
class Found:
    """The answer of a search."""

    n_layouts: int
    n_fitting: int
    goodput: dict[int, float]
    """By number of GPUs."""
    best: list[Candidate]
    """Fastest first, all of the first number of GPUs."""
    front: list[Candidate]
    """Over all numbers of GPUs: nothing else is better in days, money and memory at once."""
    upgrades: list[Upgrade]
    estimate: Estimate
    """Of the best."""

    def to_json(self) -> dict[str, Any]:
        """Return the answer as JSON values."""
        return {
            "n_layouts": self.n_layouts,
            "n_fitting": self.n_fitting,
            "goodput": self.goodput,
            "best": [one.to_json() for one in self.best],
            "front": [one.to_json() for one in self.front],
            "upgrades": [one.to_json() for one in self.upgrades],
            "estimate": self.estimate.to_json(),
        }


@dataclass(frozen=True)
class _Priced:
    """Layouts of one job side by side."""

    job: Job
    layouts: list[Layout]
    w: Workload
    time: StepTime
    memory: np.ndarray
    n_all: int

    def fastest(self) -> np.ndarray:
        """Indices of the layouts that fit, fastest first."""
        fitting = np.flatnonzero(self.memory <= USABLE * self.w.hbm_bytes)
        return fitting[np.argsort(np.asarray(self.time.total)[fitting], kind="stable")]


def search(
    job: Job, tokens: float, also_gpus: Sequence[int] = (), site: Site | None = None,
    reliability: Reliability | None = None, n_best: int = 5, sharding: Sequence[str] = (),
) -> Found:  # fmt: skip
    """Search all layouts of a job.

    Args:
        job: Its layout is replaced.
        tokens: Tokens to train on.
        also_gpus: Other numbers of GPUs for the front.
        site: Price and power.
        reliability: How the cluster fails; the default at its best intervals when None.
        n_best: Layouts to return.
        sharding: Kinds to try; ``zero2`` and ``zero3``, which puna trains, when empty.

    Raises:
        PunaError: No layout fits; the message names the one that needs least memory.
    """
    site, kinds = site or Site(), tuple(sharding) or ("zero2", "zero3")
    constants = calibration().constants
    priced = _price(job, kinds, constants)
    order = priced.fastest()
    if not len(order):
        raise _nothing_fits(priced)
    counts = list(dict.fromkeys([job.n_gpus, *also_gpus]))
    goodput = {
        n: closed_form(n, at_best_intervals(n, reliability or Reliability())) for n in counts
    }
    pool = _candidates(priced, order, tokens, goodput[job.n_gpus], site)
    front = list(pool)
    for n in counts[1:]:
        other = _price(job.model_copy(update={"n_gpus": n}), kinds, constants)
        front += _candidates(other, other.fastest(), tokens, goodput[n], site)
    best = pool[0]
    upgrades = _upgrades(job, kinds, constants, tokens, goodput[job.n_gpus], site)
    return Found(
        priced.n_all, len(order), goodput, pool[:n_best], _pareto(front), upgrades,
        estimate(job.model_copy(update={"layout": best.layout})),
    )  # fmt: skip


def layouts_of(job: Job, sharding: Sequence[str] = ("zero2", "zero3")) -> list[Layout]:
    """Return every layout of the grid that can run, whether it fits or not.

    Args:
        job: Its layout is ignored.
        sharding: Kinds to try.
    """
    m, found = job.model, []
    for tp, pp, cp in itertools.product(_TP, _PP, _CP):
        ranks = tp * pp * cp
        divides = not (m.n_heads % tp or m.n_kv_heads % tp or m.ffn_dim % tp)
        whole = job.n_gpus % ranks == 0 and job.seq_len % (tp * (2 * cp if cp > 1 else 1)) == 0
        if not (divides and whole):
            continue
        dp = job.n_gpus // ranks
        for micro, chunks in itertools.product(_MICRO, _CHUNKS):
            n_micro, rest = divmod(job.global_batch, dp * micro)
            if rest or n_micro < pp or pp * chunks > m.n_layers or (chunks > 1 and pp == 1):
                continue
            if chunks > 1 and n_micro % pp:
                continue
            schedule = "interleaved_1f1b" if chunks > 1 else "1f1b"
            for kind, again in itertools.product(sharding, ("none", "full")):
                if kind == "zero3" and pp > 1:
                    continue  # gathers for every micro-batch of every stage: never the best
                found.append(
                    Layout.model_construct(
                        tp=tp,
                        cp=cp,
                        pp=pp,
                        replicate=1,
                        schedule=schedule,
                        chunks=chunks,
                        less_first=0,
                        less_last=0,
                        sharding=kind,
                        micro_batch=micro,
                        recompute=again,
                    )
                )
    return found


def _price(job: Job, kinds: Sequence[str], constants: Constants) -> _Priced:
    layouts = layouts_of(job, kinds)
    if not layouts:
        check(job)
        raise PunaError(
            f"no layout of {job.n_gpus} GPUs divides a batch of {job.global_batch} rows",
            "choose a batch that is a multiple of the GPUs, or of a large power of two",
        )
    w = _side_by_side(job, layouts)
    memory = np.asarray(peak_memory(w).total)
    time = scaled(step_time(w, constants), own_factor(job, calibration())[0])
    return _Priced(job, layouts, w, time, memory, len(layouts))


def _side_by_side(job: Job, layouts: Sequence[Layout]) -> Workload:
    """Return the layouts as arrays; what they share is computed once."""
    base = workload_of_job(job.model_copy(update={"layout": Layout()}))
    n = len(layouts)
    shared = stack([base])
    arrays = {name: np.broadcast_to(getattr(shared, name), n) for name in Workload.__slots__}

    def column(read: Any) -> np.ndarray:
        return np.array([read(layout) for layout in layouts], dtype=np.float64)

    tp, pp, cp = (column(lambda x, k=k: getattr(x, k)) for k in ("tp", "pp", "cp"))
    dp = job.n_gpus / (tp * pp * cp)
    arrays |= {
        "tp": tp, "pp": pp, "cp": cp, "dp": dp, "shard": dp * cp,
        "micro": column(lambda x: x.micro_batch), "chunks": column(lambda x: x.chunks),
        "fsdp2": column(lambda x: x.sharding == "zero2"),
        "fsdp3": column(lambda x: x.sharding == "zero3"), "sp": (tp > 1).astype(np.float64),
        "full": column(lambda x: x.recompute == "full"),
        "zero_bubble": np.zeros(n),
    }  # fmt: skip
    return Workload(**arrays)


def _candidates(
    priced: _Priced, order: np.ndarray, tokens: float, goodput: float, site: Site
) -> list[Candidate]:
    job, found = priced.job, []
    total = np.asarray(priced.time.total)
    parts = {name: np.asarray(getattr(priced.time, name)) for name in PARTS}
    for index in order:
        seconds = float(total[index])
        speed = job.global_batch * job.seq_len / seconds
        days = tokens / speed / 86_400 / max(goodput, 1e-9)
        hours = days * 24 * job.n_gpus
        name = max((n for n in PARTS if n not in _COMPUTE), key=lambda n: parts[n][index])
        share = parts[name][index] / seconds
        memory = float(priced.memory[index]) / GIB
        found.append(
            Candidate(
                job.n_gpus,
                priced.layouts[index],
                seconds,
                speed,
                memory,
                job.gpu.memory_gib - memory,
                days,
                bill(hours, job.gpu.watts, job.gpu.usd_per_hour, site),
                f"{BOTTLENECKS[name]}, {share:.0%}",
            )
        )
    return found


def _pareto(pool: Sequence[Candidate]) -> list[Candidate]:
    """Return those that no other beats or equals in days, money and memory margin at once."""
    front: list[Candidate] = []
    for one in sorted(pool, key=lambda x: (x.days, x.bill.usd, -x.margin_gib)):
        if not any(
            other.bill.usd <= one.bill.usd * 1.0001 and other.margin_gib >= one.margin_gib
            for other in front
        ):
            front.append(one)
    return front


def _upgrades(
    job: Job, kinds: Sequence[str], constants: Constants, tokens: float, goodput: float, site: Site
) -> list[Upgrade]:
    gpu, fabric = job.gpu, job.fabric
    changes: dict[str, dict[str, Any]] = {
        "network x2": {"fabric": fabric.model_copy(update={"gbit": 2 * fabric.gbit})},
        "NVLink x2": {"gpu": gpu.model_copy(update={"nvlink_gb_s": 2 * gpu.nvlink_gb_s})},
        "memory +50 %": {"gpu": gpu.model_copy(update={"memory_gib": 1.5 * gpu.memory_gib})},
        "memory bandwidth +40 %": {"gpu": gpu.model_copy(update={"hbm_tb_s": 1.4 * gpu.hbm_tb_s})},
    }
    if fabric.oversubscription * fabric.leaf_oversubscription > 1:
        flat = fabric.model_copy(update={"oversubscription": 1.0, "leaf_oversubscription": 1.0})
        changes["no oversubscription"] = {"fabric": flat}
    found = []
    for name, update in {"as it is": {}, **changes}.items():
        priced = _price(job.model_copy(update=update), kinds, constants)
        seconds = float(np.asarray(priced.time.total)[priced.fastest()[0]])
        days = tokens / (job.global_batch * job.seq_len / seconds) / 86_400 / max(goodput, 1e-9)
        premium = PREMIUMS.get(name, 0.0)
        cost = bill(days * 24 * job.n_gpus, gpu.watts, gpu.usd_per_hour, site).usd * (1 + premium)
        found.append(Upgrade(name, days, cost, premium))
    return found


def _nothing_fits(priced: _Priced) -> PunaError:
    least = int(np.argmin(priced.memory))
    lay, need = priced.layouts[least], float(priced.memory[least]) / GIB
    job = priced.job
    more = 2 ** math.ceil(math.log2(need / (USABLE * job.gpu.memory_gib)) + 1) * job.n_gpus
    return PunaError(
        f"none of {len(priced.layouts)} layouts fits into {USABLE:.0%} of the "
        f"{job.gpu.memory_gib:g} GiB of {job.gpu.name}; the smallest (tp = {lay.tp}, "
        f"cp = {lay.cp}, pp = {lay.pp}, {lay.sharding}, recompute {lay.recompute}) needs "
        f"{need:.1f} GiB",
        f"use more GPUs (about {more}), a GPU with more memory, or shorter rows",
    )


def recipe_section(job: Job) -> str:
    """Return the sections of a recipe that make ``puna train`` use a layout.

    Args:
        job: Its sharding is ``zero2`` or ``zero3``, its recomputation ``none`` or ``full``.

    Raises:
        PunaError: puna does not train this way.
    """
    lay = job.layout
    if lay.sharding == "zero1" or lay.recompute not in ("none", "full"):
        raise PunaError(
            f"puna does not train with sharding {lay.sharding} and recompute {lay.recompute}",
            "search with --sharding zero2 or zero3",
        )
    lines = [
        "[train.pretrain]", f"nproc = {job.n_gpus}", f"seq_len = {job.seq_len}",
        f"global_batch = {job.global_batch}", f"micro_batch = {lay.micro_batch}",
        "", "[train.pretrain.parallel]", f"tp = {lay.tp}", f"cp = {lay.cp}", f"pp = {lay.pp}",
        f"replicate = {lay.replicate}", f'schedule = "{lay.schedule}"',
        f"reshard_after_forward = {str(lay.sharding == 'zero3').lower()}",
    ]  # fmt: skip
    ends = ("less_first", "less_last")
    lines += [f"{name} = {getattr(lay, name)}" for name in ends if getattr(lay, name)]
    if lay.pp > 1:
        lines.append(f"stages = {lay.pp * lay.chunks}")
    lines += ["", "[train.pretrain.memory]", f'recompute = "{lay.recompute}"', ""]
    return "\n".join(lines)
