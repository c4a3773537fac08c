"""How long a training step takes, part by part.

Units: seconds, bytes, FLOP/s. A multiply-add is two FLOPs. Formulas follow Korthikanti et al. 2022
(arXiv 2205.05198) for tensor and sequence parallelism and recomputation, Narayanan et al. 2021
(arXiv 2104.04473) for the pipeline, Rajbhandari et al. 2020 (ZeRO) and Zhao et al. 2023 (FSDP) for
sharded data parallelism, Dao 2023 for fused attention (backward 2.5 times forward), and Thakur et
al. 2005 for ring collectives. What no formula gives is fitted: :mod:`puna.plan.constants`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from puna.plan.constants import Constants
from puna.plan.ops import Num, Ops, ops_of
from puna.plan.workload import Workload

BWD = 2.0
"""Backward over forward of a product: the gradients of its input and of its weight."""
BWD_ATTN = 2.5
"""Backward over forward of fused attention, which computes the scores again (Dao 2023)."""
HIDEABLE = 0.8
"""Share of the compute that data-parallel communication can hide behind: not the first gather, not
the last reduction."""
ZERO_BUBBLE = 0.15
"""Share of the bubble that zero-bubble schedules leave (Qi et al. 2024, arXiv 2401.10241)."""
HOPPER_OLD_ATTN = 0.55
"""Share of the peak of attention kernels before Hopper's own, on Hopper against A100: 35 % against
about 63 % (Shah et al. 2024, arXiv 2407.08608)."""
BLACKWELL_ATTN = 0.8
"""The same of fused attention on Blackwell, whose exponentials did not speed up with its products:
an estimate."""
KERNELS = 12.0
"""Kernels of a layer's forward pass; its backward pass has twice as many."""
GAP = 3e-6
"""Seconds between two kernels that are queued in time."""
ALPHA_NVLINK, ALPHA_NETWORK = 4e-6, 12e-6
"""Latency of a collective per doubling of its ranks, seconds (NCCL's tuning tables: order of)."""


@dataclass(slots=True)
class StepTime:
    """Seconds of a step on the slowest pipeline rank; the parts sum to ``total``."""

    gemm: Num
    """Matrix products of layers and head."""
    attention: Num
    memory: Num
    """Memory-bound kernels, and waiting for the CPU to launch kernels."""
    recompute: Num
    """Forward computation done again."""
    tensor: Num
    """Exposed tensor-parallel communication."""
    context: Num
    """Exposed context-parallel communication."""
    pipeline: Num
    """Exposed sends between stages."""
    bubble: Num
    """Waiting for the pipeline to fill and to drain."""
    data: Num
    """Exposed gathers and reductions of data parallelism."""
    optimizer: Num
    jitter: Num
    """Waiting for the slowest node: of n normal values the largest lies sqrt(2 ln n) spreads up."""

    @property
    def total(self) -> Num:
        """Seconds of the step."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(f.name for f in fields(StepTime))


def scaled(time: StepTime, factor: float) -> StepTime:
    """Return all parts times a factor."""
    return StepTime(*(factor * getattr(time, name) for name in PARTS))


@dataclass(slots=True)
class _Layer:
    """Seconds of one layer and micro-batch, forward."""

    gemm: Num
    attention: Num
    memory: Num
    tensor: Num
    context: Num


def step_time(w: Workload, c: Constants) -> StepTime:
    """Predict the time of one optimiser step.

    Args:
        w: One job, or many; see :class:`Workload`.
        c: Fitted constants.

    Returns:
        Seconds per part, of the shape of the workload's fields.
    """
    o = ops_of(w.n_gpus)
    tokens = w.micro * w.seq / w.cp
    one = _forward(w, c, o, tokens)
    gemm = (1 + BWD) * one.gemm
    attention = (1 + o.where(w.flash, BWD_ATTN, BWD)) * one.attention
    memory = (1 + BWD) * one.memory
    # Op-level selective recomputation saves every other product and attention's output.
    again = (
        (w.full + 0.5 * w.sac) * one.gemm
        + (w.full + w.selective) * one.attention
        + (w.full + 0.7 * w.sac) * one.memory
    )
    tensor = (2 + w.full) * one.tensor
    gpu = gemm + attention + memory + again + tensor + 2 * one.context
    cpu = KERNELS * c.launch * (3 + w.full) * (1 - 0.8 * w.tuned)
    layer = (gpu**4 + cpu**4) ** 0.25  # a smooth maximum: whoever is slower sets the pace
    head_gemm, head_memory = _head(w, c, o, tokens)
    head = head_gemm + head_memory

    n_micro = o.maximum(w.batch / (w.dp * w.micro), 1.0)
    layers, heads = _slowest_stage(w, o, head / layer)
    pace = layers * layer + heads * head
    send = _send(w, c, o, tokens)
    # Fill and drain: one micro-batch through all the other stages (Narayanan et al. 2021).
    others = o.maximum(w.layers * layer + head - pace, 0.0)
    fill = (others + 2 * (w.pp - 1) * send) / w.chunks
    bubble = o.where(w.pp > 1, c.bubble * fill * (1 - (1 - ZERO_BUBBLE) * w.zero_bubble), 0.0)
    compute = n_micro * pace
    times = n_micro * layers
    params = params_per_rank(w)
    nodes = o.maximum(w.n_gpus / 8, 1.0)
    return StepTime(
        gemm=times * gemm + n_micro * heads * head_gemm,
        attention=times * attention,
        memory=times * (memory + layer - gpu) + n_micro * heads * head_memory,
        recompute=times * again,
        tensor=times * tensor,
        context=times * 2 * one.context,
        pipeline=o.where(w.pp > 1, n_micro * send, 0.0),
        bubble=bubble,
        data=_data(w, c, o, compute, n_micro),
        optimizer=c.c_opt * params / o.where(w.classic, 1.0, w.shard) / w.hbm + 2e-3,
        jitter=c.jitter * o.sqrt(2 * 0.693147 * o.log2(nodes)) * (compute + bubble),
    )


def params_per_rank(w: Workload) -> Num:
    """Parameters of one tensor and pipeline rank; with a pipeline, of a stage with one table."""
    h, f = w.dim, w.ffn
    layer = 2 * h * h + 2 * h * w.kv_dim + (2 + w.gated) * h * f
    tables = 1 + (w.pp <= 1) * (1 - w.tied)
    return (layer * w.layers / w.pp + w.vocab * h * tables) / w.tp


def _never(value: Num) -> bool:
    """Tell whether nothing was measured, for which a prediction should not pay."""
    return isinstance(value, float) and value == 0.0


def _efficiency(w: Workload, c: Constants, o: Ops) -> Num:
    """Share of the peak that a large bf16 product reaches on this GPU with this software."""
    if _never(w.gemm_rate):
        return _fitted_efficiency(w, c, o)
    return o.where(w.gemm_rate > 0, w.gemm_rate / w.peak, _fitted_efficiency(w, c, o))


def _fitted_efficiency(w: Workload, c: Constants, o: Ops) -> Num:
    gpu = o.where(w.is_a100, c.d_a100, o.where(w.is_blackwell, c.d_blackwell, 1.0))
    software = o.where(w.eager, c.d_eager, o.where(w.classic, c.d_classic, 1.0))
    return c.e_gemm * gpu * software * w.sustained


def _product(
    w: Workload, c: Constants, o: Ops, m: Num, n: Num, k: Num, rate: Num, width: Num
) -> Num:
    """Seconds of a product (m, k) x (k, n): its FLOPs, and its traffic that is not hidden.

    The additive roofline (Williams et al. 2009) gives the efficiency 1 / (1 + r (1/m + 1/n + 1/k)),
    r the ratio of FLOP/s to bytes/s. Tiles of 128 x 256 run in waves over the multiprocessors; a
    wave that is not full takes as long as a full one.
    """
    waves = m * n / (128 * 256 * w.sms)
    lost = 1 + c.wave * (o.ceil(waves) / waves - 1)
    flops, moved = 2 * m * n * k, width * (m * k + k * n + m * n)
    fitted = flops / rate * lost + c.roof * moved / w.hbm
    if _never(w.gemm_rate):
        return fitted
    measured = flops / rate + moved / o.maximum(w.gemm_bytes, 1.0) + w.gemm_call
    return o.where(w.gemm_rate > 0, measured, fitted)


def _forward(w: Workload, c: Constants, o: Ops, tokens: Num) -> _Layer:
    low = w.fp8 + w.mxfp8 + w.nvfp4
    factor = o.where(w.nvfp4, c.x_nvfp4, o.where(w.mxfp8, c.x_mxfp8, o.where(w.fp8, c.x_fp8, 1.0)))
    factor = factor * o.where(low * w.is_blackwell, c.d_low, 1.0)
    rate = w.peak_low * _efficiency(w, c, o) * factor
    width = 2.0 - low - 0.5 * w.nvfp4 + 2 * w.fp32
    h, f, inner = w.dim, w.ffn / w.tp, w.dim / w.tp
    gemm = (
        _product(w, c, o, tokens, inner + 2 * w.kv_dim / w.tp, h, rate, width)
        + _product(w, c, o, tokens, h, inner, rate, width)
        + _product(w, c, o, tokens, f * (1 + w.gated), h, rate, width)
        + _product(w, c, o, tokens, h, f, rate, width)
    )
    # Without sequence parallelism, norms and residuals are computed by every tensor rank.
    spread = o.where(w.sp, w.tp, 1 + 0.5 * (w.tp - 1))
    passes = c.c_mem * o.where(w.eager, c.c_eager, 1.0)
    touched = passes * (h / spread + 0.5 * f) + low * c.c_cast * (2 * h / spread + inner + f)
    element = 2 + 2 * w.fp32
    stream = element * tokens * h
    # Four collectives per layer and pass: two gathers and two reductions (an all-reduce is both).
    tensor = 4 * _ring(o, stream, w.tp, *_links(w, c, o, w.tp, 1.0))
    keys_values = 2 * element * tokens * w.cp * w.kv_dim / w.tp
    context = 0.5 * _ring(o, keys_values, w.cp, *_links(w, c, o, w.cp, w.tp))
    return _Layer(
        gemm,
        _attention(w, c, o),
        element * tokens * touched / w.hbm + KERNELS * GAP * (1 + w.eager),
        tensor * o.where(w.sp * w.tuned, c.tp_open, 1.0),
        context,
    )


def _attention(w: Workload, c: Constants, o: Ops) -> Num:
    """Seconds of attention's core, forward, one layer and micro-batch.

    Fused (Dao 2023): 2 b s^2 h FLOPs, as the causal half is skipped. Not fused: all of it, and the
    scores (b, heads, s, s) pass through memory several times.
    """
    square = w.micro * w.seq * w.seq / (w.cp * w.tp)
    old = c.e_attn_eager * o.where(w.is_a100, 1.0, HOPPER_OLD_ATTN)
    share = o.where(w.eager, old, c.e_attn * o.where(w.is_blackwell, BLACKWELL_ATTN, 1.0))
    head_dim = w.dim / w.heads
    narrow = o.minimum(1.0, (head_dim / 128) ** 0.15)
    fused = 2 * square * w.dim / (w.peak * share * narrow * w.sustained)
    traffic = c.roof * 4 * (1 + head_dim / w.seq) + c.c_score * 2
    rate = w.peak * _efficiency(w, c, o)
    return o.where(
        w.flash, fused, 4 * square * w.dim / rate + traffic * square * w.heads / w.hbm
    )  # fmt: skip


def _head(w: Workload, c: Constants, o: Ops, tokens: Num) -> tuple[Num, Num]:
    """Seconds of the output head and the loss, both passes: products, memory."""
    vocab = w.vocab / w.tp
    rate = w.peak * _efficiency(w, c, o)
    gemm = (1 + BWD) * _product(w, c, o, tokens, vocab, w.dim, rate, 2 + 2 * w.fp32)
    return gemm, (24.0 + 24.0 * w.eager) * tokens * vocab / w.hbm  # bytes per logit


def _slowest_stage(w: Workload, o: Ops, head: Num) -> tuple[Num, Num]:
    """Layers, and heads (0 or 1), of the pipeline rank that takes longest.

    Layers that do not divide leave room on the last rank, where the head then fits in (Llama 3 and
    MLPerf take one layer from the first and the last stage).

    Args:
        w: The jobs.
        o: Their arithmetic.
        head: Time of the head, in layers.
    """
    less = w.less_first + w.less_last
    most = o.ceil((w.layers + less) / (w.pp * w.chunks)) * w.chunks
    last = o.maximum(w.layers - most * (w.pp - 1) + w.less_first, 0.0)
    most = most - o.where(w.pp > 2, 0.0, w.less_first)  # two ranks: the first one alone
    alone = w.pp <= 1
    at_head = o.where(alone, True, last + head > most)
    return o.where(alone, w.layers, o.where(at_head, last, most)), o.where(at_head, 1.0, 0.0)


def _links(w: Workload, c: Constants, o: Ops, size: Num, stride: Num) -> tuple[Num, Num]:
    """Bus bandwidth (bytes/s) and latency (s) of a group of ``size`` ranks, ``stride`` apart.

    Inside a domain a group has NVLink. Across domains its ring is as fast as the NICs of its local
    ranks together: a group that fills a node has all of the node's NICs.
    """
    inside = size * stride <= w.domain
    local = o.maximum(o.minimum(size, w.domain / stride), 1.0)
    fast, alpha = w.nvlink * c.e_nvl, ALPHA_NVLINK
    if not _never(w.link):
        fast = o.where(w.link > 0, w.link, fast)
        alpha = o.where(w.link > 0, w.link_alpha, alpha)
    slow = o.minimum(fast, w.nic * c.e_net * local)
    return o.where(inside, fast, slow), o.where(inside, alpha, ALPHA_NETWORK)


def _ring(o: Ops, n_bytes: Num, size: Num, bandwidth: Num, alpha: Num) -> Num:
    """Seconds of an all-gather or reduce-scatter whose result (input) has ``n_bytes``."""
    return n_bytes * (size - 1) / size / bandwidth + alpha * o.log2(size)


def _send(w: Workload, c: Constants, o: Ops, tokens: Num) -> Num:
    """Exposed seconds of the sends of one micro-batch and rank, both passes."""
    n_bytes = (2 + 2 * w.fp32) * tokens * w.dim / o.where(w.sp + w.classic, w.tp, 1.0)
    inside = w.n_gpus <= w.domain
    fast = w.nvlink * c.e_nvl if _never(w.link) else o.where(w.link > 0, w.link, w.nvlink * c.e_nvl)
    bandwidth = o.where(inside, fast, w.nic * c.e_net)
    return c.p2p_open * w.chunks * 2 * n_bytes / bandwidth


def _data(w: Workload, c: Constants, o: Ops, compute: Num, n_micro: Num) -> Num:
    """Exposed seconds of data parallelism.

    Sharded optimiser: one reduce-scatter of float32 gradients and one gather of bf16 parameters.
    ZeRO-3 gathers for each pass and reduces, all in bf16, for each micro-batch. HSDP adds an
    all-reduce of the shards over the copies. Megatron-LM of 2021 all-reduces float32 gradients
    after the last backward pass and hides nothing.
    """
    params = params_per_rank(w)
    size = w.dp * w.cp
    layers = w.layers / w.pp
    bandwidth, alpha = _links(w, c, o, w.shard, w.tp)
    across, alpha_across = _links(w, c, o, size, w.tp)
    copies = size / w.shard
    copied = _ring(o, 8 * params / w.shard, copies, across, alpha_across)
    once = _ring(o, 6 * params, w.shard, bandwidth, alpha * layers) + copied
    each = _ring(o, 6 * params, w.shard, bandwidth, 3 * alpha * layers)
    plain = _ring(o, 8 * params, size, across, alpha_across)
    sharded = o.where(w.fsdp3, n_micro * each + copied, once)
    hideable = o.where(w.fsdp3, compute, compute / n_micro)
    felt = c.dp_open * o.minimum(sharded, hideable)
    exposed = o.maximum(sharded - HIDEABLE * hideable, 0.0) + felt
    return o.where(size > 1, o.where(w.classic, plain, exposed), 0.0)
