"""The world: the ranks of a job, their places, device, threads and process groups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from puna.model.device import Device, pick_device
from puna.train.parallel.layout import CP, DIMS, REPLICATE, SHARD, TP, Layout
from puna.train.parallel.threads import threads_per_rank

_STORE_TIMEOUT = timedelta(seconds=60)
_SHARD_CP = "shard_cp"
_COPY = "shard_cp_tp"
_LOST_PEER_WORDS = (
    "connection reset",
    "connection closed",
    "broken pipe",
    "gloo",
    "nccl",
    "socket",
)


@dataclass(frozen=True)
class World:
    """The place of this process among its peers.

    Attributes:
        rank: From 0.
        size: Number of ranks.
        device: Where this rank computes.
        n_threads: Threads of this rank: the machine's usable cores divided by its ranks.
        mesh: The ranks in the dimensions of :data:`puna.train.parallel.layout.DIMS`; None without a
            process group (one rank alone).
        layout: Sizes of these dimensions.
    """

    rank: int
    size: int
    device: torch.device
    n_threads: int
    mesh: DeviceMesh | None
    layout: Layout = field(default_factory=Layout)

    def place(self, dim: str) -> int:
        """Coordinate of this rank in a dimension."""
        return self.layout.coordinates(self.rank)[dim]

    @property
    def data_rank(self) -> int:
        """Number of this rank's share of the rows, of :attr:`Layout.data`."""
        return self.place(REPLICATE) * self.layout.shard + self.place(SHARD)

    def group(self, dim: str) -> dist.ProcessGroup:
        """Ranks that differ from this one only in a dimension."""
        if self.mesh is None:
            raise ValueError("one rank alone has no groups")
        return self.mesh.get_group(dim)

    @property
    def tp_mesh(self) -> DeviceMesh | None:
        """Ranks that share matrices; None when each has its own."""
        return self.mesh[TP] if self.mesh is not None and self.layout.tp > 1 else None

    @property
    def fsdp_mesh(self) -> DeviceMesh | None:
        """Ranks that share parameters: by shard and context, with copies as the first dimension."""
        if self.mesh is None:
            return None
        name = SHARD
        if self.layout.cp > 1:
            name = _SHARD_CP
            self.mesh[SHARD, CP]._flatten(name)
        return self.mesh[REPLICATE, name] if self.layout.replicate > 1 else self.mesh[name]

    def copy_group(self) -> dist.ProcessGroup | None:
        """Ranks that together have one copy of each parameter of a stage; None for one alone."""
        if self.mesh is None:
            return None
        if self.layout.shard * self.layout.cp * self.layout.tp == 1:
            return self.mesh.get_group(TP)
        return self.mesh[SHARD, CP, TP]._flatten(_COPY).get_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers over all ranks, in fp64; every rank gets the same result."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each number over all ranks, in fp64."""
        if self.mesh is None:
            return list(values)
        most = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.tolist()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh is not None:
            dist.barrier()

    def from_first(self, value: Any, group: dist.ProcessGroup | None = None) -> Any:
        """Return rank 0's value on every rank, through a group of all ranks if one is given."""
        if self.mesh is None:
            return value
        box = [value]
        device = self.device if group is None else None  # other groups are gloo's
        dist.broadcast_object_list(box, src=0, group=group, device=device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on every rank."""
        if self.mesh is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def background_group(self) -> dist.ProcessGroup | None:
        """Make a group of all ranks for another thread: collectives of two must not mix."""
        if self.mesh is None:
            return None
        return cast("dist.ProcessGroup", dist.new_group(backend="gloo"))


def join_world(device: Device, attempt: int, timeout_s: float, layout: Layout) -> World:
    """Join the process group that the environment describes (torchrun's variables).

    Without those variables, or with a world of one that torchrun did not start, there is no group.

    Args:
        device: From the configuration.
        attempt: Every attempt meets under its own prefix in the store: on gloo, a restarted group
            otherwise reads the addresses of dead peers.
        timeout_s: Longest wait in a collective; a backstop behind the supervisor's own watch.
        layout: How the ranks share the work.

    Raises:
        PunaError: A GPU is asked for and there is none.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    where = pick_device(device, local_rank)
    n_threads = threads_per_rank(local_size)
    torch.set_num_threads(n_threads)
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        return World(rank, size, where, n_threads, None, layout)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # torchrun's agent holds the store; without it rank 0 does.
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(address, port, size, is_master, timeout=_STORE_TIMEOUT)
    dist.init_process_group(
        "nccl" if where.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"/attempt/{attempt}.{restart}", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    return make_world(where, n_threads, layout)


def make_world(device: torch.device, n_threads: int, layout: Layout) -> World:
    """Describe the process group that this process is in.

    Raises:
        ValueError: The layout is for another number of ranks.
    """
    mesh = init_device_mesh(device.type, layout.sizes, mesh_dim_names=DIMS)
    return World(dist.get_rank(), dist.get_world_size(), device, n_threads, mesh, layout)


def leave_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error says only that another rank went away in the middle of a collective."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST_PEER_WORDS)
