"""The numbers of a training step that the cost model reads: one job, or many side by side.

Every field is a float, or an array of shape (N,) with one value per job. Categories are flags
(0 or 1). Nothing measured is in here: no time, no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from puna.plan.ops import Num


@dataclass(slots=True)
class Workload:
    """Model, layout, hardware and software of a step."""

    n_gpus: Num
    """GPUs of the whole job."""
    layers: Num
    dim: Num
    """Width of the residual stream."""
    ffn: Num
    """Width inside the feed-forward."""
    heads: Num
    kv_dim: Num
    """Width of keys (and values) of a token."""
    vocab: Num
    gated: Num
    """1: SwiGLU (three matrices), 0: GELU (two)."""
    tied: Num
    """1: the head is the embedding."""
    seq: Num
    """Tokens per row."""
    batch: Num
    """Rows per step, all GPUs."""
    micro: Num
    """Rows per micro-batch."""
    tp: Num
    pp: Num
    cp: Num
    dp: Num
    """Data-parallel ranks: n_gpus / (tp * pp * cp)."""
    shard: Num
    """Ranks among which states are sharded (HSDP: fewer than dp * cp)."""
    chunks: Num
    """Stages per pipeline rank (interleaving)."""
    zero_bubble: Num
    """1: backward of weights fills the bubble."""
    fsdp2: Num
    """1: parameters, gradients and optimiser sharded, gathered once per step (ZeRO-2)."""
    fsdp3: Num
    """1: as fsdp2, gathered for every pass of every micro-batch (ZeRO-3)."""
    sp: Num
    """1: sequence parallel between the matrices of a tensor-parallel group."""
    full: Num
    """1: recompute everything."""
    selective: Num
    """1: recompute attention's core."""
    sac: Num
    """1: recompute cheap operations and every other product (op-level selective)."""
    flash: Num
    """1: fused attention; 0: scores are written to memory."""
    fp8: Num
    mxfp8: Num
    nvfp4: Num
    """1: products in this format; all 0: bf16."""
    eager: Num
    """1: PyTorch modules one by one (FSDP of 2023); 0: fused kernels."""
    tuned: Num
    """1: a vendor's tuned configuration: tensor-parallel communication overlapped, CUDA graphs."""
    classic: Num
    """1: Megatron-LM of 2021-22: no overlap, plain data parallel."""
    peak: Num
    """Dense bf16 FLOP/s of one GPU."""
    peak_low: Num
    """Dense FLOP/s in the format of the products."""
    hbm: Num
    """Bytes/s of the GPU's memory."""
    hbm_bytes: Num
    """Bytes of the GPU's memory."""
    sustained: Num
    """Share of the efficiency that the GPU's power limit leaves; 1 at its full power."""
    sms: Num
    """Multiprocessors of the GPU."""
    nvlink: Num
    """Bytes/s per direction inside a domain."""
    domain: Num
    """GPUs of an NVLink domain."""
    nic: Num
    """Bytes/s of the network per GPU, after load balancing and oversubscription."""
    is_a100: Num
    is_blackwell: Num
    is_other: Num
    """1: none of A100, Hopper, Blackwell."""
    less_first: Num = 0.0
    """Layers that the first pipeline rank has less than the others, for the embedding's memory."""
    less_last: Num = 0.0
    """Layers that the last pipeline rank has less, for the head; beside what does not divide."""
    fp32: Num = 0.0
    """1: everything in float32 (CPUs without bf16)."""
    gemm_rate: Num = 0.0
    """Measured FLOP/s of large bf16 (or float32) products; 0: by the fitted efficiency."""
    gemm_bytes: Num = 0.0
    """Measured bytes/s of their operands and results."""
    gemm_call: Num = 0.0
    """Measured seconds of a call of a product that computes nothing (CPUs)."""
    link: Num = 0.0
    """Measured bus bandwidth inside a domain, bytes/s; 0: by the fitted share of NVLink."""
    link_alpha: Num = 0.0
    """Measured latency inside a domain per doubling of the ranks, seconds."""

    def take(self, index: np.ndarray) -> Workload:
        """Return some of the jobs; every field must be an array."""
        return Workload(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def stack(jobs: list[Workload]) -> Workload:
    """Return jobs of floats side by side, as arrays of shape (N,)."""
    return Workload(
        **{
            f.name: np.array([getattr(job, f.name) for job in jobs], dtype=np.float64)
            for f in fields(Workload)
        }
    )
