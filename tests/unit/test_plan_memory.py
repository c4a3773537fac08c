"""The planner's memory against what a small real model allocates on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.accounting import account
from puna.model.attention import plan_attention
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.model.rope import Rotation, RotationTable
from puna.plan.estimate import MEMORY_WIDTH, estimate
from puna.plan.fabric import Fabric
from puna.plan.hardware import find_gpu
from puna.plan.job import Job, Layout, check, find_model, workload_of_job
from puna.plan.memory import Memory, peak_memory, stage_memory
from puna.plan.search import recipe_section
from puna.plan.workload import stack
from puna.train.recompute import recompute

GROUPED = LlamaConfig(
    vocab_size=512, dim=128, n_layers=3, n_heads=8, n_kv_heads=2, ffn_dim=320, max_seq_len=1024
)
TIED = GROUPED.model_copy(update={"tie_embeddings": True})
ROWS, TOKENS = 2, 128
CPU = find_gpu("h100").model_copy(update={"fp32_tflops": 0.1})


def _memory(model: LlamaConfig, precision: str, **layout: object) -> Memory:
    job = Job.model_validate({
        "model": model, "gpu": CPU, "fabric": Fabric(), "n_gpus": 1,
        "layout": Layout.model_validate({"micro_batch": ROWS, **layout}), "seq_len": TOKENS,
        "global_batch": ROWS, "precision": precision,
    })  # fmt: skip
    return peak_memory(workload_of_job(job))


def _bytes(tensors: object) -> int:
    return sum(x.untyped_storage().nbytes() for x in {id(t): t for t in tensors}.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("config", [GROUPED, TIED], ids=["two tables", "tied"])
@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3"])
def test_states_are_what_a_real_step_allocates(config: LlamaConfig, sharding: str) -> None:
    """Weights, gradients and Adam's moments in float32, byte for byte."""
    torch.manual_seed(0)
    model = Llama(config)
    optimizer = torch.optim.AdamW(model.parameters())
    table = RotationTable(config).at(TOKENS, None, torch.device("cpu"))
    rows = torch.arange(TOKENS).expand(ROWS, TOKENS)
    x_BTC = model.tok_embeddings(rows)
    for block in model.layers:
        rotation = Rotation(table.cos[rows], table.sin[rows])
        x_BTC = block(x_BTC, rotation, plan_attention(TOKENS, torch.device("cpu")))
    torch.nn.functional.linear(model.norm(x_BTC), model.output_weight).sum().backward()
    optimizer.step()
    found = _memory(config, "fp32", sharding=sharding)
    assert found.weights == _bytes(model.parameters()) == 4 * account(config).n_params
    assert found.gradients == _bytes(p.grad for p in model.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    assert found.optimizer == _bytes(moments)


def _kept(config: LlamaConfig, dtype: torch.dtype, kind: str) -> int:
    """Bytes that autograd keeps of all layers, without the parameters."""
    model = Llama(config).to(dtype)
    table = RotationTable(config).at(TOKENS, None, torch.device("cpu"))
    rows = torch.arange(TOKENS).expand(ROWS, TOKENS)
    rotation = Rotation(table.cos[rows], table.sin[rows])
    known = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *rotation.wide]}
    seen: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            seen[x.untyped_storage().data_ptr()] = x
        return x

    x_BTC = torch.randn(ROWS, TOKENS, config.dim).to(dtype).requires_grad_()
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), mixed:
        for block in model.layers:
            recompute(block, kind)  # type: ignore[arg-type]
            x_BTC = block(x_BTC, rotation, plan_attention(TOKENS, torch.device("cpu")))
    return _bytes(seen.values())


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_activations_are_near_what_autograd_keeps(kind: str, precision: str, dtype: str) -> None:
    """Within the interval that an estimate of FSDP carries."""
    real = _kept(GROUPED, getattr(torch, dtype), kind)
    found = _memory(GROUPED, precision, recompute=kind)
    embedded = ROWS * TOKENS * GROUPED.dim * (4 if precision == "fp32" else 2)
    assert found.activations - embedded == pytest.approx(real, rel=MEMORY_WIDTH["fsdp"])


def _llama3(**layout: object) -> Job:
    """The 405B of Llama 3's Table 4, first row; 8 stages per rank are an assumption."""
    return Job.model_validate({
        "model": find_model("llama3.1-405b"), "gpu": find_gpu("h100"), "fabric": Fabric(),
        "n_gpus": 8192, "seq_len": 8192, "global_batch": 2048,
        "layout": Layout.model_validate({
            "tp": 8, "pp": 16, "chunks": 8, "schedule": "interleaved_1f1b", **layout,
        }),
    })  # fmt: skip


def test_fewer_layers_at_the_ends_move_memory_to_the_second_stage() -> None:
    even, less = _llama3(), _llama3(less_first=1, less_last=1)
    w = workload_of_job(less)
    stages = [stage_memory(w, float(stage)) for stage in range(16)]
    assert peak_memory(w).total == max(one.total for one in stages)
    assert peak_memory(w).total < peak_memory(workload_of_job(even)).total
    per_layer = stages[0].activations - stage_memory(w, 1.0).activations
    assert per_layer < 0  # seven layers with one micro-batch more are less than eight
    many = stack([w, workload_of_job(even)])
    both = [float(total) for total in peak_memory(many).total]
    assert both == [peak_memory(workload_of_job(job)).total for job in (less, even)]
    found = estimate(less)
    assert sum(stage["weights"] for stage in found.stages) > 0
    assert found.step_s.mid == pytest.approx(estimate(even).step_s.mid, rel=0.01)
    assert "less_first = 1" in recipe_section(less)


def test_layers_are_conserved() -> None:
    """Whatever the ends have less, all layers are somewhere."""
    for first, last, chunks in ((0, 0, 1), (1, 1, 8), (2, 0, 1), (1, 1, 1)):
        job = _llama3(
            less_first=first, less_last=last, chunks=chunks,
            schedule="interleaved_1f1b" if chunks > 1 else "1f1b",
        )  # fmt: skip
        w = workload_of_job(job)
        weights = sum(stage_memory(w, float(stage)).gradients for stage in range(16))
        assert weights == pytest.approx(4 * account(job.model).n_params / 8 / 64, rel=1e-3)


@pytest.mark.parametrize("layout", [{"less_first": 20}, {"pp": 1, "chunks": 1, "less_last": 1}])
def test_ends_without_layers_are_refused(layout: dict) -> None:
    job = _llama3(**{"schedule": "1f1b", "chunks": 1, **layout})
    with pytest.raises(PunaError, match="without layers"):
        check(job)
