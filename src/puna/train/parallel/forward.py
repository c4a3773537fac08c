"""Forward passes alone, through the stages of all ranks: for measuring held-out text.

Depth first, one micro-batch after the other: every rank meets the others in one order, so blocking
messages cannot wait for each other in a circle. With one stage per rank the pipeline still fills.

Shapes: B rows, T tokens of this rank's share of a row, S tokens of whole rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from puna.train.parallel.layout import PP, StagePlan
from puna.train.parallel.stage import Stage
from puna.train.parallel.world import World

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Tokens, positions, documents, labels and sources of a micro-batch, as a stage takes them."""


@torch.no_grad()
def forward_only(
    stages: Mapping[int, Stage],
    plan: StagePlan,
    world: World,
    batches: Iterable[Parts],
    hidden_shape: tuple[int, int, int],
    hidden_dtype: torch.dtype,
) -> None:
    """Run the forward passes of micro-batches; the last stage adds to its ``nats_S``.

    The parameters are given back to their shards afterwards: FSDP leaves that to a backward pass.

    Args:
        stages: This rank's, by number.
        plan: All stages.
        world: The ranks.
        batches: The same number on every rank.
        hidden_shape: Of the residual stream, which travels between stages.
        hidden_dtype: Of it.
    """
    place = world.place(PP)
    for tokens_BT, *others in batches:
        hidden: Tensor | None = None
        for number in sorted(stages):
            stage, source = stages[number], plan.owners[number - 1]
            if number == 0:
                x = tokens_BT
            elif source == place and hidden is not None:
                x = hidden
            else:
                x = torch.empty(hidden_shape, dtype=hidden_dtype, device=world.device)
                dist.recv(x, group=world.group(PP), group_src=source)
            out: Tensor = stage(x, *others)
            if number + 1 < plan.n_stages and plan.owners[number + 1] != place:
                to = plan.owners[number + 1]
                dist.send(out.contiguous(), group=world.group(PP), group_dst=to)
            hidden = out
    for stage in stages.values():
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
