"""The world: the ranks of a job, their device, threads and process group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from puna.model.device import Device, pick_device
from puna.train.parallel.threads import threads_per_rank

DATA_DIM = "data"
_STORE_TIMEOUT = timedelta(seconds=60)
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
        mesh: One data-parallel dimension; None without a process group (one rank alone).
    """

    rank: int
    size: int
    device: torch.device
    n_threads: int
    mesh: DeviceMesh | None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers over all ranks, in fp64; every rank gets the same result."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh is not None:
            dist.barrier()

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def join_world(device: Device, attempt: int, timeout_s: float) -> World:
    """Join the process group that the environment describes (torchrun's variables).

    Without those variables, or with a world of one that torchrun did not start, there is no group.

    Args:
        device: From the configuration.
        attempt: Every attempt meets under its own prefix in the store: on gloo, a restarted group
            otherwise reads the addresses of dead peers.
        timeout_s: Longest wait in a collective; a backstop behind the supervisor's own watch.

    Raises:
        PunaError: A GPU is asked for and there is none.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    where = pick_device(device, local_rank)
    n_threads = threads_per_rank(local_size)
    torch.set_num_threads(n_threads)
    mesh = None
    if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
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
        mesh = init_device_mesh(where.type, (size,), mesh_dim_names=(DATA_DIM,))
    return World(rank, size, where, n_threads, mesh)


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
