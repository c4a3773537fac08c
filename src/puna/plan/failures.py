"""What failures cost: closed form (Young 1974, Daly 2006) and Monte-Carlo.

Rates come from the 419 unexpected and 47 planned interruptions of 54 days on 16,384 GPUs (arXiv
2407.21783, section 3.3.4); the counts are used, because the printed percentages disagree with them.
Failures are Poisson; each kind loses what was done since the last checkpoint that survives it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.plan.shipped import FACTS

if TYPE_CHECKING:  # its import takes as long as all of the planner
    from jaxtyping import Float64

OBSERVED_GPU_HOURS = 54 * 24 * 16_384
"""GPU-hours behind the bundled counts."""
PLANNED = 47
"""Planned interruptions in them (firmware, configuration)."""
DAY = 86_400.0
Scope = Literal["process", "node", "many"]
_SCOPES: tuple[Scope, ...] = ("process", "node", "many")
_PROCESS = {"Software Bug", "NCCL Watchdog Timeouts", "Dependency"}
_MANY = {"Network Switch/Cable", "Host Maintenance"}


@dataclass(frozen=True)
class Component:
    """A kind of failure."""

    name: str
    count: int
    """In ``OBSERVED_GPU_HOURS``."""
    scope: Scope
    """What is lost with it: a process, a node, or several."""

    @property
    def gpu_hours(self) -> float:
        """Mean GPU-hours between two of them."""
        return OBSERVED_GPU_HOURS / self.count


class Tier(Config):
    """A place that checkpoints are kept in."""

    name: str
    """What tables call it."""
    survives: Scope = "many"
    """The largest failure after which it can still be read."""
    every_s: float = Field(gt=0)
    """Seconds between two checkpoints."""
    stall_s: float = Field(ge=0)
    """Seconds that training stops for one."""
    load_s: float = Field(default=30.0, ge=0)
    """Seconds to load one."""


class Reliability(Config):
    """How a cluster fails and recovers."""

    tiers: tuple[Tier, ...] = (Tier(name="storage", every_s=480, stall_s=10, load_s=60),)
    """Where checkpoints are kept."""
    detect_s: float = Field(default=60, ge=0)
    """Seconds until a failure is noticed."""
    restart_s: float = Field(default=180, ge=0)
    """Seconds to start the processes again, without loading."""
    mtbf_factor: float = Field(default=1.0, gt=0)
    """Hardware this many times as reliable as that of the bundled counts."""
    planned: bool = True
    """Planned interruptions too, at their bundled rate."""
    planned_s: float = Field(default=600, ge=0)
    """Seconds of one; nothing is lost, as a checkpoint is saved before."""
    spares: int = Field(default=64, ge=0)
    """Nodes that wait to replace a broken one."""
    repair_h: float = Field(default=48, ge=0)
    """Hours until a broken node is back."""
    outages_per_year: float = Field(default=0.0, ge=0)
    """Outages of the whole site (power, cooling, fabric)."""
    outage_h: float = Field(default=4.0, ge=0)
    """Hours of one."""
    sdc_rollback_s: float = Field(default=7200, ge=0)
    """Seconds of training taken back when silent data corruption is found."""


@dataclass(frozen=True)
class Goodput:
    """Effective training time of many simulated runs."""

    p5: float
    p50: float
    p95: float
    mean: float
    interruptions: float
    """Mean number per run."""
    waiting_for_spares: float
    """Mean share of the time."""


def components() -> list[Component]:
    """Return the bundled counts of unexpected interruptions by component."""
    with FACTS.joinpath("interruptions.csv").open(encoding="utf-8") as file:
        return [
            Component(row["component"], int(row["count"]), _scope(row["component"]))
            for row in csv.DictReader(file)
        ]


def _scope(name: str) -> Scope:
    return "process" if name in _PROCESS else "many" if name in _MANY else "node"


def tier_of(r: Reliability, scope: Scope) -> Tier:
    """Return the most frequent tier that survives a failure.

    Raises:
        PunaError: None does.
    """
    fitting = [t for t in r.tiers if _SCOPES.index(t.survives) >= _SCOPES.index(scope)]
    if not fitting:
        raise PunaError(
            f"no checkpoint tier survives the loss of {scope}", "add a tier that survives many"
        )
    return min(fitting, key=lambda tier: tier.every_s)


def mtbf_s(n_gpus: int, r: Reliability) -> float:
    """Return the mean seconds between unexpected interruptions of a job."""
    total = sum(component.count for component in components())
    return OBSERVED_GPU_HOURS / total * 3600 * r.mtbf_factor / n_gpus


def optimal_interval(stall_s: float, mtbf: float) -> float:
    """Return the seconds between checkpoints that lose least (Daly 2006, equation 37).

    Args:
        stall_s: Seconds that training stops for a checkpoint.
        mtbf: Mean seconds between failures.
    """
    if stall_s >= 2 * mtbf:
        return mtbf
    ratio = stall_s / (2 * mtbf)
    return math.sqrt(2 * stall_s * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def closed_form(n_gpus: int, r: Reliability) -> float:
    """Return the expected share of effective training time, at least 0.

    1 - stalls - sum over failures of rate times (half an interval, detection, restart, loading);
    waiting for spares is left to the simulation.

    Args:
        n_gpus: GPUs of the job.
        r: The cluster.
    """
    lost = sum(tier.stall_s / (tier.every_s + tier.stall_s) for tier in r.tiers)
    for component in components():
        tier = tier_of(r, component.scope)
        rate = n_gpus / (component.gpu_hours * 3600 * r.mtbf_factor)
        back = r.sdc_rollback_s if component.name == "Silent Data Corruption" else 0.0
        gone = tier.every_s / 2 + back + r.detect_s + r.restart_s + tier.load_s
        lost += rate * gone
    if r.planned:
        lost += n_gpus * PLANNED / (OBSERVED_GPU_HOURS * 3600) * r.planned_s
    lost += r.outages_per_year * r.outage_h / (365 * 24)
    return max(0.0, 1.0 - lost)


@dataclass(frozen=True)
class _Kinds:
    """Every kind of interruption, arrays of shape (k,)."""

    rate: Float64[np.ndarray, " k"]
    """Per second."""
    every: Float64[np.ndarray, " k"]
    back: Float64[np.ndarray, " k"]
    down: Float64[np.ndarray, " k"]
    loses_work: np.ndarray
    breaks_node: np.ndarray


def _kinds(n_gpus: int, r: Reliability) -> _Kinds:
    rows = []
    for component in components():
        tier = tier_of(r, component.scope)
        back = r.sdc_rollback_s if component.name == "Silent Data Corruption" else 0.0
        rate = n_gpus / (component.gpu_hours * 3600 * r.mtbf_factor)
        down = r.detect_s + r.restart_s + tier.load_s
        rows.append((rate, tier.every_s, back, down, True, component.scope == "node"))
    slowest = max(tier.every_s for tier in r.tiers)
    if r.planned:
        rate = n_gpus * PLANNED / (OBSERVED_GPU_HOURS * 3600)
        rows.append((rate, slowest, 0.0, r.planned_s, False, False))
    if r.outages_per_year:
        tier = tier_of(r, "many")
        rate = r.outages_per_year / (365 * DAY)
        rows.append((rate, tier.every_s, 0.0, r.outage_h * 3600 + r.restart_s, True, False))
    rate, every, back, down, loses, breaks = (
        np.array(column, dtype=np.float64) for column in zip(*rows, strict=True)
    )
    return _Kinds(rate, every, back, down, loses > 0, breaks > 0)


def simulate(
    n_gpus: int, r: Reliability, days: float = 54.0, n_runs: int = 1000, seed: int = 0
) -> Goodput:
    """Simulate many runs, all at once.

    Time to a failure is exponential. What was done since the last checkpoint that survives it is
    lost. A broken node takes a spare and comes back after its repair; without a spare the run
    waits for the next one.

    Args:
        n_gpus: GPUs of the job.
        r: The cluster.
        days: Length of a run in wall-clock time.
        n_runs: Runs.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    kinds = _kinds(n_gpus, r)
    total_rate = kinds.rate.sum()
    cumulative = np.cumsum(kinds.rate) / total_rate
    pace = 1.0 - sum(tier.stall_s / (tier.every_s + tier.stall_s) for tier in r.tiers)
    end = days * DAY
    now, useful = np.zeros(n_runs), np.zeros(n_runs)
    waited, hits = np.zeros(n_runs), np.zeros(n_runs)
    back_at = np.zeros((n_runs, r.spares))  # when each spare is there again
    while (now < end).any():
        live = now < end
        run = rng.exponential(1 / total_rate, n_runs)
        kind = np.minimum(np.searchsorted(cumulative, rng.random(n_runs)), len(cumulative) - 1)
        ends_first = now + run >= end
        span = np.where(ends_first, end - now, run)
        lost = np.where(kinds.loses_work[kind], span % kinds.every[kind] + kinds.back[kind], 0.0)
        useful += np.where(live, (span - np.where(ends_first, 0.0, lost)) * pace, 0.0)
        failed = live & ~ends_first
        hits += failed
        then = now + run + kinds.down[kind]
        if r.spares:
            broken = np.flatnonzero(failed & kinds.breaks_node[kind])
            first = back_at[broken].argmin(axis=1)
            ready = np.maximum(then[broken], back_at[broken, first])
            waited[broken] += np.minimum(ready, end) - np.minimum(then[broken], end)
            back_at[broken, first] = ready + r.repair_h * 3600
            then[broken] = ready
        else:
            wait = np.where(failed & kinds.breaks_node[kind], r.repair_h * 3600, 0.0)
            waited += np.minimum(then + wait, end) - np.minimum(then, end)
            then = then + wait
        now = np.where(failed, then, np.where(live, end, now))
    share = np.clip(useful / end, 0.0, 1.0)
    p5, p50, p95 = (float(x) for x in np.quantile(share, [0.05, 0.5, 0.95]))
    return Goodput(
        p5, p50, p95, float(share.mean()), float(hits.mean()), float(waited.mean() / end)
    )


@dataclass(frozen=True)
class Remedy:
    """One thing that alone, or with others, reaches a goal."""

    what: str
    now: float
    needed: float | None
    """None: no value of it alone reaches the goal."""
    unit: str


def remedies(n_gpus: int, r: Reliability, goal: float) -> list[Remedy]:
    """Return what must be better to reach a goal, each alone, at the best interval.

    Args:
        n_gpus: GPUs of the job.
        r: The cluster as it is.
        goal: Share of effective training time, by the closed form.
    """
    stall = max(tier.stall_s for tier in r.tiers)
    down = r.detect_s + r.restart_s
    knobs = (
        ("checkpoint stall", stall, "s", lambda f: _with(r, n_gpus, stall=f)),
        ("detection and restart", down, "s", lambda f: _with(r, n_gpus, down=f)),
        ("both of them", stall, "s of stall", lambda f: _with(r, n_gpus, stall=f, down=f)),
        ("GPU-hours between failures", mtbf_s(n_gpus, r) * n_gpus / 3600, "h",
         lambda f: _with(r, n_gpus, mtbf=1 / f)),
    )  # fmt: skip
    found = []
    for what, now, unit, change in knobs:
        factor = _largest(lambda f, change=change: closed_form(n_gpus, change(f)) >= goal)
        needed = None if factor is None else now / factor if unit == "h" else now * factor
        found.append(Remedy(what, now, needed, unit))
    return found


def _largest(works: Callable[[float], bool]) -> float | None:
    """Return the largest factor in [0.01, 1] that works, if any; it works below, too."""
    if works(1.0):
        return 1.0
    low, high = 0.01, 1.0
    if not works(low):
        return None
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def _with(
    r: Reliability, n_gpus: int, stall: float = 1.0, down: float = 1.0, mtbf: float = 1.0
) -> Reliability:
    """Return the cluster with stall, down time and reliability scaled, at the best intervals."""
    better = r.model_copy(
        update={
            "detect_s": r.detect_s * down,
            "restart_s": r.restart_s * down,
            "mtbf_factor": r.mtbf_factor * mtbf,
        }
    )
    return at_best_intervals(
        n_gpus,
        better.model_copy(
            update={
                "tiers": tuple(
                    t.model_copy(update={"stall_s": t.stall_s * stall, "load_s": t.load_s * down})
                    for t in r.tiers
                )
            }
        ),
    )


def at_best_intervals(n_gpus: int, r: Reliability) -> Reliability:
    """Return the cluster with each tier saved as often as loses least.

    Args:
        n_gpus: GPUs of the job.
        r: The cluster.
    """
    tiers = []
    for tier in r.tiers:
        count = sum(c.count for c in components() if tier_of(r, c.scope) is tier)
        if count == 0:
            tiers.append(tier)
            continue
        mtbf = OBSERVED_GPU_HOURS / count * 3600 * r.mtbf_factor / n_gpus
        best = max(optimal_interval(tier.stall_s, mtbf), 1.0)
        tiers.append(tier.model_copy(update={"every_s": best}))
    return r.model_copy(update={"tiers": tuple(tiers)})
