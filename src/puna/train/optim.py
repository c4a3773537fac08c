"""Optimisers, and their state as named tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from puna.model.names import EMBEDDING
from puna.train.muon import Muon
from puna.train.optim_config import MuonConfig, OptimConfig
from puna.train.parallel.world import World

_LR_SHARE = "lr_share"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Parameters(Protocol):
    """What has named parameters: a module, or the stages of a model that a rank computes."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters; a name may come twice, for copies that are kept equal."""
        ...


def make_optimizer(
    config: OptimConfig,
    model: Parameters,
    world: World | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """Build the optimiser with its state allocated, so that a checkpoint can be loaded into it.

    Matrices are decayed, vectors (norms) are not. The learning rate is set at every step from the
    schedule, so it is no state.

    Args:
        config: Kind and hyper-parameters.
        model: Parameters may be sharded (DTensor); their state is sharded alike.
        world: Ranks that share the parameters; None for one alone.
        dtype: Of the model's matrix products.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if isinstance(config, MuonConfig) and _is_muons(name, p)]
    taken = set(map(id, matrices))
    optimizer: torch.optim.Optimizer = _adamw(
        config, [(name, p) for name, p in named if id(p) not in taken]
    )
    if isinstance(config, MuonConfig) and matrices:
        optimizer = Muon(
            matrices, optimizer, world.copy_group() if world else None,
            lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum,
            nesterov=config.nesterov, scale=config.scale, iterations=config.iterations,
            dtype=_DTYPES.get(config.iterate_in, dtype),
            device=world.device if world else matrices[0].device,
        )  # fmt: skip
    for _, param in named:
        zeros = partial(torch.zeros_like, param, requires_grad=False)
        if id(param) in taken:
            optimizer.state[param] = {"momentum": zeros()}
        else:
            step = torch.zeros((), dtype=torch.float32, device=param.device)
            optimizer.state[param] = {"step": step, "exp_avg": zeros(), "exp_avg_sq": zeros()}
    return optimizer


def _is_muons(name: str, param: nn.Parameter) -> bool:
    return name.startswith("layers.") and param.ndim == 2


def _adamw(config: OptimConfig, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    lr = config.lr
    if isinstance(config, MuonConfig):
        lr = config.lr_adamw or config.lr
    decayed, others = [], []
    for name, p in named:
        is_kept = p.ndim < 2 or (name == EMBEDDING and not config.decay_embedding)
        (others if is_kept else decayed).append(p)
    groups = [
        {"params": params, "weight_decay": decay, _LR_SHARE: lr / config.lr}
        for params, decay in ((decayed, config.weight_decay), (others, 0.0))
        if params
    ]
    is_fused = all(p.device.type in _get_fused_kernels_supported_devices() for _, p in named)
    return torch.optim.AdamW(
        groups, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps,
        fused=is_fused, foreach=not is_fused,
    )  # fmt: skip


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate; a group may have its own share of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(_LR_SHARE, 1.0)


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
