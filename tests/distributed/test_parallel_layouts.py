"""Every layout trains to the losses, gradient norms and parameters of one process.

And checkpoints move between all of them.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LlamaConfig
from puna.resilience.heartbeat import HeartbeatWriter
from puna.tokens.loader import NO_LABEL, Batch
from puna.train.config import AdamWConfig, CheckpointConfig, ParallelConfig, TrainingConfig
from puna.train.loop import train
from puna.train.parallel.layout import Layout
from puna.train.parallel.world import World, make_world
from puna.train.spec import JobSpec, SourceSpec
from tests.distributed.ranks import run_ranks

# Eight processes on two busy cores take minutes.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1000)]

# Five layers: no number of stages divides them. A vocabulary that two ranks do not share evenly.
MODEL = LlamaConfig(
    vocab_size=37, dim=16, n_layers=5, n_heads=4, n_kv_heads=2, ffn_dim=24, max_seq_len=32
)
N_STEPS, N_ROWS, SEQ_LEN = 20, 8, 32
PARAMETER_DISTANCE = 1e-5
"""Of a trained parameter in another layout, as a share of its norm."""


class Rows:
    """Counting rows of packed documents, some without labels; stops at a step."""

    def __init__(self, stop: int = N_STEPS) -> None:
        self.n_rows, self.seq_len, self._stop = N_ROWS, SEQ_LEN, stop

    def batch(self, step: int, rank: int, world: int) -> Batch:
        if step == self._stop:
            raise StopIteration
        rng = np.random.default_rng([3, step])
        start = rng.integers(0, MODEL.vocab_size, (N_ROWS, 1))
        tokens = (start + rng.integers(1, 4, (N_ROWS, 1)) * np.arange(SEQ_LEN + 1)) % 37
        labels = tokens[:, 1:].copy()
        labels[0, 2:] = labels[5, :7] = NO_LABEL
        doc_ids = np.zeros((N_ROWS, SEQ_LEN), np.int32)
        doc_ids[:, 9:], doc_ids[:, 21:] = 1, 2
        positions = np.arange(SEQ_LEN, dtype=np.int32) - np.array([0, 9, 21], np.int32)[doc_ids]
        n = N_ROWS // world
        mine = slice(rank * n, (rank + 1) * n)
        return Batch(tokens[mine, :-1].copy(), labels[mine], doc_ids[mine], positions[mine])


def rows(stop: int = N_STEPS) -> Rows:
    """Make them in a rank."""
    return Rows(stop)


def job(
    folder: Path, n_ranks: int, parallel: dict, micro_batch: int, tied: bool = False,
    precision: str = "fp32", stop: int = N_STEPS,
) -> JobSpec:  # fmt: skip
    training = TrainingConfig(
        steps=N_STEPS, seq_len=SEQ_LEN, global_batch=N_ROWS, micro_batch=micro_batch,
        nproc=n_ranks, parallel=ParallelConfig(**parallel), precision=precision,  # type: ignore[arg-type]
        optim=AdamWConfig(lr=3e-3), checkpoint=CheckpointConfig(every=2, memory_every=0, keep=20),
    )  # fmt: skip
    return JobSpec(
        job="j", out=folder, ledger=folder / LEDGER_FILE, common={}, weights=None, special_ids={},
        source=SourceSpec(f"{__name__}:rows", {"stop": stop}), training=training,
        model=MODEL.model_copy(update={"tie_embeddings": tied}),
    )  # fmt: skip


def train_here(spec: JobSpec, attempt: int = 0) -> None:
    """Be one rank of a training."""
    warnings.filterwarnings("ignore", module=r"torch\.")
    world = World(0, 1, torch.device("cpu"), 1, None)
    if "RANK" in os.environ:
        world = make_world(
            torch.device("cpu"), 1, Layout.of(spec.training.parallel, spec.training.nproc)
        )
    spec.attempt_dir(attempt).mkdir(parents=True, exist_ok=True)
    heart = HeartbeatWriter(spec.attempt_dir(attempt), world.rank)
    with contextlib.suppress(StopIteration):
        train(spec, attempt, world, heart, Ledger(spec.ledger, job="j"))


def train_all(specs: list[JobSpec]) -> None:
    """Be one rank of several trainings, one after the other."""
    for attempt, spec in enumerate(specs):
        train_here(spec, attempt)


def curve(folder: Path) -> list[tuple[float, float]]:
    """Losses and gradient norms, by step."""
    found = {
        e["step"]: (e["loss"], e["grad_norm"])
        for e in read_events(folder / LEDGER_FILE, "train.step")
    }
    assert sorted(found) == list(range(N_STEPS))
    return [found[step] for step in range(N_STEPS)]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process without a group, for untied and tied models and both precisions."""
    folders = {}
    for tied, precision in [(False, "fp32"), (True, "fp32"), (False, "bf16")]:
        folder = tmp_path_factory.mktemp("alone")
        train_here(job(folder, 1, {}, N_ROWS, tied, precision))
        folders[tied, precision] = folder
    return folders


INTERLEAVED = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")
LAYOUTS: dict[int, list[tuple[dict, int]]] = {
    2: [
        ({}, 4),
        ({"reshard_after_forward": True, "prefetch": 0}, 2),
        ({"replicate": 2}, 4),
        ({"tp": 2}, 4),
        ({"cp": 2}, 8),
        *[({"pp": 2, "schedule": s}, 4) for s in ("gpipe", "1f1b")],
        *[
            ({"pp": 2, "schedule": s}, 2)
            for s in INTERLEAVED
        ],
    ],
    4: [
        ({"replicate": 2}, 2),
        ({"tp": 2}, 4),
        ({"cp": 2}, 2),
        ({"tp": 2, "cp": 2}, 8),
        ({"pp": 4}, 2),
        ({"pp": 2, "cp": 2, "schedule": "zbv"}, 2),
        ({"pp": 2, "tp": 2, "less_last": 1}, 2),
    ],
    8: [
        ({"pp": 2, "tp": 2}, 1),
        ({"tp": 2, "cp": 2, "pp": 2, "schedule": "interleaved_zero_bubble"}, 2),
        ({"replicate": 2, "tp": 2}, 1),
    ],
}  # fmt: skip
TIED: dict[int, list[tuple[dict, int]]] = {
    2: [({"tp": 2}, 4), ({"pp": 2}, 2), ({"pp": 2, "schedule": "zbv"}, 2)],
    4: [({"pp": 2, "tp": 2}, 2)],
}


@pytest.mark.parametrize(
    ("tied", "n_ranks"),
    [
        (False, 4),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((False, 2), (False, 8), (True, 2), (True, 4))
        ),
    ],
)
def test_every_layout_is_one_process(alone, tmp_path, tied, n_ranks):
    layouts = TIED[n_ranks] if tied else LAYOUTS[n_ranks]
    specs = [
        job(tmp_path / str(i), n_ranks, parallel, micro, tied)
        for i, (parallel, micro) in enumerate(layouts)
    ]
    run_ranks(n_ranks, train_all, specs)
    expected, weights = curve(alone[tied, "fp32"]), parameters(alone[tied, "fp32"])
    for (parallel, _), spec in zip(layouts, specs, strict=True):
        for got, want in zip(curve(spec.out), expected, strict=True):
            assert got[0] == pytest.approx(want[0], rel=1e-5), parallel
            # A norm moves with the rounding of every weight before it.
            assert got[1] == pytest.approx(want[1], rel=1e-4), parallel
        for name, value in parameters(spec.out).items():
            distance = (value - weights[name]).norm() / weights[name].norm()
            assert distance < PARAMETER_DISTANCE, (parallel, name)


BF16 = {
    2: [({}, 4), ({"tp": 2}, 4), ({"cp": 2}, 8), ({"pp": 2, "schedule": "zbv"}, 2)],
    4: [({"tp": 2, "pp": 2}, 2)],
}


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.exhaustive
def test_every_layout_is_one_process_in_bf16(alone, tmp_path, n_ranks):
    """As near as roundings to 8 bits allow: a hundredth of what 20 steps change."""
    specs = [
        job(tmp_path / str(i), n_ranks, parallel, micro, precision="bf16")
        for i, (parallel, micro) in enumerate(BF16[n_ranks])
    ]
    run_ranks(n_ranks, train_all, specs)
    expected = curve(alone[False, "bf16"])
    change = expected[0][0] - expected[-1][0]
    assert change > 0.5
    for (parallel, _), spec in zip(BF16[n_ranks], specs, strict=True):
        for got, want in zip(curve(spec.out), expected, strict=True):
            assert abs(got[0] - want[0]) < change / 100, parallel


@pytest.mark.exhaustive
@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_move_between_all_layouts(alone, tmp_path, tied):
    """One training whose layout changes every other step, over 1, 2 and 4 ranks."""
    chain = [
        (1, {}, 8), (2, {"tp": 2}, 4), (2, {"pp": 2, "schedule": "zbv"}, 2), (2, {"cp": 2}, 8),
        (4, {"tp": 2, "pp": 2}, 2), (2, {}, 4), (4, {"pp": 4}, 2),
        (4, {"replicate": 2, "cp": 2}, 4), (1, {}, 4), (4, {"tp": 2}, 4),
    ]  # fmt: skip
    for i, (n_ranks, parallel, micro) in enumerate(chain):
        spec = job(tmp_path, n_ranks, parallel, micro, tied, stop=2 * i + 2)
        run_ranks(n_ranks, train_all, [spec])
    expected = curve(alone[tied, "fp32"])
    for got, want in zip(curve(tmp_path), expected, strict=True):
        assert got[0] == pytest.approx(want[0], rel=1e-5)
        assert got[1] == pytest.approx(want[1], rel=1e-4)
    restored = [e["step"] for e in read_events(tmp_path / LEDGER_FILE, "train.restore")]
    assert restored == list(range(2, N_STEPS, 2))
