"""The answer for one job: time, speed, memory, each with a 90 % interval, and where time went."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from puna.core.units import GIB
from puna.plan.constants import Constants
from puna.plan.flops import CONVENTION, CONVENTIONS, flops_per_token, tflops_per_gpu
from puna.plan.intervals import group_of
from puna.plan.job import Job, check, workload_of_job
from puna.plan.memory import MEMORY_PARTS, Memory, peak_memory, stage_memory
from puna.plan.runs import own_factor
from puna.plan.shipped import Calibration, calibration
from puna.plan.step import PARTS, StepTime, scaled, step_time
from puna.plan.workload import Workload, stack

PART_NAMES = {
    "gemm": "products", "attention": "attention", "memory": "memory-bound kernels",
    "recompute": "recomputation", "tensor": "tensor-parallel communication",
    "context": "context-parallel communication", "pipeline": "pipeline sends",
    "bubble": "pipeline bubble", "data": "data-parallel exposure", "optimizer": "optimiser",
    "jitter": "stragglers",
}  # fmt: skip
"""Of a step, as people read them."""
MEMORY_WIDTH = {"megatron": 0.03, "fsdp": 0.15}
"""Relative half-width of a memory estimate: 17 measured rows of Megatron-LM lie within 1 %; FSDP's
is a prior, as no public row is bundled."""
Z90 = 1.6449
_DRAWS = 200


class Range(NamedTuple):
    """An estimate and its 90 % interval."""

    mid: float
    low: float
    high: float

    @staticmethod
    def around(mid: float, half_log: float) -> Range:
        """Return the interval of a half-width of the logarithm."""
        return Range(mid, mid * math.exp(-half_log), mid * math.exp(half_log))

    def inverse(self, top: float) -> Range:
        """Return ``top`` over the range."""
        return Range(top / self.mid, top / self.high, top / self.low)


class Level(NamedTuple):
    """One step of the waterfall from the peak to the goodput."""

    name: str
    tflops: float
    """What is left per GPU after this loss."""


@dataclass(frozen=True)
class Estimate:
    """What one job does."""

    job: Job
    workload: Workload
    step_s: Range
    parts: dict[str, Range]
    """Seconds per part; the middle values sum to ``step_s.mid``."""
    memory: Range
    """Bytes at the peak, fullest stage."""
    memory_parts: dict[str, float]
    stages: list[dict[str, float]]
    """Bytes per part of each pipeline stage."""
    group: str
    """Software and GPU family, which decide the interval."""
    factor: float = 1.0
    """By which runs of the user's own on this hardware corrected the time."""

    @property
    def tokens_per_s(self) -> Range:
        """Tokens/s of all GPUs."""
        return self.step_s.inverse(self.workload.batch * self.workload.seq)

    def tflops(self, convention: str = "model") -> Range:
        """TFLOPS per GPU in a convention of :mod:`puna.plan.flops`."""
        return self.step_s.inverse(tflops_per_gpu(self.workload, 1.0, convention))

    def mfu(self, convention: str = "model") -> Range:
        """Share of the peak of the products' format."""
        peak = self.workload.peak_low / 1e12
        return Range(*(value / peak for value in self.tflops(convention)))

    @property
    def fits(self) -> bool:
        """Whether the estimate is below the GPU's memory."""
        return self.memory.mid <= self.workload.hbm_bytes

    def waterfall(self, goodput: float = 1.0, stall: float = 0.0) -> list[Level]:
        """Return TFLOPS per GPU from the peak to the goodput, loss by loss.

        Args:
            goodput: Share of the time that is neither lost to failures nor to restarts.
            stall: Share of the time that checkpoints stop the training for.
        """
        w = self.workload
        work = flops_per_token(w) * w.batch * w.seq / w.n_gpus
        levels, seconds = [Level("peak", w.peak_low / 1e12)], 0.0
        for name, parts in _LOSSES:
            seconds += sum(self.parts[part].mid for part in parts)
            levels.append(Level(name, work / seconds / 1e12))
        kept = levels[-1].tflops * (1 - stall)
        return [*levels, Level("checkpoint stall", kept), Level("failures", kept * goodput)]

    def to_json(self) -> dict[str, Any]:
        """Return every number as JSON values."""
        return {
            "job": self.job.model_dump(),
            "interval": {"level": 0.9, "group": self.group},
            "own_runs": {"n": len(self.job.gpu.runs), "factor": self.factor},
            "step_s": self.step_s._asdict(),
            "tokens_per_s": self.tokens_per_s._asdict(),
            "flops_convention": CONVENTION,
            "conventions": CONVENTIONS,
            "tflops_per_gpu": {name: self.tflops(name)._asdict() for name in CONVENTIONS},
            "mfu": {name: self.mfu(name)._asdict() for name in CONVENTIONS},
            "parts_s": {name: part._asdict() for name, part in self.parts.items()},
            "memory_gib": {
                "total": {k: v / GIB for k, v in self.memory._asdict().items()},
                "parts": {name: n / GIB for name, n in self.memory_parts.items()},
                "stages": [{k: v / GIB for k, v in stage.items()} for stage in self.stages],
                "capacity": self.workload.hbm_bytes / GIB,
                "fits": self.fits,
            },
            "waterfall_tflops": [level._asdict() for level in self.waterfall()],
        }


_LOSSES = (
    ("product and attention efficiency", ("gemm", "attention")),
    ("memory-bound kernels", ("memory",)),
    ("recomputation", ("recompute",)),
    ("tensor-parallel communication", ("tensor",)),
    ("context-parallel communication", ("context",)),
    ("pipeline sends", ("pipeline",)),
    ("pipeline bubble", ("bubble",)),
    ("data-parallel exposure", ("data",)),
    ("optimiser and stragglers", ("optimizer", "jitter")),
)


def estimate(job: Job, known: Calibration | None = None) -> Estimate:
    """Predict time and memory of a job.

    Args:
        job: What to price.
        known: Fitted constants; those of the release when None.

    Raises:
        PunaError: The layout cannot run.
    """
    check(job)
    known = known or calibration()
    w = workload_of_job(job)
    factor, width = own_factor(job, known)
    time = step_time(w, known.constants)
    half = math.hypot(width, _fabric_half(job, time.total, known.constants))
    time = scaled(time, factor)
    spread = _part_spread(w, known)
    parts = {
        name: Range.around(getattr(time, name), math.hypot(half, Z90 * spread[name]))
        for name in PARTS
    }
    peak = peak_memory(w)
    width = MEMORY_WIDTH["megatron" if job.layout.sharding == "zero1" else "fsdp"]
    stages = [_memory_parts(stage_memory(w, float(stage))) for stage in range(job.layout.pp)]
    memory = Range(peak.total, peak.total * (1 - width), peak.total * (1 + width))
    return Estimate(
        job, w, Range.around(time.total, half), parts, memory, _memory_parts(peak), stages,
        group_of(w), factor,
    )  # fmt: skip


def _memory_parts(memory: Memory) -> dict[str, float]:
    return {name: float(getattr(memory, name)) for name in MEMORY_PARTS}


def _fabric_half(job: Job, seconds: float, constants: Constants) -> float:
    """Half-width of log(step time) that comes from not knowing the fabric's load balancing."""
    ends = [
        step_time(workload_of_job(job, which), constants).total for which in ("low", "high")
    ]  # fmt: skip
    return max(abs(math.log(end / seconds)) for end in ends)


def _part_spread(w: Workload, known: Calibration) -> dict[str, float]:
    """Standard deviation of the logarithm of each part, from the fit's covariance."""
    logs = known.constants.to_vector()
    rng = np.random.default_rng(0)
    draws = rng.multivariate_normal(logs, known.covariance, size=_DRAWS, method="svd")
    sets = Constants(*(column[:, None] for column in np.exp(draws).T))
    drawn: StepTime = step_time(stack([w]), sets)
    return {name: _log_spread(np.asarray(getattr(drawn, name))) for name in PARTS}


def _log_spread(values: np.ndarray) -> float:
    return float(np.log(values).std()) if values.min() > 0 else 0.0
