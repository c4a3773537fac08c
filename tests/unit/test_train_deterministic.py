"""Two runs are the same bits, and splits of the batch the same gradient up to stated rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from puna.core.fsio import hash_file
from puna.core.ledger import Ledger
from puna.resilience.heartbeat import HeartbeatWriter
from puna.tokens.loader import NO_LABEL
from puna.train.batch import TensorBatch
from puna.train.config import MemoryConfig, ParallelConfig
from puna.train.optim_config import EmaConfig, MuonConfig
from puna.train.parallel.model import ParallelModel
from puna.train.precision import Precision
from puna.train.spec import JobSpec
from puna.train.worker import _run
from tests.unit.batches import packed_batch
from tests.unit.test_train_loop import (  # noqa: F401 - fixtures
    MODEL,
    WORLD,
    factory,
    job,
    losses,
    quick,
)


@pytest.fixture
def restore_mode():
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def run_worker(out: Path) -> JobSpec:
    """Run as a worker process does, with everything that has a choice of algorithms."""
    spec = job(
        out, deterministic=True, optim=MuonConfig(lr=1e-2), z_loss=1e-3, precision="bf16",
        memory=MemoryConfig(recompute="selective"), average=EmaConfig(), micro_batch=2,
    )  # fmt: skip
    _run(spec, 0, HeartbeatWriter(spec.attempt_dir(0), 0), Ledger(spec.ledger, job=spec.job))
    return spec


def test_two_runs_in_deterministic_mode_are_the_same_bits(tmp_path, restore_mode):
    first, second = run_worker(tmp_path / "a"), run_worker(tmp_path / "b")
    assert torch.are_deterministic_algorithms_enabled()
    assert losses(first) == losses(second)
    for folder in ("model", "model-last"):
        files = [spec.out / folder / "model.safetensors" for spec in (first, second)]
        assert hash_file(files[0]) == hash_file(files[1])


def gradients(micro_batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = ParallelModel(
        MODEL, 32, micro_batch, 8 // micro_batch, WORLD, ParallelConfig(), Precision(dtype, "test")
    )
    model.fill_random(0)
    batch = packed_batch(MODEL.vocab_size, 8, 32)
    batch.labels_BT[0, 3:] = NO_LABEL  # passes with very different numbers of labels
    model.forward_backward(TensorBatch.of(batch, WORLD.device))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_gradient_does_not_depend_on_the_split_into_passes(micro_batch, dtype, tolerance):
    """The distance of each parameter's gradient, as a share of its norm."""
    whole = gradients(8, dtype)
    for name, gradient in gradients(micro_batch, dtype).items():
        assert (gradient - whole[name]).norm() < tolerance * whole[name].norm(), name
