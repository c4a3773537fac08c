"""The time that FSDP waits for other ranks, on a CPU.

There the gathering of parameters and the summing of gradients block the host, so a clock around
them is the truth. On a GPU they run in streams of their own, mostly under the computation, and a
clock on the host would tell nothing: look at a profile there (``puna train profile``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from puna.train.watch.clock import StepClock


class _AllGather(DefaultAllGather):
    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.part("communication"):
            return super().__call__(*args, **kwargs)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.part("communication"):
            return super().__call__(*args, **kwargs)


def time_collectives(stages: Iterable[nn.Module], clock: StepClock) -> None:
    """Count the collectives of sharded modules as communication."""
    gather, scatter = _AllGather(clock), _ReduceScatter(clock)
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(scatter)
