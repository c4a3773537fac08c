"""Activation checkpointing: layers that keep less for the backward pass and compute it again.

What is computed again is the same computation on the same values, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from puna.model.activations import Recompute
from puna.model.llama import Block
from puna.train.fused import attention as _attention  # noqa: F401 (registers its operation)

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten._scaled_mm.default: 0}
"""Matrix products, and which of their arguments is the input."""
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.puna.attention.default,
}
_REDUCE_SCATTER = "_c10d_functional::reduce_scatter_tensor"


def recompute(block: Block, kind: Recompute) -> None:
    """Let a layer keep less in its forward pass.

    Its forward method is wrapped and not the layer: names of parameters stay, and what shards the
    layer later gathers parameters around the wrapper, not within.

    Args:
        block: Changed in place; ``none`` leaves it.
        kind: ``full`` keeps the input of the layer only; ``selective`` keeps it and the results of
            matrix products, of attention and of the sums over tensor-parallel ranks, and computes
            norms, rotations and the feed-forward's product again.
    """
    if kind == "none":
        return
    again: Callable[..., Any] = partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
    )
    if kind == "selective":
        n_inner = block.feed_forward.w2.in_features
        again = partial(
            again, context_fn=partial(create_selective_checkpoint_contexts, _policy(n_inner))
        )
    block.forward = again  # type: ignore[method-assign]


def _policy(n_inner: int) -> Callable[..., CheckpointPolicy]:
    """Return what to do with the result of an operation.

    The last product of the layer (out of the feed-forward's ``n_inner`` columns) is not kept: no
    gradient needs it, and computing again ends before it.
    """

    def decide(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_kept = op in _ATTENTION or op.name().startswith(_REDUCE_SCATTER)
        if op in _PRODUCTS:
            is_kept = args[_PRODUCTS[op]].shape[-1] != n_inner
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return decide
