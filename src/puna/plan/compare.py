"""The same job on several networks and at several scales, beside what has been published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puna.core.errors import PunaError
from puna.plan.energy import Site
from puna.plan.estimate import Range, estimate
from puna.plan.fabric import Fabric, collisions, parse_fabric
from puna.plan.hardware import find_gpu
from puna.plan.job import Job, Layout, find_model
from puna.plan.search import search


@dataclass(frozen=True)
class Cell:
    """A fabric at a number of GPUs, with its own best layout."""

    fabric: str
    n_gpus: int
    layout: Layout
    tokens_per_s_gpu: Range
    """The interval holds the fabric's range, too: load balancing and placement."""
    exposed: float
    """Share of the step that is exposed communication across the network or NVLink."""

    def to_json(self) -> dict[str, Any]:
        """Return the cell as JSON values."""
        values = {**vars(self), "layout": self.layout.model_dump()}
        return values | {"tokens_per_s_gpu": self.tokens_per_s_gpu._asdict()}


@dataclass(frozen=True)
class Scenario:
    """A published cluster."""

    model: str
    gpu: str
    fabrics: tuple[str, ...]
    gpus: tuple[int, ...]
    rows_per_gpu: float
    seq_len: int
    evidence: str


SCENARIOS = {
    "llama3": Scenario(
        "llama3.1-405b", "h100", ("roce:400g:oversub=7:qps=16:pod=3072:leaf=16", "ib:400g"),
        (8192, 16_384, 24_576), 0.125, 8192,
        "two clusters of 24K GPUs, RoCE (1:7 between pods of 3,072, 16 flows per pair, E-ECMP) and "
        "InfiniBand, tuned to equivalent performance (arXiv 2407.21783, section 3.3.1)",
    ),
    "llama2": Scenario(
        "llama2-70b", "a100", ("roce:200g:qps=4:pod=1024", "ib:200g"), (256, 1024, 2048), 0.5, 4096,
        "RoCE 'can scale almost as well as' InfiniBand up to 2,000 GPUs (arXiv 2307.09288)",
    ),
}  # fmt: skip
"""Clusters that Meta described."""


def scenario_jobs(name: str) -> tuple[Job, tuple[str, ...], tuple[int, ...], float]:
    """Return the job, fabrics, GPU counts and rows per GPU of a shipped scenario.

    Raises:
        PunaError: Unknown scenario.
    """
    if name not in SCENARIOS:
        raise PunaError(f"unknown scenario {name!r}", f"use one of: {', '.join(SCENARIOS)}")
    one = SCENARIOS[name]
    job = Job(
        model=find_model(one.model), gpu=find_gpu(one.gpu), fabric=parse_fabric(one.fabrics[0]),
        n_gpus=one.gpus[0], layout=Layout(), seq_len=one.seq_len,
        global_batch=int(one.gpus[0] * one.rows_per_gpu),
    )  # fmt: skip
    return job, one.fabrics, one.gpus, one.rows_per_gpu


def compare_fabrics(
    job: Job, fabrics: Sequence[str], gpus: Sequence[int], rows_per_gpu: float,
    sharding: Sequence[str] = (),
) -> list[Cell]:  # fmt: skip
    """Price a job on every fabric at every scale; the batch grows with the GPUs.

    Args:
        job: Fabric, GPUs, batch and layout are replaced.
        fabrics: As :func:`puna.plan.fabric.parse_fabric` reads them.
        gpus: Numbers of GPUs.
        rows_per_gpu: Rows of a step per GPU.
        sharding: Kinds to try; those that puna trains when empty.

    Raises:
        PunaError: A fabric cannot be read, or nothing fits.
    """
    cells = []
    for n in gpus:
        for text in fabrics:
            update = {
                "fabric": parse_fabric(text), "n_gpus": n,
                "global_batch": max(int(n * rows_per_gpu), 1),
            }  # fmt: skip
            here = job.model_copy(update=update)
            best = search(here, 1e12, site=Site(), n_best=1, sharding=sharding).best[0].layout
            found = estimate(here.model_copy(update={"layout": best}))
            exposed = sum(found.parts[p].mid for p in ("tensor", "context", "pipeline", "data"))
            speed = Range(*(x / n for x in found.tokens_per_s))
            cells.append(Cell(text, n, best, speed, exposed / found.step_s.mid))
    return cells


def collision_table(fabric: Fabric, paths: int = 16) -> list[tuple[int, float, float, float]]:
    """Return what hashing leaves by flows per GPU: flows, p5, p50, p95 of the throughput.

    Args:
        fabric: Its own number of flows is among them.
        paths: Equal uplinks of a switch with as many GPUs below it.
    """
    counts = sorted({1, 4, 16, 64, fabric.flows})
    return [(flows, *collisions(flows * paths, paths)) for flows in counts]
