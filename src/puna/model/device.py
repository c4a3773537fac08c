"""Where a model runs; imports torch only when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from puna.core.errors import PunaError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]


def pick_device(setting: Device, index: int = 0) -> torch.device:
    """Turn a setting into a device; ``auto`` takes a GPU when there is one.

    Args:
        setting: From a configuration or an option.
        index: Which GPU; the rank on this machine in distributed runs.

    Raises:
        PunaError: A GPU is asked for and there is none, or none of this index.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if setting == "cuda" and not has_gpu:
        raise PunaError('device = "cuda", but torch finds no GPU', 'set device = "auto" or "cpu"')
    if setting == "cpu" or not has_gpu:
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise PunaError(
            f"rank {index} has no GPU: this machine has {torch.cuda.device_count()}",
            f"set nproc to at most {torch.cuda.device_count()}",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
