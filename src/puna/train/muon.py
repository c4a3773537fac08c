"""Muon: momentum whose singular values are all set to about one (Jordan et al., 2024).

A step of a matrix W with gradient G (Moonlight's form; Liu et al., 2025)::

    M <- momentum * M + (1 - momentum) * G
    U <- momentum * M + (1 - momentum) * G     (Nesterov; else M)
    W <- (1 - lr * weight_decay) * W - lr * scale * orthogonalise(U)

Only the orthogonalisation needs whole matrices. The ranks that share a matrix share this work, too:
each gets other matrices, whole, and sends the results back in parts, by one all-to-all each way per
round of as many matrices as ranks. So a rank holds one whole matrix at a time, and the iterations
of a matrix are computed once (once per copy of the model under HSDP). The momentum is sharded as
the parameters are.

Shapes: M rows, N columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from puna.train.parallel.shards import local

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of Jordan's quintic: steepest at zero, singular values end between 0.7 and 1.2."""
_EPS = 1e-7


def orthogonalise(
    update_MN: Float[Tensor, "rows columns"], iterations: int, dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """Return a matrix with the same singular vectors and singular values of about one.

    Args:
        update_MN: A momentum.
        iterations: Of Newton and Schulz.
        dtype: Of the matrix products; the result has it, too.
    """
    is_tall = update_MN.shape[0] > update_MN.shape[1]
    x = (update_MN.T if is_tall else update_MN).to(dtype)
    x = x / x.norm().clamp(min=_EPS)  # so that no singular value is above one
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if is_tall else x


def step_scale(kind: Literal["adam", "spectral"], n_rows: int, n_columns: int) -> float:
    """Return by what an orthogonal matrix is multiplied, see :class:`MuonConfig`."""
    if kind == "adam":
        return 0.2 * math.sqrt(max(n_rows, n_columns))
    return math.sqrt(max(1.0, n_rows / n_columns))


@dataclass(frozen=True)
class _Block:
    """The part of a matrix that a rank has: a rectangle, maybe empty."""

    first_row: int
    first_column: int
    n_rows: int
    n_columns: int

    @property
    def size(self) -> int:
        return self.n_rows * self.n_columns

    def of(self, whole_MN: Tensor) -> Tensor:
        rows = slice(self.first_row, self.first_row + self.n_rows)
        return whole_MN[rows, self.first_column : self.first_column + self.n_columns]


class Orthogonaliser:
    """Orthogonalises matrices that ranks share.

    Args:
        matrices: Parameters, the same ones in the same order on every rank of the group.
        group: Ranks that together have one copy of every matrix; None for one rank alone.
        iterations: Of Newton and Schulz.
        dtype: Of the matrix products, and of what is sent.
        device: Where to compute.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        group: dist.ProcessGroup | None,
        iterations: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._group, self._iterations = group, iterations
        self._dtype, self._device = dtype, device
        self._blocks = [_blocks(matrix, group) for matrix in matrices]
        self._shapes = [tuple(matrix.shape) for matrix in matrices]

    def __call__(self, updates: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's part of each orthogonalised matrix.

        Args:
            updates: This rank's part of each.
        """
        if self._group is None:
            return [orthogonalise(x, self._iterations, self._dtype) for x in updates]
        size, done = dist.get_world_size(self._group), list[Tensor]()
        for first in range(0, len(updates), size):
            done += self._round(first, updates[first : first + size])
        return done

    def _round(self, first: int, updates: Sequence[Tensor]) -> list[Tensor]:
        """Let rank ``i`` of the group orthogonalise matrix ``first + i``."""
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        blocks = self._blocks[first : first + size]
        out = [block[rank].size for block in blocks] + [0] * (size - len(blocks))
        mine = blocks[rank] if rank < len(blocks) else []
        back = [block.size for block in mine] or [0] * size
        sent = torch.cat([x.to(self._device, self._dtype).flatten() for x in updates])
        got = sent.new_empty(sum(back))
        dist.all_to_all_single(got, sent, back, out, group=self._group)
        if mine:
            whole_MN = got.new_empty(self._shapes[first + rank])
            for block, part in zip(mine, got.split(back), strict=True):
                block.of(whole_MN).copy_(part.view(block.n_rows, block.n_columns))
            whole_MN = orthogonalise(whole_MN, self._iterations, self._dtype)
            got = torch.cat([block.of(whole_MN).flatten() for block in mine])
        dist.all_to_all_single(sent, got, out, back, group=self._group)
        parts = sent.split(out)[: len(updates)]
        return [part.view_as(x) for part, x in zip(parts, updates, strict=True)]


def _blocks(matrix: Tensor, group: dist.ProcessGroup | None) -> list[_Block]:
    """Return the part of every rank of the group, in the group's order."""
    if not isinstance(matrix, DTensor) or group is None:
        return []
    mesh, found = matrix.device_mesh, []
    for rank in dist.get_process_group_ranks(group):
        place = (mesh.mesh == rank).nonzero().flatten().tolist()
        shape, start = _compute_local_shape_and_global_offset(
            matrix.shape, mesh.shape, place, matrix.placements
        )
        found.append(_Block(start[0], start[1], shape[0], shape[1]))
    return found


class Muon(torch.optim.Optimizer):
    """Muon for some matrices and another optimiser for all else, as one optimiser.

    Args:
        matrices: Trained by Muon; their state is ``momentum``.
        other: Optimiser of the other parameters; its groups and state become this one's.
        group: Ranks that share the matrices; None for one rank alone.
        lr: Learning rate.
        weight_decay: Of the matrices.
        momentum: Decay of the mean gradient.
        nesterov: Mix the gradient in once more.
        scale: See :func:`step_scale`.
        iterations: Of Newton and Schulz.
        dtype: Of these.
        device: Where to compute them.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        other: torch.optim.Optimizer,
        group: dist.ProcessGroup | None,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        scale: Literal["adam", "spectral"],
        iterations: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__([{"params": list(matrices)}], {"lr": lr, "weight_decay": weight_decay})
        self._matrices, self._other = self.param_groups[0], other
        self._momentum, self._nesterov = momentum, nesterov
        self._scales = [step_scale(scale, *matrix.shape) for matrix in matrices]
        self._orthogonalise = Orthogonaliser(matrices, group, iterations, dtype, device)
        self.param_groups.extend(other.param_groups)
        other.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step; every parameter must have a gradient."""
        self._other.step()
        params: list[nn.Parameter] = self._matrices["params"]
        weights, grads = [local(p) for p in params], [local(p.grad) for p in params]
        means = [local(self.state[p]["momentum"]) for p in params]
        torch._foreach_lerp_(means, grads, 1.0 - self._momentum)
        updates = torch._foreach_lerp(grads, means, self._momentum) if self._nesterov else means
        lr = self._matrices["lr"]
        torch._foreach_mul_(weights, 1.0 - lr * self._matrices["weight_decay"])
        parts = self._orthogonalise(updates)
        for weight, part, scale in zip(weights, parts, self._scales, strict=True):
            weight.add_(part.to(weight), alpha=-lr * scale)
