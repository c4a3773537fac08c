"""Lets the layers of a model compute with the loops of this package, where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from puna.model.llama import FeedForward, RMSNorm
from puna.model.rope import Rotation
from puna.train.fused.functions import is_fused, rms_norm, rotate, silu_gate


class FusedRotation(Rotation):
    """:class:`puna.model.rope.Rotation` in one pass."""

    def apply(
        self, x_BTND: Float[Tensor, "batch tokens heads head_dim"]
    ) -> Float[Tensor, "batch tokens heads head_dim"]:
        """Rotate each head by the angle of its position; float32 inside, x's dtype outside."""
        return rotate(x_BTND, self.cos, self.sin) if is_fused(x_BTND) else super().apply(x_BTND)


def fuse(model: nn.Module) -> None:
    """Let norms and feed-forwards compute in one pass; parameters and their names stay.

    A tensor that the loops cannot take (on a GPU, shared in sequence parallel) is computed as
    before.
    """
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_norm, module, module.forward)  # type: ignore[method-assign]
        elif isinstance(module, FeedForward):
            module.forward = partial(_feed, module, module.forward)  # type: ignore[method-assign]


def _norm(norm: RMSNorm, plain: Callable[[Tensor], Tensor], x_BTC: Tensor) -> Tensor:
    weight_C = norm.weight
    if not (is_fused(x_BTC) and is_fused(weight_C)):
        return plain(x_BTC)
    return rms_norm(x_BTC, weight_C, norm.eps)


def _feed(layer: FeedForward, plain: Callable[[Tensor], Tensor], x_BTC: Tensor) -> Tensor:
    if not is_fused(x_BTC):
        return plain(x_BTC)
    return layer.w2(silu_gate(layer.w1(x_BTC), layer.w3(x_BTC)))
