"""The network between NVLink domains: what share of a NIC a collective really gets.

Sources: the load of hashed flows on paths is balls in bins (Raab and Steger 1998); oversubscription
and pods follow the cluster of Llama 3 (arXiv 2407.21783, section 3.3.1); flows per pair (queue
pairs) and enhanced ECMP its network paper (Gangidi et al., SIGCOMM 2024); rails Wang et al. 2023
(arXiv 2307.12169).

Three tiers: leaves (racks), pods of leaves, and what joins the pods. A ring over packed ranks sends
from node to node, so of the nodes below a switch one sends upward. With rails the n-th GPUs of as
many nodes as a leaf has ports share it, and as collectives first gather inside the node, their
rings stay below it that much longer.

Public step times do not identify these constants, because tuned runs hide their communication. So
they are stated priors with ranges, and whoever has nccl-tests curves should give ``efficiency``.
"""

from __future__ import annotations

import re
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

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
    leaf: int = Field(default=0, ge=0)
    """GPUs that a leaf switch connects, its ports downward; 0: leaves are not looked at."""
    leaf_oversubscription: float = Field(default=1.0, ge=1.0)
    """Bandwidth of a leaf's ports downward over that of its ports upward."""
    rails: bool = False
    """Rail-optimised wiring: each GPU of a node has a leaf of its own."""
    node: int = Field(default=8, ge=1)
    """GPUs of a node, each with its NIC."""
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

    @model_validator(mode="after")
    def _tiers_nest(self) -> Self:
        if self.leaf and self.reach > self.pod:
            raise ValueError(
                f"leaf={self.leaf}{' with rails' if self.rails else ''} joins {self.reach} GPUs, "
                f"more than pod={self.pod}; raise pod"
            )
        if self.leaf_oversubscription > 1 and not self.leaf:
            raise ValueError("leafoversub needs leaf, the GPUs of a leaf switch")
        return self

    @property
    def reach(self) -> int:
        """GPUs whose collectives pass no switch above a leaf: of one leaf, or of its rail group."""
        return self.leaf * (self.node if self.rails else 1)

    def balance(self, n_gpus: int | None = None) -> tuple[float, float, float]:
        """Return the share that load balancing leaves: prior, low, high.

        Args:
            n_gpus: GPUs of the job; below one leaf there are no paths to choose from.
        """
        if self.efficiency is not None:
            return self.efficiency, self.efficiency, self.efficiency
        if n_gpus is not None and n_gpus <= self.reach:
            return BALANCE["adaptive"]
        if self.kind == "ib" or self.adaptive:
            return BALANCE["adaptive"]
        return BALANCE["ecmp16" if self.flows >= 16 else "ecmp4" if self.flows >= 4 else "ecmp1"]

    def squeeze(self, n_gpus: int, worst: bool = False) -> float:
        """Return the share of bandwidth that oversubscription leaves, 1 without.

        The narrowest tier decides. Its links hold 1 / oversubscription (of the leaves too, for the
        top tier) of what all GPUs send; a part of them sends through it.

        Args:
            n_gpus: GPUs of the job.
            worst: As if placed at random.
        """
        both = self.leaf_oversubscription * self.oversubscription
        tiers = [(self.pod, self.pod, both)]
        if self.leaf:
            below = self.leaf if self.rails else max(self.leaf // self.node, 1)  # nodes
            tiers.append((self.reach, below * self.node, self.leaf_oversubscription))
        shares = [
            1.0 / (ratio * self._crossing(n_gpus, group, of_nodes, worst))
            for group, of_nodes, ratio in tiers
            if n_gpus > group
        ]
        return min([1.0, *shares])

    def _crossing(self, n_gpus: int, group: int, of_nodes: int, worst: bool) -> float:
        """Share of the traffic that leaves a group of GPUs.

        Args:
            n_gpus: GPUs of the job.
            group: GPUs below the tier.
            of_nodes: GPUs of the nodes that take part in a ring below it.
            worst: As if placed at random.
        """
        anywhere = 1.0 - 1.0 / -(-n_gpus // group)  # the job spread evenly over the groups
        if worst or self.placement == "random":
            return anywhere
        return min(max(PACKED_SHARE, self.node / of_nodes), anywhere)

    def nic(self, n_gpus: int, which: Literal["mid", "low", "high"] = "mid") -> float:
        """Return bytes/s per GPU for the cost model, whose fit contains ``REFERENCE`` already.

        Args:
            n_gpus: GPUs of the job.
            which: The prior, or an end of its range; the low one also takes the worst placement.
        """
        mid, low, high = self.balance(n_gpus)
        share = {"mid": mid, "low": low, "high": high}[which] / REFERENCE
        return self.gbit * 1e9 / 8 * min(share, 1.08) * self.squeeze(n_gpus, which == "low")


PACKED_SHARE = 0.25
"""Least share of packed traffic that crosses a tier at the same time: rings of many data-parallel
groups cross at different moments, and not all rings are packed. An estimate between the share of a
perfect ring, one node of those below the switch, and 1."""

_NUMBER = r"\d+(?:\.\d+)?"
_KEYS = {"oversub": "oversubscription", "qps": "flows", "flows": "flows", "pod": "pod",
         "eff": "efficiency", "placement": "placement", "adaptive": "adaptive", "leaf": "leaf",
         "leafoversub": "leaf_oversubscription", "rails": "rails", "node": "node"}  # fmt: skip


def parse_fabric(text: str) -> Fabric:
    """Read ``roce:400g:oversub=4:qps=16``.

    Args:
        text: Kind, then in any order a rate (``400g`` Gbit/s per GPU) and ``key=value``: oversub,
            qps, pod, leaf, leafoversub, node, eff, placement; and the words rails and adaptive.

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
        elif part in ("rails", "adaptive"):
            values[part] = True
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
            "kinds: ib, roce; keys: oversub, qps, pod, leaf, leafoversub, node, eff, placement; "
            "words: rails, adaptive",
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
