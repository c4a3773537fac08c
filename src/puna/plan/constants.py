"""The fitted constants of the cost model: their meaning, prior and bounds.

There are few on purpose. Each has a prior (start and its standard deviation, in units of the
constant's own scale) and hard bounds; a fit that ends on a bound says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np


class Prior(NamedTuple):
    """Where a constant starts, how far it may go, and how firmly it is held."""

    start: float
    low: float
    high: float
    sigma: float
    """Standard deviation of log(constant / start)."""
    meaning: str


PRIORS: dict[str, Prior] = {
    "e_gemm": Prior(0.75, 0.4, 1.0, 0.15, "share of the peak that large products reach (Hopper)"),
    "d_a100": Prior(1.15, 0.7, 1.5, 0.1, "the same on A100, relative to Hopper"),
    "d_blackwell": Prior(1.0, 0.6, 1.4, 0.1, "the same on Blackwell, relative to Hopper"),
    "d_low": Prior(1.1, 0.6, 1.6, 0.1, "the same on Blackwell below bf16, relative to its bf16"),
    "d_classic": Prior(1.0, 0.7, 1.2, 0.1, "the same in Megatron-LM of 2021-22"),
    "d_eager": Prior(1.0, 0.7, 1.2, 0.1, "the same in eager PyTorch of 2023"),
    "x_fp8": Prior(0.8, 0.4, 1.0, 0.15, "the same in fp8, relative to bf16"),
    "x_mxfp8": Prior(0.75, 0.4, 1.0, 0.15, "the same in mxfp8"),
    "x_nvfp4": Prior(0.6, 0.3, 1.0, 0.15, "the same in NVFP4"),
    "roof": Prior(1.0, 0.1, 6.0, 0.5, "memory traffic of a product that is not hidden"),
    "e_attn": Prior(0.55, 0.2, 0.85, 0.2, "share of the peak in fused attention"),
    "e_attn_eager": Prior(0.45, 0.15, 0.85, 0.3, "the same in the kernels of 2023 on A100"),
    "c_score": Prior(8.0, 1.0, 30.0, 0.5, "passes over the scores of attention that is not fused"),
    "c_mem": Prior(10.0, 2.0, 40.0, 0.4, "passes over the residual stream per layer and pass"),
    "c_eager": Prior(2.0, 0.8, 6.0, 0.4, "how many times more passes in eager PyTorch"),
    "c_cast": Prior(2.0, 0.1, 10.0, 0.5, "passes over a product's inputs to cast them down"),
    "wave": Prior(0.5, 0.02, 1.0, 0.5, "share of an unfilled last wave of tiles that is lost"),
    "launch": Prior(8e-5, 1e-6, 4e-4, 0.5, "seconds of the CPU per kernel"),
    "c_opt": Prior(40.0, 16.0, 200.0, 0.4, "bytes per parameter that the optimiser moves"),
    "e_nvl": Prior(0.7, 0.3, 1.0, 0.2, "share of NVLink that a collective reaches"),
    "e_net": Prior(0.75, 0.4, 1.0, 0.2, "share of the network that a collective reaches"),
    "tp_open": Prior(0.6, 0.05, 1.0, 0.4, "share of tensor-parallel traffic that is exposed"),
    "dp_open": Prior(0.1, 0.01, 1.0, 0.7, "share of hidden data-parallel traffic still felt"),
    "p2p_open": Prior(0.5, 0.02, 2.0, 0.6, "share of a pipeline's sends that is exposed"),
    "jitter": Prior(0.01, 2e-4, 0.05, 0.5, "spread of a node's speed, whose slowest sets the pace"),
    "bubble": Prior(1.0, 0.6, 1.5, 0.15, "length of the pipeline's bubble over its formula"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Constants:
    """Values of the constants; see ``PRIORS`` for what each means."""

    e_gemm: float
    d_a100: float
    d_blackwell: float
    d_low: float
    d_classic: float
    d_eager: float
    x_fp8: float
    x_mxfp8: float
    x_nvfp4: float
    roof: float
    e_attn: float
    e_attn_eager: float
    c_score: float
    c_mem: float
    c_eager: float
    c_cast: float
    wave: float
    launch: float
    c_opt: float
    e_nvl: float
    e_net: float
    tp_open: float
    dp_open: float
    p2p_open: float
    jitter: float
    bubble: float

    def to_vector(self) -> np.ndarray:
        """Return log(constant), shape (n_constants,)."""
        return np.log(np.array([getattr(self, name) for name in NAMES]))

    @staticmethod
    def from_vector(logs: np.ndarray) -> Constants:
        """Return the constants of log values, shape (n_constants,)."""
        return Constants(*np.exp(logs).tolist())

    def at_bounds(self) -> list[str]:
        """Names of constants that stand on a bound (within 0.5 %)."""
        return [
            name
            for name, prior in PRIORS.items()
            if getattr(self, name) <= prior.low * 1.005 or getattr(self, name) >= prior.high * 0.995
        ]

    def to_json(self) -> dict[str, float]:
        """Return name -> value."""
        return asdict(self)


NAMES = tuple(f.name for f in fields(Constants))


def start() -> Constants:
    """Return the constants before any fit."""
    return Constants(**{name: PRIORS[name].start for name in NAMES})
