"""What is computed again changes no bit of the training, and no more than the budget asks for."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.core.units import GIB
from puna.model.activations import Shape, head_bytes, layer_bytes
from puna.model.config import LlamaConfig
from puna.tokens.loader import NO_LABEL
from puna.train.batch import TensorBatch
from puna.train.config import MemoryConfig, ParallelConfig, TrainingConfig
from puna.train.memory import passes_alive, plan_recompute
from puna.train.parallel.layout import check_layout, plan_stages
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.world import World
from puna.train.precision import Precision
from tests.unit.batches import packed_batch

MODEL = LlamaConfig(
    vocab_size=37, dim=16, n_layers=3, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=32
)
WORLD = World(0, 1, torch.device("cpu"), 1, None)


def gradients(memory: MemoryConfig, dtype: torch.dtype) -> list[torch.Tensor]:
    model = ParallelModel(
        MODEL, 32, 2, 2, WORLD, ParallelConfig(), Precision(dtype, "test"), memory=memory
    )
    model.fill_random(0)
    loss = model.forward_backward(batch())
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [torch.tensor(loss), *found]  # type: ignore[list-item]


def batch() -> TensorBatch:
    found = packed_batch(MODEL.vocab_size, n_rows=4, seq_len=32)
    found.labels_BT[0, :9] = NO_LABEL
    return TensorBatch.of(found, WORLD.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(recompute="selective"),
        MemoryConfig(recompute="full"),
        MemoryConfig(recompute="full", every=2),
        MemoryConfig(budget_gib=1e-4),
    ],
)
def test_the_same_bits_whatever_is_computed_again(memory, dtype):
    for got, expected in zip(
        gradients(memory, dtype), gradients(MemoryConfig(), dtype), strict=True
    ):
        assert torch.equal(got, expected)


def plan(memory: MemoryConfig, pp_rank: int = 0, n_micro: int = 1, **parallel) -> list[str]:
    p = ParallelConfig(**parallel)
    found = plan_recompute(
        memory, MODEL.model_copy(update={"n_layers": 8}), p, plan_stages(p, 8), pp_rank, n_micro,
        Shape(64),
    )  # fmt: skip
    return list(found.values())


def test_every_nth_layer_of_the_model_is_computed_again_whatever_the_stages():
    memory = MemoryConfig(recompute="full", every=3)
    whole = plan(memory)
    assert whole == ["full" if layer % 3 == 0 else "none" for layer in range(8)]
    assert plan(memory, 0, pp=2) + plan(memory, 1, pp=2) == whole


def test_a_budget_counts_the_head_and_the_micro_batches_that_wait():
    layer = layer_bytes(MODEL, "none", Shape(64))
    first = plan(MemoryConfig(budget_gib=8 * layer / GIB), 0, 4, pp=2)
    last = plan(MemoryConfig(budget_gib=8 * layer / GIB), 1, 4, pp=2)
    assert first == ["none"] * 4  # two passes of four layers wait
    assert last == ["none"] * 4  # one pass, and the head
    assert "selective" in plan(MemoryConfig(budget_gib=(8 * layer - 1) / GIB), 0, 4, pp=2)
    head = head_bytes(MODEL, Shape(64))
    assert "selective" in plan(MemoryConfig(budget_gib=(4 * layer + head - 1) / GIB), 1, 4, pp=2)
    with pytest.raises(PunaError, match=r"memory\.budget_gib"):
        plan(MemoryConfig(budget_gib=1e-9))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("gpipe", [8, 8, 8, 8]), ("1f1b", [4, 3, 2, 1]), ("looped_bfs", [8, 8, 8, 8]),
     ("interleaved_1f1b", [6, 5, 4, 3])],
)  # fmt: skip
def test_how_many_micro_batches_wait(schedule, expected):
    parallel = ParallelConfig(pp=4, schedule=schedule)
    n_own = 1 if schedule in ("gpipe", "1f1b") else 2
    assert [passes_alive(parallel, rank, n_own, 8) for rank in range(4)] == expected


@pytest.mark.parametrize("memory", [{"recompute": "full"}, {"budget_gib": 1.0}])
def test_schedules_that_split_the_backward_pass_do_not_recompute(memory):
    cfg = TrainingConfig(
        steps=1, seq_len=32, global_batch=8, micro_batch=1, nproc=2,
        parallel=ParallelConfig(pp=2, schedule="zbv"), memory=MemoryConfig(**memory),
    )  # fmt: skip
    with pytest.raises(PunaError, match="zbv") as caught:
        check_layout(cfg, MODEL.model_copy(update={"n_layers": 4}))
    assert "interleaved_1f1b" in str(caught.value.fix)


def test_a_budget_and_a_rule_at_once_are_refused():
    with pytest.raises(ValidationError, match="either"):
        MemoryConfig(budget_gib=1.0, recompute="full")
