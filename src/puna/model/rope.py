"""Rotary position embedding (Su et al. 2021), with its context extensions.

Those are Llama 3.1's (by wavelength) and position interpolation (Chen et al. 2023).

Layout: rotate-half, as in Hugging Face checkpoints: element ``i`` is paired with
``i + head_dim / 2``. Meta's own files pair ``2i`` with ``2i + 1``; their q and k rows are permuted.

Shapes: B batch, T tokens, N heads, D head_dim, H head_dim / 2, P positions in the table.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from puna.model.config import LinearScaling, LlamaConfig, RopeScaling

_BLOCK_POSITIONS = 512


def inverse_frequencies(config: LlamaConfig) -> Float[Tensor, " half"]:
    """Return the rotation per position of each pair, in radians, scaled if configured.

    Computed in float32 like the reference implementations: published weights were trained with
    these rounded values.
    """
    exponents_H = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies_H = 1.0 / config.rope_theta**exponents_H
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies_H
    if isinstance(scaling, LinearScaling):
        return frequencies_H / scaling.factor
    return _scale_by_wavelength(frequencies_H, scaling)


def _scale_by_wavelength(frequencies_H: Tensor, scaling: RopeScaling) -> Tensor:
    context = scaling.original_max_seq_len
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths_H = 2 * math.pi / frequencies_H
    # 0 at the longest kept-as-scaled wavelength, 1 at the shortest: outside it is clamped, which
    # yields the divided and the untouched frequencies of the two outer ranges.
    keep_H = ((context / wavelengths_H - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep_H) * frequencies_H / scaling.factor + keep_H * frequencies_H


@dataclass(frozen=True, eq=False)
class Rotation:
    """The angles of one forward, shared by all layers.

    An object and not a pair of tensors, so that a wrapper that casts the tensors it sees among a
    layer's arguments (mixed precision) cannot round the angles to 16 bit.

    Attributes:
        cos: Of shape (T, H), the same for all rows, or (B, T, H); float32.
        sin: Same shape.
    """

    cos: Float[Tensor, "... tokens half"]
    sin: Float[Tensor, "... tokens half"]

    def apply(
        self, x_BTND: Float[Tensor, "batch tokens heads head_dim"]
    ) -> Float[Tensor, "batch tokens heads head_dim"]:
        """Rotate each head by the angle of its position; float32 inside, x's dtype outside."""
        cos_T1D, sin_T1D = self.wide
        wide_BTND = x_BTND.float()
        # Whole heads and no halves: fewer passes, over contiguous memory.
        swapped_BTND = torch.cat(wide_BTND.chunk(2, dim=-1)[::-1], dim=-1)
        rotated_BTND = (wide_BTND * cos_T1D).add_(swapped_BTND.mul_(sin_T1D))
        return rotated_BTND.type_as(x_BTND)

    @functools.cached_property
    def wide(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of both halves of a head, (..., T, 1, D)."""
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class RotationTable:
    """Cosines and sines of the positions, computed on first use and grown in blocks.

    Deliberately no module buffer: it holds no state to save, move or shard, and a model built on
    the meta device needs no extra step to fill it.

    Args:
        config: Gives head_dim, theta and scaling.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def at(
        self,
        n_tokens: int,
        positions_BT: Int[Tensor, "batch tokens"] | None,
        device: torch.device,
    ) -> Rotation:
        """Return the rotation of given positions, or of 0 .. n_tokens - 1 when None."""
        if positions_BT is None:
            cos_PH, sin_PH = self._rows(n_tokens, device)
            return Rotation(cos_PH[:n_tokens], sin_PH[:n_tokens])
        cos_PH, sin_PH = self._rows(int(positions_BT.max()) + 1, device)
        return Rotation(cos_PH[positions_BT], sin_PH[positions_BT])

    def _rows(self, n_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        table = self._tables.get(device)
        if table is None or table[0].shape[0] < n_positions:
            # At least doubled, so that a sequence that grows computes each angle about twice.
            size = _BLOCK_POSITIONS * math.ceil(n_positions / _BLOCK_POSITIONS)
            if table is not None:
                size = max(size, min(2 * table[0].shape[0], self._config.max_seq_len))
            # Inside inference_mode the table would become an inference tensor, which a later
            # training step could not save for its backward.
            with torch.inference_mode(False), torch.no_grad():
                positions_P = torch.arange(size, dtype=torch.float32)
                angles_PH = torch.outer(positions_P, inverse_frequencies(self._config))
                table = (angles_PH.cos().to(device), angles_PH.sin().to(device))
            self._tables[device] = table
        return table
