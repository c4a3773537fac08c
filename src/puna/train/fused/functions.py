"""Norm, rotation and gate as functions of autograd.

Shapes: ``...`` any leading ones, C width, N heads, D head_dim, H head_dim / 2, M rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from puna.train.fused import loops
from puna.train.fused.rows import as_array, over_rows

_ROWS_OF_A_SUM = 256


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x**2) + eps) * weight, rounded once, in x's shape and dtype."""
    return _Norm.apply(x, weight_C, eps)  # type: ignore[return-value]


def rotate(x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return every head rotated; cos and sin of shape (T, H) or (B, T, H), float32."""
    return _Rotate.apply(x_BTND, cos, sin)  # type: ignore[return-value]


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return _Gate.apply(gate, up)  # type: ignore[return-value]


def softmax_loss(logits_MV: Tensor, labels_M: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Replace logits by the gradient of the loss; return cross entropy and log(Z) of each token.

    See :func:`puna.train.loss.cross_entropy_sum`. Not seen by autograd.
    """
    nats_M, log_z_M = torch.empty(len(logits_MV)), torch.empty(len(logits_MV))
    over_rows(
        loops.cross_entropy, len(logits_MV), as_array(logits_MV), as_array(labels_M), z_loss,
        as_array(nats_M), as_array(log_z_M),
    )  # fmt: skip
    return nats_M, log_z_M


def is_fused(x: Tensor) -> bool:
    """Tell whether the loops of this package can compute with a tensor."""
    # Not with subclasses: sharded tensors and those that only stand for their shapes.
    is_plain = type(x) in (Tensor, nn.Parameter)
    return is_plain and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def _flat(x: Tensor) -> Tensor:
    """Return rows (M, C), contiguous."""
    return x.contiguous().view(-1, x.shape[-1])


def _copy(weight_C: Tensor) -> np.ndarray:
    """Copy a parameter: memory that numpy has seen can no longer be freed by FSDP."""
    return as_array(weight_C.detach().clone())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        x_MC = _flat(x)
        out_MC, scale_M = torch.empty_like(x_MC), torch.empty(len(x_MC))
        over_rows(
            loops.norm, len(x_MC), as_array(x_MC), _copy(weight_C), eps, as_array(out_MC),
            as_array(scale_M),
        )  # fmt: skip
        ctx.save_for_backward(x_MC, weight_C, scale_M)
        return out_MC.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_MC, weight_C, scale_M = ctx.saved_tensors
        grad_MC, grad_x_MC = _flat(grads[0]), torch.empty_like(x_MC)
        # Sums of fixed parts, so that the result does not depend on the number of threads.
        n_parts = -(-len(x_MC) // _ROWS_OF_A_SUM)
        sums_PC = torch.zeros(n_parts, x_MC.shape[1])
        over_rows(
            loops.norm_backward, n_parts, as_array(grad_MC), as_array(x_MC), _copy(weight_C),
            as_array(scale_M), _ROWS_OF_A_SUM, as_array(grad_x_MC), as_array(sums_PC),
        )  # fmt: skip
        return grad_x_MC.view(grads[0].shape), sums_PC.sum(0).to(weight_C.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cos_PH, ctx.sin_PH = cos.flatten(0, -2), sin.flatten(0, -2)
        return _turn(x_BTND, ctx.cos_PH, ctx.sin_PH, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _turn(grads[0], ctx.cos_PH, ctx.sin_PH, -1.0), None, None


def _turn(x_BTND: Tensor, cos_PH: Tensor, sin_PH: Tensor, sign: float) -> Tensor:
    x_MND = x_BTND.contiguous().flatten(0, 1)
    out_MND = torch.empty_like(x_MND)
    over_rows(
        loops.rotate, len(x_MND), as_array(x_MND), as_array(cos_PH), as_array(sin_PH), sign,
        as_array(out_MND),
    )  # fmt: skip
    return out_MND.view(x_BTND.shape)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate_MC, up_MC = _flat(gate), _flat(up)
        out_MC = torch.empty_like(gate_MC)
        over_rows(loops.gate, len(gate_MC), as_array(gate_MC), as_array(up_MC), as_array(out_MC))
        ctx.save_for_backward(gate_MC, up_MC)
        return out_MC.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        gate_MC, up_MC = ctx.saved_tensors
        grad_MC = _flat(grads[0])
        to_gate_MC, to_up_MC = torch.empty_like(gate_MC), torch.empty_like(up_MC)
        over_rows(
            loops.gate_backward, len(gate_MC), as_array(grad_MC), as_array(gate_MC),
            as_array(up_MC), as_array(to_gate_MC), as_array(to_up_MC),
        )  # fmt: skip
        return to_gate_MC.view(grads[0].shape), to_up_MC.view(grads[0].shape)
