"""Pipeline parallel: the ranks share the layers, through PyTorch's schedules.

Every rank reads its micro-batches' tokens, positions and documents itself (a batch is a function of
the step); only the residual stream travels.

Shapes: B rows, T tokens of this rank's share of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from puna.train.config import ScheduleKind
from puna.train.parallel.layout import PP, StagePlan
from puna.train.parallel.stage import Stage
from puna.train.parallel.world import World
from puna.train.watch.clock import Part, StepClock

_SCHEDULES: dict[ScheduleKind, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "looped_bfs": ScheduleLoopedBFS,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
_PASSES: dict[str, Part] = {
    "forward_one_chunk": "forward",
    "backward_one_chunk": "backward",
    "backward_weight_one_chunk": "backward",
}


class Pipeline:
    """Runs a step over the stages of all ranks.

    Args:
        stages: This rank's, by number.
        plan: All stages.
        schedule: Order of the micro-batches.
        world: The ranks.
        n_micro: Micro-batches per step.
        hidden_shape: Of the residual stream, which travels between stages.
        hidden_dtype: Of it.
        clock: Counts the passes of each stage; what is left of a step is waiting for others.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        plan: StagePlan,
        schedule: ScheduleKind,
        world: World,
        *,
        n_micro: int,
        hidden_shape: tuple[int, int, int],
        hidden_dtype: torch.dtype,
        clock: StepClock,
    ) -> None:
        rows = hidden_shape[0]
        hidden = torch.empty(hidden_shape, dtype=hidden_dtype, device="meta", requires_grad=True)
        ids = torch.empty((rows, 1), dtype=torch.int64, device="meta")
        loss = torch.empty(1, device="meta", requires_grad=True)
        group = world.group(PP)
        self._device = world.device
        self._n_micro = n_micro
        self._is_first, self._is_last = 0 in stages, plan.n_stages - 1 in stages
        self._clock = clock
        parts = [
            PipelineStage(
                stage, number, plan.n_stages, world.device, group=group,
                input_args=ids if stage.is_first else hidden,
                output_args=loss if stage.is_last else hidden,
            )
            for number, stage in stages.items()
        ]  # fmt: skip
        for part in parts:
            for name, kind in _PASSES.items():
                setattr(part, name, clock.timed(kind, getattr(part, name)))
        make = _SCHEDULES[schedule]
        is_single = issubclass(make, PipelineScheduleSingle)
        # The loss is a sum already: PyTorch would divide the gradient by the micro-batches.
        self._schedule = make(
            parts[0] if is_single else parts, n_micro, loss_fn=_as_it_is, scale_grads=False
        )

    def run(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        doc_ids_BS: Tensor,
        labels_BT: Tensor,
        source_B: Tensor,
    ) -> float:
        """Compute forward and backward of a step; return this rank's part of the loss."""
        losses: list[Tensor] = []
        args = (tokens_BT,) if self._is_first else ()
        kwargs = {
            "positions_BT": positions_BT, "doc_ids_BS": doc_ids_BS, "labels_BT": labels_BT,
            "source_B": source_B,
        }  # fmt: skip
        target = labels_BT if self._is_last else None
        with self._clock.part("communication"):
            self._schedule.step(*args, target=target, losses=losses, return_outputs=False, **kwargs)
        return float(torch.stack(losses).sum()) if losses else 0.0


def _as_it_is(output: Tensor, target: Tensor) -> Tensor:
    """The last stage returns its part of the loss."""
    return output.sum()
