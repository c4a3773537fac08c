"""A training job as a user describes it, checked, and turned into the numbers of the cost model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.model.config import PRESETS, LlamaConfig
from puna.plan.fabric import Fabric
from puna.plan.hardware import Gpu
from puna.plan.workload import Workload

Precision = Literal["bf16", "fp8", "mxfp8", "nvfp4", "fp32"]
Recompute = Literal["none", "selective", "sac", "full"]
Sharding = Literal["zero1", "zero2", "zero3"]
Schedule = Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble"]
Software = Literal["plain", "tuned"]


class Layout(Config):
    """How the GPUs share the work of a step."""

    tp: int = Field(default=1, ge=1)
    """Ranks that share each matrix; with sequence parallelism between the matrices."""
    cp: int = Field(default=1, ge=1)
    """Ranks that share the tokens of a row."""
    pp: int = Field(default=1, ge=1)
    """Ranks that share the layers."""
    replicate: int = Field(default=1, ge=1)
    """Copies of the sharded states (HSDP)."""
    schedule: Schedule = "1f1b"
    """Order of the micro-batches in the pipeline."""
    chunks: int = Field(default=1, ge=1)
    """Stages per pipeline rank; more than one for the schedules that interleave."""
    less_first: int = Field(default=0, ge=0)
    """Layers that the first pipeline rank has less than its equal share (Llama 3 405B: 1)."""
    less_last: int = Field(default=0, ge=0)
    """The same of the last one; what does not divide is missing there in any case."""
    sharding: Sharding = "zero2"
    """`zero1`: optimiser sharded (Megatron's); `zero2`: FSDP that keeps gathered weights; `zero3`:
    FSDP that gathers for every pass."""
    micro_batch: int = Field(default=1, ge=1)
    """Rows per forward pass of a data-parallel rank."""
    recompute: Recompute = "none"
    """What the backward pass computes again: nothing, attention's core, cheap operations and every
    other product, everything."""


class Job(Config):
    """Model, hardware and layout of a training."""

    model: LlamaConfig
    gpu: Gpu
    fabric: Fabric
    n_gpus: int = Field(ge=1)
    """All GPUs."""
    layout: Layout
    seq_len: int = Field(ge=2)
    """Tokens per row."""
    global_batch: int = Field(ge=1)
    """Rows per step, all GPUs."""
    precision: Precision = "bf16"
    """Format of the layers' products; head and attention stay in bf16. `fp32`: all in float32."""
    software: Software = "plain"
    """`tuned`: a vendor's configuration that overlaps tensor-parallel communication and launches
    kernels by CUDA graphs."""

    @property
    def ranks_per_replica(self) -> int:
        """Tensor times context times pipeline ranks."""
        return self.layout.tp * self.layout.cp * self.layout.pp

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.n_gpus // self.ranks_per_replica

    @property
    def n_micro(self) -> int:
        """Micro-batches of a step and data-parallel rank."""
        return self.global_batch // (self.dp * self.layout.micro_batch)


def find_model(name: str) -> LlamaConfig:
    """Return a preset, or the model of a Hugging Face ``config.json``.

    Args:
        name: A preset of ``puna model list``, or the path of a file or of its folder.

    Raises:
        PunaError: Unknown preset; the file is missing, is no JSON or is no Llama.
    """
    path = Path(name)
    if not (name.endswith(".json") or path.is_dir()):
        return PRESETS.get(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        heads = int(values["num_attention_heads"])
        return LlamaConfig(
            vocab_size=values["vocab_size"], dim=values["hidden_size"],
            n_layers=values["num_hidden_layers"], n_heads=heads,
            n_kv_heads=values.get("num_key_value_heads") or heads,
            ffn_dim=values["intermediate_size"],
            max_seq_len=values.get("max_position_embeddings", 8192),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        )  # fmt: skip
    except json.JSONDecodeError as error:
        raise PunaError(f"{path}: not JSON: {error}", "give a Hugging Face config.json") from error
    except KeyError as error:
        raise PunaError(
            f"{path}: {error.args[0]} is missing", "give a Llama's config.json"
        ) from error
    except (TypeError, ValueError) as error:
        raise PunaError(f"{path}: {error}", "give a Llama's config.json") from error


def problems(job: Job) -> Iterator[PunaError]:
    """Yield what keeps a layout from running, each with the nearest that works."""
    lay, model = job.layout, job.model
    sizes = {"n_heads": model.n_heads, "n_kv_heads": model.n_kv_heads, "ffn_dim": model.ffn_dim}
    for name, size in sizes.items():
        if size % lay.tp:
            fitting = _nearest(lay.tp, lambda n: not any(x % n for x in sizes.values()))
            yield PunaError(
                f"tp = {lay.tp} does not divide the model's {name} = {size}",
                f"use tp = {fitting}",
            )
    ranks = job.ranks_per_replica
    if job.n_gpus % ranks:
        down, up = job.n_gpus // ranks * ranks, (job.n_gpus // ranks + 1) * ranks
        yield PunaError(
            f"{job.n_gpus} GPUs are no multiple of tp * cp * pp = {ranks}",
            f"use {f'{down} or ' if down else ''}{up} GPUs",
        )
        return
    states = job.dp * lay.cp
    if states % lay.replicate:
        yield PunaError(
            f"replicate = {lay.replicate} does not divide the {states} data-parallel ranks",
            f"use replicate = {_nearest(lay.replicate, lambda n: states % n == 0)}",
        )
    rows = job.dp * lay.micro_batch
    if job.global_batch % rows:
        down, up = job.global_batch // rows * rows, (job.global_batch // rows + 1) * rows
        yield PunaError(
            f"global_batch = {job.global_batch} is no multiple of the {job.dp} data-parallel ranks "
            f"times micro_batch = {lay.micro_batch}",
            f"use global_batch = {f'{down} or ' if down else ''}{up}",
        )
    pieces = lay.tp * (2 * lay.cp if lay.cp > 1 else 1)
    if job.seq_len % pieces:
        down = max(job.seq_len // pieces, 1) * pieces
        yield PunaError(
            f"seq_len = {job.seq_len} does not divide into the {pieces} pieces of tp and cp",
            f"use seq_len = {down} or {down + pieces}",
        )
    yield from _pipeline_problems(job)
    if job.precision != "bf16" and not _peak(job):
        yield PunaError(f"{job.gpu.name} has no {job.precision}", "use precision bf16")


def _pipeline_problems(job: Job) -> Iterator[PunaError]:
    lay = job.layout
    stages = lay.pp * lay.chunks
    if stages > job.model.n_layers + 2:  # the first may hold the embedding alone, the last the head
        yield PunaError(
            f"pp = {lay.pp} with {lay.chunks} stages per rank is more than the model's "
            f"{job.model.n_layers} layers",
            f"use pp * chunks of at most {job.model.n_layers + 2}",
        )
    if lay.chunks > 1 and (lay.pp == 1 or lay.schedule == "1f1b"):
        yield PunaError(
            f"chunks = {lay.chunks} needs a pipeline that interleaves (pp = {lay.pp}, "
            f"schedule = {lay.schedule})",
            "use pp above 1 with the schedule interleaved_1f1b, or chunks = 1",
        )
    less = lay.less_first + lay.less_last
    most = -(-(job.model.n_layers + less) // stages) * lay.chunks
    if less and (lay.pp == 1 or max(lay.less_first, lay.less_last) > most):
        yield PunaError(
            f"less_first = {lay.less_first} and less_last = {lay.less_last} leave a pipeline rank "
            f"without layers (pp = {lay.pp}, at most {most} layers each)",
            f"use at most {most}" if lay.pp > 1 else "leave them at 0 without a pipeline",
        )
    if lay.pp > 1 and job.n_micro < lay.pp:
        rows = job.dp * lay.micro_batch * lay.pp
        yield PunaError(
            f"a step has {job.n_micro} micro-batches per data-parallel rank; a pipeline of "
            f"{lay.pp} ranks needs at least as many",
            f"use global_batch = {rows}, or fewer pipeline ranks",
        )


def check(job: Job) -> None:
    """Refuse a layout that cannot run.

    Raises:
        PunaError: The first problem, with the nearest layout that works.
    """
    for problem in problems(job):
        raise problem


def workload_of_job(job: Job, nic: Literal["mid", "low", "high"] = "mid") -> Workload:
    """Return the numbers of a job, as floats.

    Args:
        job: The job; :func:`check` it first.
        nic: The prior of the fabric, or an end of its range.
    """
    m, lay, gpu = job.model, job.layout, job.gpu
    states = job.dp * lay.cp
    wide = job.precision == "fp32"
    return Workload(
        n_gpus=float(job.n_gpus), layers=float(m.n_layers), dim=float(m.dim),
        ffn=float(m.ffn_dim), heads=float(m.n_heads), kv_dim=float(m.kv_dim),
        vocab=float(m.vocab_size), gated=1.0, tied=float(m.tie_embeddings),
        seq=float(job.seq_len), batch=float(job.global_batch), micro=float(lay.micro_batch),
        tp=float(lay.tp), pp=float(lay.pp), cp=float(lay.cp), dp=float(job.dp),
        shard=states / lay.replicate, chunks=float(lay.chunks),
        zero_bubble=float(lay.schedule == "interleaved_zero_bubble"),
        fsdp2=float(lay.sharding == "zero2"), fsdp3=float(lay.sharding == "zero3"),
        sp=float(lay.tp > 1), full=float(lay.recompute == "full"),
        selective=float(lay.recompute == "selective"), sac=float(lay.recompute == "sac"),
        flash=1.0, fp8=float(job.precision == "fp8"), mxfp8=float(job.precision == "mxfp8"),
        nvfp4=float(job.precision == "nvfp4"), eager=0.0, tuned=float(job.software == "tuned"),
        classic=0.0, peak=(gpu.fp32_tflops if wide else gpu.bf16_tflops) * 1e12,
        peak_low=_peak(job) * 1e12,
        hbm=gpu.hbm_tb_s * 1e12, hbm_bytes=gpu.memory_gib * 2**30, sustained=gpu.sustained,
        sms=float(gpu.sms), nvlink=gpu.nvlink_gb_s * 1e9, domain=float(gpu.domain),
        nic=job.fabric.nic(job.n_gpus, nic), is_a100=float(gpu.family == "ampere"),
        is_blackwell=float(gpu.family == "blackwell"), is_other=float(gpu.family == "other"),
        less_first=float(lay.less_first), less_last=float(lay.less_last), fp32=float(wide),
        **_measured(job),
    )  # fmt: skip


def _measured(job: Job) -> dict[str, float]:
    """Return what was measured of the GPU, as fields of a workload."""
    measured = job.gpu.measured
    if measured is None:
        return {}
    products, link = measured.products(job.precision), measured.link()
    found = {"gemm_rate": products.tflops * 1e12, "gemm_bytes": products.gb_s * 1e9}
    if measured.device == "cpu":  # a GPU's calls are queued while it computes
        found["gemm_call"] = products.call_s
    if link is not None:
        alpha = link.latency_s / max(math.log2(link.n_ranks), 1.0)
        found |= {"link": link.bus_gb_s * 1e9, "link_alpha": alpha}
    return found


def _peak(job: Job) -> float:
    """Return the dense TFLOPS of the products' format; 0 when the GPU has none."""
    if job.precision in ("bf16", "fp32"):
        return job.gpu.bf16_tflops if job.precision == "bf16" else job.gpu.fp32_tflops
    return job.gpu.fp4_tflops if job.precision == "nvfp4" else job.gpu.fp8_tflops


def _nearest(limit: int, works: Callable[[int], bool]) -> str:
    return " or ".join(str(n) for n in range(1, limit) if works(n)) or "1"
