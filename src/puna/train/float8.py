"""Matrix products in float8, through torchao, on GPUs that are made for it.

The weights stay float32, as in every precision; each product scales and casts its operands
(Micikevicius et al., 2022). The head and the embedding stay as they are.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from puna.core.errors import PunaError
from puna.train.config import Float8

_LEAST: dict[Float8, tuple[int, int]] = {"tensorwise": (8, 9), "rowwise": (9, 0)}
"""Compute capability that has the kernels: Ada and Hopper."""


def check_float8(kind: Float8, device: torch.device) -> None:
    """Refuse a device that has no products in float8.

    Raises:
        PunaError: It is no GPU, or one without.
    """
    if kind == "off":
        return
    has, least = "none", _LEAST[kind]
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found >= least:
            return
        has = f"compute capability {found[0]}.{found[1]}"
    raise PunaError(
        f"float8 = {kind!r} needs a GPU with compute capability {least[0]}.{least[1]}; the device "
        f"{device} has {has}",
        'set float8 = "off"',
    )


def use_float8(block: nn.Module, kind: Float8) -> None:
    """Let the matrices of a layer multiply in float8; names and values of parameters stay.

    Args:
        block: Changed in place, before it is shared by ranks; may be on the meta device.
        kind: ``tensorwise`` scales each operand as a whole, ``rowwise`` each row; ``off`` leaves
            the layer.

    Raises:
        PunaError: torchao is not installed.
    """
    if kind == "off":
        return
    try:
        ao = importlib.import_module("torchao.float8")
    except ImportError as error:
        raise PunaError("float8 needs torchao", "pip install 'puna[float8]'") from error
    ao.convert_to_float8_training(block, config=ao.Float8LinearConfig.from_recipe_name(kind))
