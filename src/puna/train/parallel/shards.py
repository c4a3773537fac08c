"""The part of a tensor that this rank has."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(x: Tensor | None) -> Tensor:
    """Return the part of a tensor that this rank has."""
    if x is None:
        raise ValueError("a parameter has no gradient")
    return x.to_local() if isinstance(x, DTensor) else x


def copy_part(parameter: Tensor, full: Tensor) -> None:
    """Copy this rank's part of a full value into a parameter, maybe sharded."""
    if isinstance(parameter, DTensor):
        shape, offsets = compute_local_shape_and_global_offset(
            full.shape, parameter.device_mesh, parameter.placements
        )
        for dim, (start, size) in enumerate(zip(offsets, shape, strict=True)):
            full = full.narrow(dim, min(start, full.shape[dim]), size)
    local(parameter).copy_(full)


def n_copies(parameter: Tensor) -> int:
    """Return how many ranks have the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    n = 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        n *= size if isinstance(placement, Replicate) else 1
    return n
