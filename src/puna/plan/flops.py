"""FLOPs of a training token, and what the published conventions make of them.

One convention is used everywhere and named with every number: that of ``puna.model.accounting``
(matrix products only, training = 3 forwards, no causal discount, nothing that is recomputed). The
others are ratios to it.
"""

from __future__ import annotations

from puna.model.accounting import FLOPS_CONVENTION
from puna.plan.ops import Num
from puna.plan.workload import Workload

CONVENTION = FLOPS_CONVENTION
CONVENTIONS = {
    "model": "as above",
    "causal": "attention counted for the visible half only (Llama 3, Megatron-LM since 2024)",
    "hardware": "with what is recomputed (HFU; Megatron-LM 2021 with full recomputation)",
    "6nd": "6 x parameters x tokens, no attention",
}


def flops_per_token(w: Workload, convention: str = "model") -> Num:
    """Return the FLOPs of one token, forward and backward.

    Args:
        w: One job or many.
        convention: A key of ``CONVENTIONS``.

    Raises:
        ValueError: Unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}")
    layer = 2 * w.dim * w.dim + 2 * w.dim * w.kv_dim + (2 + w.gated) * w.dim * w.ffn
    head = w.vocab * w.dim
    products = 2 * (w.layers * layer + head)
    attention = 4 * w.layers * w.dim * w.seq
    if convention == "causal":
        return 3 * (products + attention * (w.seq + 1) / (2 * w.seq))
    if convention == "hardware":
        again = w.full * (2 * w.layers * layer + attention) + w.selective * attention
        return 3 * (products + attention) + again + w.sac * 0.5 * 2 * w.layers * layer
    if convention == "6nd":
        norms = (2 * w.layers + 1) * w.dim
        return 6 * (w.layers * layer + head * (2 - w.tied) + norms)
    return 3 * (products + attention)


def tflops_per_gpu(w: Workload, step_s: Num, convention: str = "model") -> Num:
    """Return 10**12 FLOP/s of one GPU at a step time.

    Args:
        w: One job or many.
        step_s: Seconds of a step.
        convention: A key of ``CONVENTIONS``.
    """
    return flops_per_token(w, convention) * w.batch * w.seq / (step_s * w.n_gpus) / 1e12
