"""Optimisers, and their state as named tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from puna.train.config import OptimConfig


class Parameters(Protocol):
    """What has named parameters: a module, or the stages of a model that a rank computes."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters; a name may come twice, for copies that are kept equal."""
        ...


def make_optimizer(config: OptimConfig, model: Parameters) -> torch.optim.Optimizer:
    """Build the optimiser with its state allocated, so that a checkpoint can be loaded into it.

    Matrices are decayed, vectors (norms) are not. The learning rate is set at every step from the
    schedule, so it is no state.

    Args:
        config: Kind and hyper-parameters.
        model: Parameters may be sharded (DTensor); their state is sharded alike.
    """
    params = [param for _, param in model.named_parameters() if param.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for param in params:
        optimizer.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
        }
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(model: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name all tensors of a checkpoint: ``model.<parameter>`` and ``optim.<parameter>.<key>``.

    The tensors are the live ones: loading into them restores model and optimiser. Of copies, the
    first stands for all; after loading call :func:`restore_copies`.
    """
    tensors: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        if f"model.{name}" in tensors:
            continue
        tensors[f"model.{name}"] = param.detach()
        for key, value in optimizer.state.get(param, {}).items():
            tensors[f"optim.{name}.{key}"] = value
    return tensors


@torch.no_grad()
def restore_copies(model: Parameters, optimizer: torch.optim.Optimizer) -> None:
    """Give the copies of a parameter the values and the optimiser's state of the first one."""
    first: dict[str, nn.Parameter] = {}
    for name, param in model.named_parameters():
        own = first.setdefault(name, param)
        if own is not param:
            param.copy_(own)
            for key, value in optimizer.state[own].items():
                optimizer.state[param][key].copy_(value)
