"""Which collectives a rank takes part in, recorded while it computes, in a real run or a dry one.

Seen are PyTorch's own calls (``c10d``: FSDP, pipeline, sums of the loss) and the functional ones
(tensor and context parallel), below DTensor, so that what DTensor does counts, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from puna.train.dryrun.records import Collective
from puna.train.parallel.layout import DIMS
from puna.train.parallel.world import World

_ALL = "all"
_NO_TRAFFIC = {"wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_"}
_KINDS = {
    "allreduce_": "all_reduce", "all_reduce": "all_reduce", "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather", "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather", "all_gather_into_tensor_out": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
    "send": "send", "recv_": "receive", "broadcast_": "broadcast", "broadcast": "broadcast",
    "alltoall_base_": "all_to_all", "all_to_all_single": "all_to_all",
}  # fmt: skip


class CollectiveRecorder(TorchDispatchMode):
    """Counts the collectives of this rank while it is entered.

    Args:
        world: The ranks.

    Attributes:
        counts: How often each was called.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.counts: Counter[Collective] = Counter()
        self._dims = _names_of_groups(world)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note a collective and call it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until DTensor has made it calls of plain tensors
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func, args, kwargs or {})
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what was asked for."""
        return func(*args, **kwargs)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in _NO_TRAFFIC:
            return
        values = {arg.name: value for arg, value in zip(func._schema.arguments, args, strict=False)}
        values |= kwargs
        boxed = values.get("process_group")
        if boxed is not None:
            group = dist.ProcessGroup.unbox(boxed)
        else:
            group = _resolve_process_group(values["group_name"])
        dim, n_ranks = self._dims[tuple(dist.get_process_group_ranks(group))]
        kind = _KINDS.get(name, name)
        tensors = [value for value in values.values() if _is_tensors(value)]
        n_bytes = max(map(_n_bytes, tensors))
        if kind == "all_gather" and boxed is None:
            n_bytes *= n_ranks  # the functional form is only given the part
        if kind in ("send", "receive") and n_bytes <= _HELLO_BYTES:
            return
        self.counts[Collective(dim, kind, n_ranks, n_bytes)] += 1


_HELLO_BYTES = 4
"""Pipeline neighbours greet each other with one number in the first step of a run; no traffic."""


def _names_of_groups(world: World) -> dict[tuple[int, ...], tuple[str, int]]:
    """Dimension and size of every group that a step uses, by its ranks."""
    if world.mesh is None:
        return {}
    # Where two have the same ranks, the later one names them.
    groups = {_ALL: dist.group.WORLD, "shard_cp_tp": world.copy_group()}
    fsdp = world.fsdp_mesh
    if fsdp is not None:
        groups["shard_cp"] = fsdp.get_group(fsdp.ndim - 1)
    groups |= {dim: world.group(dim) for dim in DIMS}
    found = {}
    for name, group in groups.items():
        ranks = tuple(dist.get_process_group_ranks(group))
        found[ranks] = (name, len(ranks))
    return found


def _is_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_tensors, value))
    return isinstance(value, Tensor)


def _n_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_n_bytes, value))
