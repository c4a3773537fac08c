"""Fully sharded data parallel (FSDP2): every rank keeps its share of each parameter.

The plan stands here and not in the model: each block is one unit, and what is left (embedding, last
norm, output head) is another. A unit's parameters are gathered for its forward pass and stay until
its backward pass is done (ZeRO-2; Llama 3 trained like this): one gathering per step and not two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from puna.model.config import LlamaConfig
from puna.model.llama import Llama, init_tensor
from puna.model.names import parameter_shapes
from puna.train.parallel.world import World


def build_sharded(config: LlamaConfig, world: World) -> Llama:
    """Build a model without values: on the meta device, sharded, then allocated.

    No rank ever holds the whole model. The values come from :func:`fill` or from a checkpoint.

    Args:
        config: Shape.
        world: Ranks; without a process group the parameters are plain tensors.
    """
    model = Llama(config, device="meta", dtype=torch.float32)
    if world.mesh is not None:
        for block in model.layers:
            fully_shard(block, mesh=world.mesh, reshard_after_forward=False)
        fully_shard(model, mesh=world.mesh, reshard_after_forward=False)
        # The loss wants the hidden states and not the logits, so training enters the model there.
        register_fsdp_forward_method(model, "hidden")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Gradients are summed, never averaged: the loss is divided by the number of
                # labelled tokens of the global batch already.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model.to_empty(device=world.device)  # type: ignore[return-value]


@torch.no_grad()
def fill(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Give every parameter its value; each rank keeps its own part and sends nothing.

    Args:
        model: Maybe sharded.
        values: Names and full values; one at a time is held in memory.

    Raises:
        ValueError: A value is missing, surplus, or has another shape than its parameter.
    """
    waiting = dict(model.named_parameters())
    for name, full in values:
        param = waiting.pop(name, None)
        if param is None or full.shape != param.shape:
            raise ValueError(f"{name} {tuple(full.shape)} fits no parameter of the model")
        if isinstance(param, DTensor):
            part = distribute_tensor(
                full.to(param.to_local()), param.device_mesh, param.placements, src_data_rank=None
            )
            param.to_local().copy_(part.to_local())
        else:
            param.copy_(full)
    if waiting:
        raise ValueError(f"no value for {', '.join(waiting)}")


def random_weights(config: LlamaConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield initial weights from a seed: the same for any number of ranks."""
    for name, shape in parameter_shapes(config).items():
        yield name, init_tensor(name, shape, seed, config)


def full_tensors(model: nn.Module, world: World) -> Mapping[str, Tensor] | None:
    """Gather every parameter on rank 0, on the CPU.

    Returns:
        Name -> full value on rank 0, None on the others. All ranks must call it.
    """
    gathered: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        value = param.full_tensor() if isinstance(param, DTensor) else param
        if world.rank == 0:
            gathered[name] = value.detach().cpu()
    return gathered if world.rank == 0 else None


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients over the ranks in the next backward pass, or only add them up locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
