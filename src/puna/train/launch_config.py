"""How a training spreads over machines; imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from puna.core.config import Config


class LaunchConfig(Config):
    """Several machines (nodes) for one training; it does not change the result.

    Every node runs the same command with its number in the environment (``PUNA_NODE_RANK``, or what
    Slurm and Kubernetes set). Node 0 leads: it runs the recipe, watches all ranks and starts them
    again; the others start their share of the ranks when node 0 says so. They meet in the run's
    folder, which must be on a file system that all nodes see under the same path.
    """

    nodes: int = Field(default=1, ge=1)
    """Machines; `nproc` ranks are divided among them."""
    spares: int = Field(default=0, ge=0)
    """Machines more, numbered after the others, that sign on and wait to replace a lost one."""
    rdzv_endpoint: str = Field(default="", pattern=r"^([^\s:]+:\d{1,5})?$")
    """`host:port` of node 0, by which the ranks meet; the port must be free and reachable. Empty:
    from the environment, `PUNA_RDZV_ENDPOINT`."""
    node_timeout_s: float = Field(default=30.0, gt=0)
    """Longest silence of a node before it counts as lost; more than the file system takes to show
    one node what another one wrote."""
    wait_s: float = Field(default=600.0, gt=0)
    """How long the other nodes wait for node 0, at the start and after it was lost."""

    @model_validator(mode="after")
    def _spares_of_several(self) -> Self:
        if self.spares and self.nodes == 1:
            raise ValueError(
                f"launch.spares={self.spares} replace nodes other than node 0, and "
                "launch.nodes=1; use nodes=2 or more, or spares=0"
            )
        return self
