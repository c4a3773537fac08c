"""Cross entropy by chunks of tokens, so that the logits of a whole batch never exist at once.

With a vocabulary of 128,256 the logits of 4 x 2048 tokens are 4.2 GB in fp32; a chunk is 32 MB.
The forward pass computes a chunk's logits, its loss and, right away, both gradients; the backward
pass only scales them.

Shapes: B rows, T tokens per row, N tokens with a label, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from puna.tokens.loader import NO_LABEL
from puna.train.fused.functions import is_fused, softmax_loss
from puna.train.parallel.threads import give_back_memory, is_large

_CHUNK_ELEMENTS = 1 << 23  # logits per chunk: 32 MB in fp32
_PRODUCT_ELEMENTS = 1 << 22  # of the head's gradient at once


def cross_entropy_sum(
    hidden_BTD: Float[Tensor, "B T D"],
    weight_VD: Float[Tensor, "V D"],
    labels_BT: Int64[Tensor, "B T"],
    *,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    group: dist.ProcessGroup | None = None,
    first_id: int = 0,
    z_loss: float = 0.0,
    nats_B: Float64[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Return the summed cross entropy of the labelled tokens, in nats.

    With ``z_loss`` the sum contains ``z_loss * log(Z)**2`` of each token, too, Z being the sum of
    the exponentials of its logits (PaLM; Chowdhery et al., 2022, section 5).

    It is a sum and not a mean: the caller divides by the number of labelled tokens of the *global*
    batch, so that neither the split into micro-batches nor the number of ranks changes the result.

    Args:
        hidden_BTD: Final hidden states, normed.
        weight_VD: Output head.
        labels_BT: Next token of each position; -100 has no loss (and costs no logits).
        dtype: Dtype of the matrix products; the softmax is always fp32.
        chunk_tokens: Tokens per chunk; by the size of the vocabulary when None.
        group: Ranks that share the head by vocabulary (loss parallel). All have the same hidden
            states and get the same loss; the gradient of the states is each rank's part of a sum.
        first_id: Id of the first row of this rank's part of the head.
        z_loss: Weight of the square of log(Z).
        nats_B: The cross entropy of each row, without the z-loss, is added to it.
    """
    hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    kept = (labels_N != NO_LABEL).nonzero().squeeze(1)
    if len(kept) < len(labels_N):
        hidden_ND, labels_N = hidden_ND.index_select(0, kept), labels_N.index_select(0, kept)
    chunk = chunk_tokens or tokens_per_chunk(weight_VD.shape[0])
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss, nats_N = _ChunkedCrossEntropy.apply(  # type: ignore[misc]
            hidden_ND, weight_VD, labels_N, dtype, chunk, group, first_id, z_loss
        )
    if nats_B is not None:
        nats_B.index_add_(0, kept // labels_BT.shape[1], nats_N.double())
    return loss


def tokens_per_chunk(n_ids: int) -> int:
    """Return how many tokens are computed at once for a head of ``n_ids`` rows."""
    return max(64, _CHUNK_ELEMENTS // n_ids)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        dtype: torch.dtype,
        chunk: int,
        group: dist.ProcessGroup | None,
        first_id: int,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad)
        if needs_grad and weight_VD.is_cpu and is_large(weight_VD.numel()):
            give_back_memory()  # the pieces to come are too large for what the layers left free
        head_VD = weight_VD.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        nats_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            hidden_nD = hidden_ND[part].to(dtype)
            logits_nV = hidden_nD @ head_VD.T
            if group is None and is_fused(logits_nV):
                nats_n, log_z_n = softmax_loss(logits_nV, labels_N[part], z_loss)
                grad_nV = logits_nV
            else:
                nats_n, log_z_n, grad_nV = _softmax_loss(
                    logits_nV.float(), labels_N[part], z_loss, group, first_id
                )
            nats_N[part] = nats_n
            loss += nats_n.sum()
            if z_loss:
                loss += z_loss * log_z_n.square().sum()
            if grad_hidden_ND is None or grad_weight_VD is None:
                continue
            grad_nV = grad_nV.to(dtype)
            grad_hidden_ND[part] = grad_nV @ head_VD
            if dtype == torch.float32:
                grad_weight_VD.addmm_(grad_nV.T, hidden_nD)
            else:
                _add_product(grad_weight_VD, grad_nV, hidden_nD)
        ctx.save_for_backward(grad_hidden_ND)
        # Not saved: autograd would not let it be scaled in place.
        ctx.grad_weight_VD, ctx.scale = grad_weight_VD, torch.ones_like(loss)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nats_N)
        return loss, nats_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        # In place: a scaled copy of the head's gradient is as large as the head. Schedules that
        # compute gradients of inputs and of weights apart come here twice with the same scale.
        (grad_hidden_ND,) = ctx.saved_tensors
        factor = torch.where(grads[0] == ctx.scale, 1.0, grads[0] / ctx.scale)
        ctx.scale = grads[0]
        # Detached: nobody else has this tensor, so that autograd takes it without a copy.
        grad_weight_VD = ctx.grad_weight_VD.mul_(factor).detach()
        return grad_hidden_ND * grads[0], grad_weight_VD.to(ctx.weight_dtype), *[None] * 6


def _add_product(sum_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor) -> None:
    """Add a product of 16 bits to a sum of 32, in parts: the whole is as large as the head."""
    n_rows = max(1, _PRODUCT_ELEMENTS // sum_VD.shape[1])
    for start in range(0, len(sum_VD), n_rows):
        rows = slice(start, start + n_rows)
        sum_VD[rows] += grad_nV[:, rows].T @ hidden_nD


def _softmax_loss(
    logits_nV: Tensor,
    labels_n: Tensor,
    z_loss: float,
    group: dist.ProcessGroup | None,
    first_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross entropy and log(Z) of each token, and, in place of logits, their gradient."""
    labels_n1 = labels_n.unsqueeze(1)
    top_n1 = logits_nV.amax(1, keepdim=True)
    own_n1 = torch.ones_like(top_n1)
    if group is not None:
        dist.all_reduce(top_n1, dist.ReduceOp.MAX, group)
        labels_n1 = labels_n1 - first_id
        own_n1 = ((labels_n1 >= 0) & (labels_n1 < logits_nV.shape[1])).float()
        labels_n1 = labels_n1.clamp(0, logits_nV.shape[1] - 1)
    logits_nV.sub_(top_n1)
    target_n1 = logits_nV.gather(1, labels_n1)
    exp_nV = logits_nV.exp_()
    sum_n1 = exp_nV.sum(1, keepdim=True)
    if group is not None:
        target_n1 *= own_n1
        both_2n1 = torch.stack((sum_n1, target_n1))
        dist.all_reduce(both_2n1, group=group)
        sum_n1, target_n1 = both_2n1
    nats_n1, log_z_n1 = sum_n1.log() - target_n1, sum_n1.log() + top_n1
    grad_nV = exp_nV.div_(sum_n1)  # softmax minus one-hot is the gradient of the logits
    if z_loss:  # of log(Z) it is the softmax alone
        grad_nV.mul_(1.0 + 2.0 * z_loss * log_z_n1)
    grad_nV.scatter_add_(1, labels_n1, -own_n1)
    return nats_n1.squeeze(1), log_z_n1.squeeze(1), grad_nV
