"""The activation probe: runs a model block by block and keeps the largest value of every place.

Everything is computed in float32, one block at a time, so that the values are those the model means
and the memory is one block, whatever the size of the checkpoint.

Places: input and output of every linear layer (the input of ``w2`` is the product
silu(w1 x) * w3 x), the residual stream before each norm, the scaled attention scores, the logits.

Shapes: B batch (1), T tokens, C dim, N query heads, S keys, K key/value heads, D head_dim, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from puna.lm.guard_report import FP16_MAX, Peak
from puna.model.attention import AttentionPlan, plan_attention
from puna.model.config import LlamaConfig
from puna.model.llama import Block, RMSNorm
from puna.model.rope import RotationTable

_QUERIES = 128  # attention scores computed at once, per head
_HEAD_ROWS = 16384  # of the output head at once


class Probe:
    """Follows the sample through the model and records peaks.

    Args:
        config: The model.
        rows: Sequences of token ids, any lengths, none empty.
        embedding: Of the model, any dtype.

    Attributes:
        peaks: Place -> its largest activation so far.
    """

    def __init__(
        self, config: LlamaConfig, rows: Sequence[Sequence[int]], embedding: Float[Tensor, "V C"]
    ) -> None:
        self.config = config
        self.peaks: dict[str, Peak] = {}
        self._rows = rows
        self._rotations = RotationTable(config)
        self._device = embedding.device
        self._row, self._layer = 0, -1
        self._silu_w1: Tensor | None = None
        self._w3: Tensor | None = None
        self._states = [
            embedding[torch.tensor(row, device=self._device)].float().unsqueeze(0) for row in rows
        ]

    def run_block(self, layer: int, block: Block) -> None:
        """Move every sequence through a block of float32 parameters."""
        self._layer = layer
        hooks = list(self._hooks(block, f"layers.{layer}."))
        try:
            for row, h_BTC in enumerate(self._states):
                self._row = row
                rotation = self._rotations.at(h_BTC.shape[1], None, self._device)
                plan = _MeasuredPlan(self, plan_attention(h_BTC.shape[1], self._device))
                self._states[row] = block(h_BTC, rotation, plan)
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self, norm: RMSNorm, head: Float[Tensor, "V C"]) -> None:
        """Record the end of the residual stream and the logits.

        Args:
            norm: Last norm, float32.
            head: Output matrix, any dtype; used in slices.
        """
        self._layer = -1
        for row, h_BTC in enumerate(self._states):
            self._row = row
            self.see("norm input", h_BTC)
            self._states[row] = norm(h_BTC)
            self.see("norm output", self._states[row])
        for first in range(0, head.shape[0], _HEAD_ROWS):
            part = head[first : first + _HEAD_ROWS].float()
            for row, x_BTC in enumerate(self._states):
                self._row = row
                self.see("logits", F.linear(x_BTC, part), first)

    def see(
        self,
        place: str,
        x: Float[Tensor, "batch tokens *rest"],
        first_channel: int = 0,
        first_position: int = 0,
    ) -> None:
        """Record the largest value of a place.

        Args:
            place: Its name.
            x: Activations of the current row, or a part of them.
            first_channel: Where the part begins.
            first_position: Where the part begins.
        """
        flat = x.reshape(-1).cpu().numpy()  # numpy scans faster than torch, on one thread
        most = max(abs(float(flat.min())), abs(float(flat.max())))  # NaN if one is there
        n_over = 0 if most <= FP16_MAX else int(np.count_nonzero(~(np.abs(flat) <= FP16_MAX)))
        old = self.peaks.get(place)
        if old is not None:
            n_over += old.n_over
            if not _beats(most, old.value):
                self.peaks[place] = replace(old, n_over=n_over)
                return
        index = int(np.abs(flat).argmax())  # a NaN counts as the largest
        value = float(flat[index])
        position, channel = divmod(index, flat.size // x.shape[1])
        position += first_position
        layer = None if self._layer < 0 else self._layer
        self.peaks[place] = Peak(
            layer, place, value, self._row, position, int(self._rows[self._row][position]),
            first_channel + channel, n_over, self._factors(place, index),
        )  # fmt: skip

    def _factors(self, place: str, index: int) -> tuple[float, float] | None:
        if not place.endswith("w2 input") or self._silu_w1 is None or self._w3 is None:
            return None
        return float(self._silu_w1.reshape(-1)[index]), float(self._w3.reshape(-1)[index])

    def _hooks(self, block: Block, prefix: str) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                yield module.register_forward_pre_hook(self._before(f"{prefix}{name}"))
                yield module.register_forward_hook(self._after(f"{prefix}{name}"))
            elif isinstance(module, RMSNorm):  # its input is the residual stream
                yield module.register_forward_pre_hook(self._before(f"{prefix}{name}"))

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.see(f"{name} input", args[0])

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.see(f"{name} output", output)
            if name.endswith("w1"):
                self._silu_w1 = F.silu(output)
            elif name.endswith("w3"):
                self._w3 = output
            elif name.endswith("w2"):
                self._silu_w1 = self._w3 = None

        return hook


class _MeasuredPlan:
    """Attention that also records its scores."""

    def __init__(self, probe: Probe, plan: AttentionPlan) -> None:
        self._probe, self._plan = probe, plan

    def __call__(self, q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, layer: int = 0) -> Tensor:
        place = f"layers.{layer}.attention.scores"
        for first in range(0, q_BTND.shape[1], _QUERIES):
            queries = slice(first, first + _QUERIES)
            scores_BTN = _extreme_scores(q_BTND[:, queries], k_BSKD)
            self._probe.see(place, scores_BTN, first_position=first)
        return self._plan(q_BTND, k_BSKD, v_BSKD, layer)


def _extreme_scores(q_BTND: Tensor, k_BSKD: Tensor) -> Tensor:
    """Return, for every query and head, the scaled score of the largest magnitude."""
    k_BKDS = k_BSKD.permute(0, 2, 3, 1)
    q_BKGTD = q_BTND.transpose(1, 2).unflatten(1, (k_BKDS.shape[1], -1)) * q_BTND.shape[-1] ** -0.5
    scores_BKGTS = q_BKGTD @ k_BKDS.unsqueeze(2)
    low, high = scores_BKGTS.aminmax(dim=-1)
    return torch.where(high > -low, high, low).flatten(1, 2).transpose(1, 2)


def _beats(value: float, old: float) -> bool:
    """Whether a value is nearer to overflow; NaN is beyond everything, the first one stays."""
    if math.isnan(old):
        return False
    return math.isnan(value) or abs(value) > abs(old)
