"""How much memory a training takes on one GPU, part by part and per pipeline stage. Nothing fitted.

Units: bytes. Activations follow Korthikanti et al. 2022 (arXiv 2205.05198), rewritten for SwiGLU,
grouped heads and fused attention; states follow ZeRO (Rajbhandari et al. 2020) with bf16 weights,
float32 gradients and a float32 master copy; the pipeline's micro-batches in flight follow Narayanan
et al. 2021. Memory outside PyTorch's allocator (CUDA context, NCCL: 1 to 3 GiB) is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from puna.plan.ops import Num, Ops, ops_of
from puna.plan.workload import Workload

FRAGMENTS_FSDP = 0.05
"""Reserved but unusable memory under FSDP, whose buffers come and go in many sizes."""


@dataclass(slots=True)
class Memory:
    """Peak bytes of one GPU; the parts sum to ``total``."""

    weights: Num
    gradients: Num
    optimizer: Num
    activations: Num
    """Kept between forward and backward pass, of all micro-batches in flight."""
    logits: Num
    """Output head and loss at the peak."""
    buffers: Num
    """Gathered weights, gradients of one layer on their way, recomputed activations."""
    fragments: Num

    @property
    def total(self) -> Num:
        """Bytes at the peak."""
        return sum(getattr(self, name) for name in MEMORY_PARTS)


MEMORY_PARTS = tuple(f.name for f in fields(Memory))


def peak_memory(w: Workload) -> Memory:
    """Return the memory of the fullest pipeline stage: the first, the last, or the second."""
    o = ops_of(w.n_gpus)
    fullest = _fuller(o, stage_memory(w, 0.0), stage_memory(w, w.pp - 1))
    if isinstance(w.less_first, float) and w.less_first == 0.0:
        return fullest  # earlier stages hold more micro-batches, and none has more layers
    return _fuller(o, fullest, stage_memory(w, o.minimum(1.0, w.pp - 1)))


def _fuller(o: Ops, a: Memory, b: Memory) -> Memory:
    fuller = a.total >= b.total
    return Memory(*(o.where(fuller, getattr(a, name), getattr(b, name)) for name in MEMORY_PARTS))


def stage_memory(w: Workload, stage: Num) -> Memory:
    """Return the peak memory of a GPU of one pipeline stage.

    Args:
        w: One job or many.
        stage: From 0; float or array.
    """
    o = ops_of(w.n_gpus)
    is_first, is_last = stage <= 0, stage >= w.pp - 1
    layers = _layers(w, o, is_first, is_last)
    h, f = w.dim, w.ffn
    layer = (2 * h * h + 2 * h * w.kv_dim + (2 + w.gated) * h * f + 2 * h) / w.tp
    table = w.vocab * h / w.tp
    tables = o.where(is_first, table, 0.0) + o.where(
        is_last, o.where(w.pp <= 1, (1 - w.tied) * table, table), 0.0
    )
    params = layers * layer + tables + o.where(is_last, h, 0.0)
    tokens = w.micro * w.seq / w.cp
    sp = o.where(w.sp, w.tp, 1.0)
    per_layer = _activations(w, o, tokens, sp)
    activations = _in_flight(w, o, stage) * layers * per_layer
    activations = activations + o.where(is_first, (2 + 2 * w.fp32) * tokens * h / sp, 0.0)
    weights, gradients, optimizer = _states(w, o, params)
    logits, buffers = _transient(w, o, tokens, is_last, layer, table)
    parts = (weights, gradients, optimizer, activations, logits, buffers)
    return Memory(*parts, o.where(_modules(w), FRAGMENTS_FSDP, 0.0) * sum(parts))


def _layers(w: Workload, o: Ops, is_first: Num, is_last: Num) -> Num:
    """Layers of a stage; the last one has what is left."""
    less = w.less_first + w.less_last
    most = o.minimum(o.ceil((w.layers + less) / (w.pp * w.chunks)) * w.chunks, w.layers)
    last = o.maximum(w.layers - most * (w.pp - 1) + w.less_first, 0.0)
    return o.where(is_last, last, o.where(is_first, most - w.less_first, most))


def _states(w: Workload, o: Ops, params: Num) -> tuple[Num, Num, Num]:
    """Bytes of weights, gradients, and optimiser (Adam's moments, master copy).

    Megatron's distributed optimiser shards 12 bytes per parameter; plain data parallelism none;
    FSDP all 16, but ZeRO-2 keeps the gathered bf16 weights through the step.
    """
    shard = o.maximum(w.shard, 1.0)
    sharded = w.fsdp2 + w.fsdp3
    # In float32 and unsharded, the weights are their own working copy.
    working = o.where(w.fp32, o.where(shard > 1, 4.0, 0.0), 2.0)
    weights = o.where(
        sharded, 4 * params / shard + working * params * w.fsdp2, (2 + 2 * w.fp32) * params
    )  # fmt: skip
    gradients = o.where(sharded, 4 * params / shard, 4 * params)
    optimizer = o.where(
        sharded, 8 * params / shard,
        (12 - 4 * w.fp32) * params / o.where(w.classic, 1.0, shard),
    )  # fmt: skip
    return weights, gradients, optimizer


def _activations(w: Workload, o: Ops, tokens: Num, sp: Num) -> Num:
    """Bytes that one layer keeps of one micro-batch.

    Fused kernels (bf16): input and output of both norms, 8h; queries, keys, values and attention's
    output, 4h + 4 kv; gate, up and their product, 6f, or 4f for GELU. PyTorch modules under FSDP
    also keep the activation's output, and keys and values repeated for all heads. Scores that are
    written: 5 heads s per token (Korthikanti et al. 2022, with masks and inputs of dropout).
    """
    h, f, kv, tp = w.dim, w.ffn, w.kv_dim, w.tp
    modules = _modules(w)
    feed = (4 + 2 * w.gated + 2 * modules) * f
    heads = 4 * h + 4 * (kv + modules * (h - kv))
    statistics = 4 * w.heads  # float32 in any case
    scores = o.where(w.flash, 0.0, (1 - w.selective) * 5 * w.heads * w.seq)
    dropout = 2 * (1 - w.flash) * h  # masks of both residual branches, one byte each
    wide = 1 + w.fp32
    every = tokens * (
        (8 * h * wide + dropout) / sp + ((heads + feed + scores) * wide + statistics) / tp
    )
    # Op-level selective: block input, attention's output, every other product.
    some = wide * tokens * (4 * h / sp + (4 * h + 2 * kv + 2 * f) / tp)
    inputs = wide * 2 * tokens * h / sp
    return o.where(w.full, inputs, o.where(w.sac, some, every))


def _modules(w: Workload) -> Num:
    """1: PyTorch's modules under FSDP; 0: fused kernels and loss (Megatron-LM, tuned FSDP)."""
    return (w.fsdp2 + w.fsdp3) * (1 - w.tuned) * (1 - w.classic)


def _in_flight(w: Workload, o: Ops, stage: Num) -> Num:
    """Micro-batches whose activations a stage holds: 1F1B, interleaved by chunks."""
    n_micro = o.maximum(w.batch / (w.dp * w.micro), 1.0)
    deep = w.pp - stage + o.where(w.chunks > 1, (w.pp - 1 - stage) / w.chunks, 0.0)
    return o.where(w.pp > 1, o.minimum(deep, n_micro), 1.0)


def _transient(
    w: Workload, o: Ops, tokens: Num, is_last: Num, layer: Num, table: Num
) -> tuple[Num, Num]:
    """Bytes of the loss, and of buffers, at whichever moment of the backward pass needs more.

    In the head: float32 logits (fused loss: 4 bytes; PyTorch's: log-softmax, its gradient and that
    of its input, 12) and the head's gradient. In the last layer: the feed-forward's gradients, the
    first in float32, and under FSDP two layers gathered and one reduced.
    """
    h, f = w.dim, w.ffn
    sharded = w.fsdp2 + w.fsdp3
    stream = 4 * (2 + 2 * w.fp32) * tokens * h
    loss = o.where(is_last, o.where(_modules(w), 12.0, 4.0) * tokens * w.vocab / w.tp, 0.0)
    head = o.where(is_last, o.where(sharded, 8.0, 2.0) * table, 0.0)
    gathered = o.where(w.fsdp3, 2 * (2 + 2 * w.fp32) * layer, 0.0)
    gathered = o.where(w.fp32 * (w.shard <= 1), 0.0, gathered)
    layer_grad = o.where(sharded, 6 * layer, 5 * (1 + w.gated) * h * f / w.tp)
    # A layer that is recomputed holds for a moment all that it would have kept.
    whole = 12 * h + 4 * w.kv_dim + 6 * f
    again = o.where(w.full + w.sac, (1 + w.fp32) * tokens * whole / w.tp, 0.0)
    in_head = loss + head + stream
    in_layer = layer_grad + head + stream + again
    logits = o.where(in_head >= in_layer, loss, 0.0)
    return logits, o.where(in_head >= in_layer, head + stream, in_layer) + gathered
