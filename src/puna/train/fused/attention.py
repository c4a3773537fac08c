"""Attention on a CPU, in blocks of queries that touch only the keys they can see.

softmax(q k^T / sqrt(D)) v by PyTorch's batched matrix products over all heads of a row at once,
with one loop for the softmax between them. The query heads that share keys are rows of one product,
so keys are never repeated. The backward pass computes a block's weights again from the scores and
the stored logarithm of their sum (FlashAttention; Dao et al. 2022).

Shapes: B rows, T tokens, N query heads, K key/value heads, R = N / K, D head_dim, M = T * R rows of
a key/value head (token by token), m those of a block, s the keys it touches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.train.fused import loops
from puna.train.fused.rows import as_array, over_rows

BLOCK_TOKENS = 128
"""Queries of a block."""


@dataclass(frozen=True, eq=False)
class FusedPlan:
    """Causal attention inside documents; see :class:`puna.model.attention.AttentionPlan`.

    Attributes:
        first_BT: First key that each token sees; it sees all from there to itself.
    """

    first_BT: Tensor

    def __call__(self, q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, layer: int = 0) -> Tensor:
        """Return the weighted values of each query (B, T, N, D)."""
        return _Attention.apply(q_BTND, k_BSKD, v_BSKD, self.first_BT)  # type: ignore[return-value]


def plan_fused(n_tokens: int, doc_ids_BT: Tensor | None) -> FusedPlan:
    """Make the plan of a forward over whole rows; a document is a run of equal ids in a row."""
    if doc_ids_BT is None:
        return FusedPlan(torch.zeros((1, n_tokens), dtype=torch.int64))
    at_T = torch.arange(n_tokens)
    starts_BT = torch.zeros(doc_ids_BT.shape, dtype=torch.int64)
    is_start_BT = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    starts_BT[:, 1:] = torch.where(is_start_BT, at_T[1:], 0)
    return FusedPlan(starts_BT.cummax(1).values)


@dataclass
class _Block:
    """Queries of one row and the keys they touch."""

    row: int
    queries: slice  # rows of a key/value head
    keys: slice
    begin_M: np.ndarray  # of each row of all heads, counted from the first key of the block
    end_M: np.ndarray


def _blocks(first_BT: Tensor, n_rows: int, n_groups: int, n_shared: int) -> Iterator[_Block]:
    firsts_BT = first_BT.numpy()
    n_tokens = firsts_BT.shape[1]
    for row in range(n_rows):
        first_T = firsts_BT[row % len(firsts_BT)]
        for start in range(0, n_tokens, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, n_tokens)
            low = int(first_T[start])
            begin = np.maximum(first_T[start:stop] - low, 0)
            end = np.arange(start + 1 - low, stop + 1 - low)
            begin_M, end_M = (np.tile(np.repeat(x, n_shared), n_groups) for x in (begin, end))
            queries = slice(start * n_shared, stop * n_shared)
            yield _Block(row, queries, slice(low, stop), begin_M, end_M)


def _by_group(x_BTND: Tensor, n_groups: int) -> Tensor:
    """Copy to (B, K, M, D)."""
    n_rows, _, _, head_dim = x_BTND.shape
    x_BTKRD = x_BTND.unflatten(2, (n_groups, -1))
    return x_BTKRD.transpose(1, 2).reshape(n_rows, n_groups, -1, head_dim)


def _by_token(x_BKMD: Tensor, n_tokens: int) -> Tensor:
    """Copy to (B, T, N, D)."""
    return x_BKMD.unflatten(2, (n_tokens, -1)).transpose(1, 2).flatten(2, 3)


class _Scratch:
    """Memory for the largest block, reused by all."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._memory = like, like.new_empty(0)

    def take(self, *shape: int) -> Tensor:
        size = int(np.prod(shape))
        if self._memory.numel() < size:
            self._memory = self._like.new_empty(size)
        return self._memory[:size].view(shape)


def _forward(
    q_BKMD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, first_BT: Tensor
) -> tuple[Tensor, Tensor]:
    n_rows, n_groups, n_queries, head_dim = q_BKMD.shape
    n_shared = n_queries // k_BKTD.shape[2]
    out_BKMD, scratch = torch.empty_like(q_BKMD), _Scratch(q_BKMD)
    log_sum_BKM = q_BKMD.new_empty(q_BKMD.shape[:-1], dtype=torch.float32)
    for block in _blocks(first_BT, n_rows, n_groups, n_shared):
        b, m, s = block.row, block.queries, block.keys
        q_KmD, k_KsD, v_KsD = q_BKMD[b, :, m], k_BKTD[b, :, s], v_BKTD[b, :, s]
        x_Kms = scratch.take(n_groups, q_KmD.shape[1], k_KsD.shape[1])
        torch.bmm(q_KmD, k_KsD.transpose(1, 2), out=x_Kms)
        log_sum_Km = torch.empty(x_Kms.shape[:2])
        over_rows(
            loops.softmax, x_Kms.shape[0] * x_Kms.shape[1], as_array(x_Kms.flatten(0, 1)),
            block.begin_M, block.end_M, head_dim**-0.5, as_array(log_sum_Km.flatten()),
        )  # fmt: skip
        log_sum_BKM[b, :, m] = log_sum_Km
        out_BKMD[b, :, m] = torch.bmm(x_Kms, v_KsD)
    return out_BKMD, log_sum_BKM


# An operation of PyTorch, so that activation checkpointing can keep its result.
_LIBRARY = torch.library.Library("puna", "FRAGMENT")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor first) -> (Tensor, Tensor)")
_LIBRARY.impl("attention", _forward, "CPU")


def _backward(
    grad_BKMD: Tensor, q_BKMD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, log_sum_BKM: Tensor,
    mean_BKM: Tensor, first_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n_rows, n_groups, n_queries, head_dim = q_BKMD.shape
    n_shared = n_queries // k_BKTD.shape[2]
    grad_q_BKMD = torch.empty_like(q_BKMD)
    grad_k_BKTD, grad_v_BKTD = (torch.zeros(k_BKTD.shape) for _ in range(2))
    weights, grads = _Scratch(q_BKMD), _Scratch(q_BKMD)
    for block in _blocks(first_BT, n_rows, n_groups, n_shared):
        b, m, s = block.row, block.queries, block.keys
        q_KmD, k_KsD, v_KsD = q_BKMD[b, :, m], k_BKTD[b, :, s], v_BKTD[b, :, s]
        grad_KmD = grad_BKMD[b, :, m]
        shape = (n_groups, q_KmD.shape[1], k_KsD.shape[1])
        x_Kms, grad_Kms = weights.take(*shape), grads.take(*shape)
        torch.bmm(q_KmD, k_KsD.transpose(1, 2), out=x_Kms)
        torch.bmm(grad_KmD, v_KsD.transpose(1, 2), out=grad_Kms)
        over_rows(
            loops.softmax_backward, shape[0] * shape[1], as_array(x_Kms.flatten(0, 1)),
            as_array(grad_Kms.flatten(0, 1)), block.begin_M, block.end_M, head_dim**-0.5,
            as_array(log_sum_BKM[b, :, m].flatten()), as_array(mean_BKM[b, :, m].flatten()),
        )  # fmt: skip
        grad_q_BKMD[b, :, m] = torch.bmm(grad_Kms, k_KsD)
        grad_v_BKTD[b, :, s] += torch.bmm(x_Kms.transpose(1, 2), grad_KmD)
        grad_k_BKTD[b, :, s] += torch.bmm(grad_Kms.transpose(1, 2), q_KmD)
    return grad_q_BKMD, grad_k_BKTD, grad_v_BKTD


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, first_BT: Tensor
    ) -> Tensor:
        n_groups = k_BTKD.shape[2]
        q_BKMD = _by_group(q_BTND, n_groups)
        k_BKTD, v_BKTD = (x.transpose(1, 2).contiguous() for x in (k_BTKD, v_BTKD))
        out_BKMD, log_sum_BKM = torch.ops.puna.attention(q_BKMD, k_BKTD, v_BKTD, first_BT)
        out_BTND = _by_token(out_BKMD, q_BTND.shape[1])
        ctx.save_for_backward(q_BKMD, k_BKTD, v_BKTD, out_BTND, log_sum_BKM)
        ctx.first_BT = first_BT
        return out_BTND

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q_BKMD, k_BKTD, v_BKTD, out_BTND, log_sum_BKM = ctx.saved_tensors
        grad_BTND = grads[0].contiguous()
        n_tokens, n_groups = out_BTND.shape[1], k_BKTD.shape[1]
        mean_BTN1 = torch.empty((*out_BTND.shape[:-1], 1))
        over_rows(
            loops.dots, mean_BTN1.numel(), as_array(out_BTND.flatten(0, 2)),
            as_array(grad_BTND.flatten(0, 2)), as_array(mean_BTN1.flatten()),
        )  # fmt: skip
        grad_q, grad_k, grad_v = _backward(
            _by_group(grad_BTND, n_groups), q_BKMD, k_BKTD, v_BKTD, log_sum_BKM,
            _by_group(mean_BTN1, n_groups).squeeze(-1), ctx.first_BT,
        )  # fmt: skip
        return (
            _by_token(grad_q, n_tokens),
            grad_k.to(q_BKMD.dtype).transpose(1, 2),
            grad_v.to(q_BKMD.dtype).transpose(1, 2),
            None,
        )
