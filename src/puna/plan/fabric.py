"""The network between NVLink domains: what share of a NIC a collective really gets.

Sources: the load of hashed flows on paths is balls in bins (Raab and Steger 1998); oversubscription
and pods follow the cluster of Llama 3 (arXiv 2407.21783, section 3.3.1); flows per pair (queue
pairs) and enhanced ECMP its network paper (Gangidi et al., SIGCOMM 2024).

Public step times do not identify these constants, because tuned runs hide their communication. So
they are stated priors with ranges, and whoever has nccl-tests curves should give ``efficiency``.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
from pydantic import Field

from puna.core.config import Config
from puna.core.errors import PunaError

Kind = Literal["ib", "roce"]

REFERENCE = 0.92
"""Load-balancing efficiency that the fitted share of the network already contains (tuned runs)."""

BALANCE: dict[str, tuple[float, float, float]] = {
    "adaptive": (0.94, 0.90, 0.97),
    "ecmp16": (0.90, 0.80, 0.95),
    "ecmp4": (0.75, 0.60, 0.88),
    "ecmp1": (0.50, 0.40, 0.60),
}
"""Prior, low and high end (90 %) of the share that load balancing leaves: estimates, not data."""


class Fabric(Config):
    """A network as a user describes it."""

    kind: Kind = "ib"
    """`ib` routes adaptively; `roce` hashes flows to paths (ECMP)."""
    gbit: float = Field(default=400.0, gt=0)
    """Gbit/s per GPU and direction."""
    oversubscription: float = Field(default=1.0, ge=1.0)
    """Bandwidth below the top tier over bandwidth above it: 7 for 1:7."""
    pod: int = Field(default=3072, ge=1)
    """GPUs under the top tier's switches, with full bandwidth among them."""
    flows: int = Field(default=16, ge=1)
    """Flows (queue pairs) per pair of GPUs; more spread better over the paths."""
    adaptive: bool = False
    """RoCE whose switches spread packets, not flows."""
    placement: Literal["packed", "random"] = "packed"
    """Whether neighbours in a ring share a pod as far as they can, or lie anywhere."""
    efficiency: float | None = Field(default=None, gt=0, le=1)
    """Measured share of the NIC that a collective across nodes gets, instead of the prior."""

    def balance(self) -> tuple[float, float, float]:
        """Return the share that load balancing leaves: prior, low, high."""
        if self.efficiency is not None:
            return self.efficiency, self.efficiency, self.efficiency
        if self.kind == "ib" or self.adaptive:
            return BALANCE["adaptive"]
        return BALANCE["ecmp16" if self.flows >= 16 else "ecmp4" if self.flows >= 4 else "ecmp1"]

    def squeeze(self, n_gpus: int, worst: bool = False) -> float:
        """Return the share of bandwidth that the top tier's oversubscription leaves, 1 without.

        A ring over packed ranks crosses pods once per pod, so that of ``pod`` GPUs only one sends
        upward; one at random nearly always does. The links above hold 1 / oversubscription.

        Args:
            n_gpus: GPUs of the job.
            worst: As if placed at random.
        """
        pods = -(-n_gpus // self.pod)
        if pods <= 1:
            return 1.0
        crossing = 1.0 - 1.0 / pods if worst or self.placement == "random" else PACKED_SHARE
        return min(1.0, 1.0 / (self.oversubscription * crossing))

    def nic(self, n_gpus: int, which: Literal["mid", "low", "high"] = "mid") -> float:
        """Return bytes/s per GPU for the cost model, whose fit contains ``REFERENCE`` already.

        Args:
            n_gpus: GPUs of the job.
            which: The prior, or an end of its range; the low one also takes the worst placement.
        """
        mid, low, high = self.balance()
        share = {"mid": mid, "low": low, "high": high}[which] / REFERENCE
        return self.gbit * 1e9 / 8 * min(share, 1.08) * self.squeeze(n_gpus, which == "low")


PACKED_SHARE = 0.25
"""Share of packed traffic that crosses pods at the same time: rings of many data-parallel groups
cross at different moments, and not all rings are packed. An estimate between 1 / pod and 1."""

_NUMBER = r"\d+(?:\.\d+)?"
_KEYS = {"oversub": "oversubscription", "qps": "flows", "flows": "flows", "pod": "pod",
         "eff": "efficiency", "placement": "placement", "adaptive": "adaptive"}  # fmt: skip


def parse_fabric(text: str) -> Fabric:
    """Read ``roce:400g:oversub=4:qps=16``.

    Args:
        text: Kind, then in any order a rate (``400g`` Gbit/s per GPU) and ``key=value``: oversub,
            qps, pod, eff, placement, adaptive.

    Raises:
        PunaError: Something else is in it.
    """
    kind, *parts = text.lower().split(":")
    values: dict[str, object] = {"kind": kind}
    for part in parts:
        rate = re.fullmatch(rf"({_NUMBER})g", part)
        key, equals, value = part.partition("=")
        if rate:
            values["gbit"] = float(rate[1])
        elif equals and key in _KEYS:
            values[_KEYS[key]] = value
        else:
            raise PunaError(
                f"fabric {text!r}: cannot read {part!r}",
                "write for example roce:400g:oversub=4:qps=16 or ib:400g",
            )
    try:
        return Fabric.model_validate(values)
    except ValueError as error:
        raise PunaError(
            f"fabric {text!r}: {_first_line(error)}",
            "kinds: ib, roce; keys: oversub, qps, pod, eff, placement, adaptive",
        ) from error


def _first_line(error: ValueError) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def collisions(
    n_flows: int, n_paths: int, n_runs: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the throughput of hashed flows that end when the fullest path does: p5, p50, p95.

    Each run throws ``n_flows`` equal flows on ``n_paths`` at random; the fullest path has k of
    them, so that all together get n_flows / (n_paths k) of the full bandwidth.

    Args:
        n_flows: Flows that share the paths.
        n_paths: Equal paths.
        n_runs: Random assignments.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    shares = np.full(n_paths, 1.0 / n_paths)
    fullest = rng.multinomial(n_flows, shares, size=n_runs).max(axis=1)
    p5, p50, p95 = np.quantile(n_flows / (n_paths * fullest), [0.05, 0.5, 0.95])
    return float(p5), float(p50), float(p95)
