"""What was measured on a user's own machine, and the curves that are fitted to it.

``puna plan calibrate --measure`` fills a hardware file with it. A matrix product takes the time of
its FLOPs and of its traffic (the additive roofline, Williams et al. 2009); a collective takes a
latency and the time of its bytes on the slowest link (Hockney 1994; bytes on the bus of a ring as
Thakur et al. 2005). Units: seconds, 10**9 bytes/s, 10**12 FLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from puna.core.config import Config

if TYPE_CHECKING:  # its import takes as long as all of the planner
    from jaxtyping import Float64

COPY_SHARE = 0.9
"""Share of a data sheet's bandwidth that a large copy reaches on the GPUs of the bundled rows. The
constants were fitted with data sheets, so a measured copy counts as this share: a prior."""

BEYOND = 1.25
"""How much faster than the best measurement a fitted rate may be."""

Collective = Literal["all_gather", "all_reduce"]
BYTES = {"bf16": 2, "fp32": 4}
"""Width of an element by format of the products."""


class Products(Config):
    """Matrix products in one format."""

    tflops: float = Field(gt=0)
    """What large products approach, 10**12 FLOP/s per rank."""
    gb_s: float = Field(gt=0)
    """Rate at which operands and results move when nothing hides it, 10**9 bytes/s; a very large
    number where the grid does not show it."""
    call_s: float = Field(default=0.0, ge=0)
    """Seconds of a call that do not depend on its size."""
    scatter: float = Field(ge=0)
    """Standard deviation of log(fitted / measured) over the grid."""
    points: list[tuple[int, int, int, float]] = Field(default_factory=list)
    """The grid: m, n, k of (m, k) x (k, n), and 10**12 FLOP/s reached."""


class Curve(Config):
    """A collective of some ranks."""

    op: Collective
    n_ranks: int = Field(ge=2)
    latency_s: float = Field(ge=0)
    """Seconds of the smallest message."""
    bus_gb_s: float = Field(gt=0)
    """Bandwidth of the slowest link, 10**9 bytes/s (nccl-tests calls it busbw)."""
    scatter: float = Field(ge=0)
    """Standard deviation of log(fitted / measured) over the sizes."""
    points: list[tuple[int, float]] = Field(default_factory=list)
    """Bytes of the result, seconds."""


class Measured(Config):
    """Microbenchmarks of one machine; all its ranks worked at the same time."""

    device: Literal["cpu", "cuda"]
    name: str = ""
    """Of the processor."""
    n_ranks: int = Field(ge=1)
    """Processes; one per GPU."""
    threads: int = Field(default=1, ge=1)
    """Of each process."""
    seconds: float = Field(ge=0)
    """That the measurements took."""
    copy_gb_s: float = Field(gt=0)
    """Bytes read and written by a large copy, 10**9 per second and rank."""
    copy_scatter: float = Field(default=0.0, ge=0)
    """Standard deviation of the logarithm over the repetitions."""
    bf16: Products
    fp32: Products | None = None
    curves: list[Curve] = Field(default_factory=list)
    assumed: list[str] = Field(default_factory=list)
    """Fields of the hardware file that were not measured."""

    def products(self, precision: str) -> Products:
        """Return the curve of a format; those below bf16 have bf16's."""
        return self.fp32 if precision == "fp32" and self.fp32 is not None else self.bf16

    def link(self) -> Curve | None:
        """Return the gather of most ranks, which the model prices its collectives with."""
        gathers = [one for one in self.curves if one.op == "all_gather"]
        return max(gathers or self.curves, key=lambda one: one.n_ranks, default=None)


def fit_products(
    shapes: Sequence[tuple[int, int, int]], seconds: Sequence[float], width: int
) -> Products:
    """Fit rate, traffic and the cost of a call to measured products.

    The rate is at most ``BEYOND`` times the best that was reached: what larger products would do is
    not known.

    Args:
        shapes: m, n, k of each product.
        seconds: Measured, of each.
        width: Bytes of an element.
    """
    m, n, k = (np.array(column, dtype=np.float64) for column in zip(*shapes, strict=True))
    flops, moved = 2 * m * n * k, width * (m * k + k * n + m * n)
    times = np.array(seconds, dtype=np.float64)
    rates = flops / times
    least = 1 / (BEYOND * rates.max())
    columns = np.stack([flops, moved, np.ones_like(flops)])
    costs = _costs(columns, times, np.array([least, 0.0, 0.0]))
    return Products(
        tflops=1e-12 / costs[0], gb_s=1e-9 / max(costs[1], 1e-15), call_s=costs[2],
        scatter=_scatter(costs @ columns, times),
        points=[
            (*shape, round(float(rate) / 1e12, 6))
            for shape, rate in zip(shapes, rates, strict=True)
        ],
    )  # fmt: skip


def fit_curve(
    op: Collective, n_ranks: int, sizes: Sequence[int], seconds: Sequence[float]
) -> Curve:
    """Fit latency and bandwidth to a measured collective.

    Args:
        op: Which.
        n_ranks: Ranks of it.
        sizes: Bytes of the result (of the input, for an all-reduce).
        seconds: Measured, of each size.
    """
    times = np.array(seconds, dtype=np.float64)
    bus = np.array(sizes, dtype=np.float64) * _on_bus(op, n_ranks)
    columns = np.stack([np.ones_like(bus), bus])
    fastest = 1 / (BEYOND * (bus / times).max())
    costs = _costs(columns, times, np.array([0.0, fastest]))
    return Curve(
        op=op, n_ranks=n_ranks, latency_s=costs[0], bus_gb_s=1e-9 / costs[1],
        scatter=_scatter(costs @ columns, times),
        points=[(int(size), float(s)) for size, s in zip(sizes, times, strict=True)],
    )  # fmt: skip


def _on_bus(op: Collective, n_ranks: int) -> float:
    """Bytes that pass the slowest link of a ring, per byte of the result."""
    return (2.0 if op == "all_reduce" else 1.0) * (n_ranks - 1) / n_ranks


def _costs(
    columns: Float64[np.ndarray, "c n"], times: Float64[np.ndarray, " n"],
    floors: Float64[np.ndarray, " c"],
) -> Float64[np.ndarray, " c"]:  # fmt: skip
    """Fit ``times`` as a sum of columns times costs, none below its floor, by relative errors.

    There are two or three columns, so every set of those that stand on their floor is tried.
    """
    rows = columns / times
    target = 1.0 - floors @ rows
    scale = rows.max(axis=1)
    best, least = floors, float(np.sum(target**2))
    for bits in range(1, 2 ** len(columns)):
        free = [i for i in range(len(columns)) if bits >> i & 1]
        over = np.linalg.lstsq((rows[free] / scale[free, None]).T, target, rcond=None)[0]
        costs = floors.copy()
        costs[free] += over / scale[free]
        error = float(np.sum((costs @ rows - 1.0) ** 2))
        if (over >= 0).all() and error < least:
            best, least = costs, error
    return best


def _scatter(fitted: np.ndarray, times: np.ndarray) -> float:
    return round(float(np.sqrt(np.mean(np.log(fitted / times) ** 2))), 4)
