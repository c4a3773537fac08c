"""Trainings of the user's own: read from their ledger, priced, and what predictions learn of them.

A run tells how much slower or faster than predicted this machine is with this software. A few runs
of one machine are no basis for new physical constants, so they move one factor: the mean
of log(measured / predicted) under a normal prior (Gelman et al. 2013, section 2.5). The prior's
width is the one of an unknown cluster; two jobs of one cluster differ by ``BETWEEN_JOBS``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, read_events
from puna.model.config import LlamaConfig
from puna.plan.fabric import Fabric
from puna.plan.hardware import Gpu
from puna.plan.intervals import group_of
from puna.plan.job import (
    Job,
    Layout,
    Precision,
    Recompute,
    Schedule,
    find_model,
    workload_of_job,
)
from puna.plan.own import OwnRun
from puna.plan.shipped import Calibration
from puna.plan.step import step_time

BETWEEN_JOBS = 0.07
"""Standard deviation of log(measured / predicted) among jobs of one cluster: that of the bundled
rows with one row in five held out."""
CPU_SIGMA = math.log(3.0) / 1.6449
"""The same of a CPU before any run is known: within a factor of 3 with 90 %. A prior, as no row of
a CPU is bundled."""
FEWEST_EVENTS = 3
Z90 = 1.6449

_SCHEDULES: dict[str, Schedule] = {
    "gpipe": "1f1b", "1f1b": "1f1b", "interleaved_1f1b": "interleaved_1f1b",
    "looped_bfs": "interleaved_1f1b", "interleaved_zero_bubble": "interleaved_zero_bubble",
    "zbv": "interleaved_zero_bubble", "dualpipev": "interleaved_zero_bubble",
}  # fmt: skip
_RECOMPUTE: dict[str, Recompute] = {"none": "none", "selective": "sac", "full": "full"}
_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16"}


def job_of_training(config: Mapping[str, Any], model: LlamaConfig, gpu: Gpu, dtype: str) -> Job:
    """Return a training of puna as the planner's job.

    Args:
        config: The values of a ``[train.*]`` section.
        model: Its shape.
        gpu: What it runs on.
        dtype: Of its products, as ``train.start`` says it: ``float32`` or ``bfloat16``.

    Raises:
        PunaError: Its layout cannot be priced.
    """
    p, n = config["parallel"], int(config["nproc"])
    ranks = p["tp"] * p["cp"] * p["pp"]
    data_ranks = max(n // ranks, 1)
    schedule = _SCHEDULES[p["schedule"]]
    least = 2 if schedule != "1f1b" and p["pp"] > 1 else 1
    chunks = p["stages"] // p["pp"] if p.get("stages") else least
    low = config.get("float8", "off") != "off"
    try:
        layout = Layout(
            tp=p["tp"], cp=p["cp"], pp=p["pp"], replicate=p["replicate"],
            schedule="1f1b" if p["pp"] == 1 else schedule, chunks=chunks if p["pp"] > 1 else 1,
            less_first=p["less_first"], less_last=p["less_last"],
            sharding="zero3" if p["reshard_after_forward"] else "zero2",
            micro_batch=config["micro_batch"] or max(config["global_batch"] // data_ranks, 1),
            recompute=_RECOMPUTE[config["memory"]["recompute"]],
        )  # fmt: skip
        return Job(
            model=model, gpu=gpu, fabric=Fabric(gbit=8 * gpu.nic_gb_s), n_gpus=n, layout=layout,
            seq_len=config["seq_len"], global_batch=config["global_batch"],
            precision="fp8" if low else _PRECISIONS[dtype],
        )  # fmt: skip
    except (KeyError, ValidationError) as error:
        raise PunaError(
            f"the training cannot be priced: {error}", "leave out this run, or [train.*.predict]"
        ) from error


def read_run(run_dir: Path, gpu: Gpu, stage: str = "train.pretrain") -> OwnRun:
    """Read what a finished training took.

    Args:
        run_dir: Folder of a run.
        gpu: What it ran on.
        stage: Which of its trainings.

    Raises:
        PunaError: It is no run, it has not trained, or too few steps were recorded.
    """
    if not (run_dir / LEDGER_FILE).is_file():
        raise PunaError(
            f"{run_dir} is not the folder of a run: it has no {LEDGER_FILE}",
            "give the folder that `puna run` made, below runs/",
        )
    if not (run_dir / stage / "artifact.json").is_file():
        raise PunaError(
            f"{run_dir} has no finished {stage}", "give a run whose training came to its end"
        )
    artifact = Artifact(run_dir / stage)
    own = [e for e in read_events(run_dir / LEDGER_FILE) if e.get("stage") == stage]
    start = next((e for e in reversed(own) if e["kind"] == "train.start"), None)
    if start is None:
        raise PunaError(f"{run_dir}: the ledger has no train.start", "train it again")
    full = artifact.config["global_batch"] * artifact.config["seq_len"]
    seconds = steady_steps([e for e in own if e["kind"] == "train.step"], full)
    if len(seconds) < FEWEST_EVENTS:
        raise PunaError(
            f"{run_dir} recorded {len(seconds)} steps after its first ones; {FEWEST_EVENTS} are "
            "needed",
            f"train for more steps, or with a smaller {stage}.log_every",
        )
    model = find_model(str(artifact.file("model") / "config.json"))
    job = job_of_training(artifact.config, model, gpu, start["dtype"])
    low, mid, high = np.quantile(seconds, [0.16, 0.5, 0.84])
    return OwnRun(
        name=run_dir.resolve().name, step_s=float(mid), n_steps=len(seconds),
        scatter=round(math.log(high / low) / 2, 4),
        job=job.model_dump(mode="json", exclude={"gpu", "fabric"}, exclude_none=True),
    )  # fmt: skip


def steady_steps(events: Sequence[Mapping[str, Any]], tokens_per_step: int) -> list[float]:
    """Return seconds per step of ``train.step`` events, without each attempt's first one.

    Args:
        events: In the order of the ledger.
        tokens_per_step: Steps of a batch ramp, which have fewer, are left out.
    """
    seconds, before = [], object()
    for event in events:
        first, before = event.get("attempt", 0) != before, event.get("attempt", 0)
        n_steps = event.get("n_steps", 1)
        if not first and event["tokens"] == n_steps * tokens_per_step:
            seconds.append(event["step_s"])
    return seconds


def own_factor(job: Job, known: Calibration) -> tuple[float, float]:
    """Return what a prediction is multiplied by, and the half-width of log(step time).

    Args:
        job: Its GPU may carry runs of the user's own.
        known: Fitted constants and widths.
    """
    half = known.widths.of(group_of(workload_of_job(job)))
    measured = job.gpu.measured
    if measured is not None and measured.device == "cpu":
        half = max(half, Z90 * CPU_SIGMA)
    if not job.gpu.runs:
        return 1.0, half
    runs = job.gpu.runs
    logs = [math.log(run.step_s / _predicted(run, job, known)) for run in runs]
    # Steps of a run that scatter say that other work comes and goes: another run may meet more.
    variances = [BETWEEN_JOBS**2 + run.scatter**2 for run in runs]
    weights = [1 / variance for variance in variances]
    total = sum(weights) + (Z90 / half) ** 2  # that of the prior
    mean = sum(w * x for w, x in zip(weights, logs, strict=True)) / total
    return math.exp(mean), Z90 * math.sqrt(1 / total + sum(variances) / len(variances))


def _predicted(run: OwnRun, job: Job, known: Calibration) -> float:
    """Seconds that the model gives a run of the user's own, uncorrected.

    Raises:
        PunaError: The row in the hardware file does not describe a job.
    """
    try:
        other = Job.model_validate({**run.job, "gpu": job.gpu, "fabric": job.fabric})
    except ValidationError as error:
        first = error.errors()[0]
        raise PunaError(
            f"hardware file, run {run.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            "remove the run from the file and add it again with `puna plan calibrate --run`",
        ) from error
    return float(step_time(workload_of_job(other), known.constants).total)
