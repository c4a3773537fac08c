"""Profiles some steps of a training: marks for the parts of the model, one trace per rank."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from puna.core.fsio import write_json
from puna.model.llama import Attention, FeedForward, RMSNorm
from puna.train.metrics import StepCost, synchronize
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.stage import Stage
from puna.train.parallel.world import World
from puna.train.spec import ProfileSpec
from puna.train.watch.trace import MARK, STEP_MARK

_KINDS: dict[type[nn.Module], str] = {
    Attention: "attention", FeedForward: "feed_forward", RMSNorm: "norm",
    nn.Embedding: "embedding",
}  # fmt: skip


class StepProfile:
    """The profile of a training, or nothing when none is asked for.

    Args:
        spec: What is asked for; None for nothing.
        model: Receives the marks.
        world: The ranks.
        cost: FLOPs and peak, written beside the traces.
    """

    def __init__(
        self, spec: ProfileSpec | None, model: ParallelModel, world: World, cost: StepCost
    ) -> None:
        self._spec, self._world, self._cost = spec, world, cost
        self._profiler: torch.profiler.profile | None = None
        self._step: Any = None
        self._done = 0
        if spec is not None:
            model.clock.mark = _enter
            for stage in model.stages.values():
                _mark_modules(stage)

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop a profiler that still runs, after an error."""
        if self._profiler is not None:
            self._profiler.stop()

    def before_step(self) -> None:
        """A step begins."""
        spec = self._spec
        if spec is None:
            return
        if self._done == spec.n_warm_up:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()
        self._step = _enter(STEP_MARK.removeprefix(MARK))

    def after_step(self) -> bool:
        """A step is done; return whether it was the last one of the profile."""
        spec = self._spec
        if spec is None:
            return False
        synchronize(self._world.device)
        self._step.__exit__(None, None, None)
        self._done += 1
        if self._done < spec.n_warm_up + spec.n_steps or self._profiler is None:
            return False
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        spec.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(spec.trace(self._world.rank)))
        if self._world.rank == 0:
            write_json(
                spec.folder / "peak.json",
                {"flops_per_s_of_a_rank": self._cost.peak_flops / self._world.size},
            )
        return True


def _enter(name: str) -> Any:
    mark = torch.profiler.record_function(MARK + name)
    mark.__enter__()
    return mark


def _mark_modules(stage: Stage) -> None:
    """Put a mark around the forward pass of each part of the model."""
    for module in stage.modules():
        name = next((name for kind, name in _KINDS.items() if isinstance(module, kind)), None)
        if name is not None:
            module.forward = _marked(name, module.forward)  # type: ignore[method-assign]
    stage._loss = _marked("head", stage._loss)  # type: ignore[method-assign]


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(MARK + name):
            return function(*args, **kwargs)

    return call
