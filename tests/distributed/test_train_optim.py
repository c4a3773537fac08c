"""Optimisers, recomputation, ramps and averages in every layout: the training of one process.

Each test trains in this process first and then over several ranks, with one setting that the
layouts must not change.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from puna.core.ledger import LEDGER_FILE, read_events
from puna.tokens.loader import Batch, rank_rows
from puna.tokens.ramp import Ramp, cut_rows
from puna.train.config import MemoryConfig, TrainingConfig
from puna.train.optim_config import LastConfig, MuonConfig
from puna.train.schedule_config import RampConfig
from puna.train.spec import JobSpec, SourceSpec
from tests.distributed import test_parallel_layouts as layouts
from tests.distributed.ranks import run_ranks
from tests.unit.batches import packed_batch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

N_STEPS = 6
MUON = MuonConfig(lr=3e-3, lr_adamw=2e-3, iterate_in="fp32")


def job(
    folder: Path, n_ranks: int, parallel: dict, micro: int, *, stop: int = N_STEPS,
    tied: bool = False, **values: Any,
) -> JobSpec:  # fmt: skip
    spec = layouts.job(folder, n_ranks, parallel, micro, tied, stop=stop)
    training = TrainingConfig.model_validate({**dict(spec.training), "steps": N_STEPS, **values})
    return replace(spec, training=training)


def curve(folder: Path) -> list[tuple[float, float]]:
    """Losses and gradient norms, by step."""
    events = read_events(folder / LEDGER_FILE, "train.step")
    found = {e["step"]: (e["loss"], e["grad_norm"]) for e in events}
    assert sorted(found) == list(range(len(found)))
    return list(found.values())


def assert_same(spec: JobSpec, expected: JobSpec) -> None:
    """The losses to 1e-5, and each parameter to a small share of its norm."""
    want = curve(expected.out)
    for got, (loss, norm) in zip(curve(spec.out), want, strict=True):
        assert got[0] == pytest.approx(loss, rel=1e-5), spec.training.parallel
        assert got[1] == pytest.approx(norm, rel=1e-4), spec.training.parallel
    weights = layouts.parameters(expected.out)
    for name, value in layouts.parameters(spec.out).items():
        distance = (value - weights[name]).norm() / weights[name].norm()
        assert distance < layouts.PARAMETER_DISTANCE, (spec.training.parallel, name)


# Matrices of 24 x 16 over up to 8 ranks: shards of unequal size, and empty ones.
LAYOUTS: dict[int, list[tuple[dict, int]]] = {
    2: [({}, 4), ({"tp": 2}, 4), ({"cp": 2}, 8), ({"pp": 2, "schedule": "zbv"}, 2)],
    4: [({"tp": 2}, 4), ({"tp": 2, "cp": 2}, 8), ({"replicate": 2}, 2)],
    8: [({"tp": 2, "cp": 2, "pp": 2}, 2), ({"replicate": 2, "tp": 2}, 1), ({}, 1)],
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> JobSpec:
    spec = job(tmp_path_factory.mktemp("alone"), 1, {}, layouts.N_ROWS, optim=MUON)
    layouts.train_here(spec)
    return spec


@pytest.mark.parametrize(
    "n_ranks", [2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (4, 8))]
)
def test_muon_in_every_layout_is_muon_on_one_process(alone, tmp_path, n_ranks):
    specs = [
        job(tmp_path / str(i), n_ranks, parallel, micro, optim=MUON)
        for i, (parallel, micro) in enumerate(LAYOUTS[n_ranks])
    ]
    run_ranks(n_ranks, layouts.train_all, specs)
    for spec in specs:
        assert_same(spec, alone)


FULL, SELECTIVE = MemoryConfig(recompute="full"), MemoryConfig(recompute="selective")
RECOMPUTED = [
    ({}, 4, FULL), ({"reshard_after_forward": True}, 2, SELECTIVE), ({"tp": 2}, 4, SELECTIVE),
    ({"tp": 2}, 4, FULL), ({"cp": 2}, 8, SELECTIVE), ({"pp": 2}, 2, MemoryConfig(budget_gib=2e-4)),
    ({"pp": 2, "schedule": "interleaved_1f1b"}, 2, SELECTIVE),
    ({"pp": 2, "schedule": "looped_bfs"}, 2, FULL),
]  # fmt: skip


@pytest.mark.exhaustive
def test_layers_that_are_computed_again_change_nothing(alone, tmp_path):
    specs = [
        job(tmp_path / str(i), 2, parallel, micro, optim=MUON, memory=memory)
        for i, (parallel, micro, memory) in enumerate(RECOMPUTED)
    ]
    run_ranks(2, layouts.train_all, specs)
    for spec in specs:
        assert_same(spec, alone)


@pytest.mark.exhaustive
def test_the_average_is_the_same_in_every_layout(tmp_path):
    values = {"average": LastConfig(steps=3), "tied": True}
    expected = job(tmp_path / "alone", 1, {}, layouts.N_ROWS, **values)
    layouts.train_here(expected)
    last = load_file(expected.out / "model-last" / "model.safetensors")
    assert not torch.equal(
        last["model.norm.weight"], layouts.parameters(expected.out)["model.norm.weight"]
    )
    parallels = [({}, 4), ({"tp": 2}, 4), ({"pp": 2, "schedule": "zbv"}, 2), ({"pp": 2}, 2)]
    specs = [
        job(tmp_path / str(i), 2, p, micro, **values) for i, (p, micro) in enumerate(parallels)
    ]
    run_ranks(2, layouts.train_all, specs)
    for spec in specs:
        assert_same(spec, expected)


RAMP = [
    RampConfig(until_tokens=2 * 4 * 32, global_batch=4, seq_len=16),
    RampConfig(until_tokens=3 * 4 * 32, global_batch=4),
]
"""Two steps of 4 rows cut in two, one of 4 rows, then 8 rows."""


class GrowingRows:
    """Rows of a number each, so many of them per step as a ramp says; stops at a step."""

    def __init__(self, stairs: list[list[int]], stop: int) -> None:
        self.n_rows, self._ramp, self._stop = 8, Ramp.of(8, stairs), stop

    def batch(self, step: int, rank: int, world: int) -> Batch:
        if step == self._stop:
            raise StopIteration
        stair, first = self._ramp.at(step), self._ramp.rows_before(step)
        mine = rank_rows(stair.n_rows, rank, world)
        rows = [
            packed_batch(layouts.MODEL.vocab_size, 1, layouts.SEQ_LEN, seed=first + row)
            for row in mine
        ]
        names = ("tokens_BT", "labels_BT", "doc_ids_BT", "positions_BT")
        parts = [np.concatenate([getattr(row, name) for row in rows]) for name in names]
        return cut_rows(Batch(*parts), stair.n_pieces)


def growing_rows(stairs: list[list[int]], stop: int) -> GrowingRows:
    """Make them in a rank."""
    return GrowingRows(stairs, stop)


def ramped(folder: Path, n_ranks: int, parallel: dict, micro: int, stop: int = N_STEPS) -> JobSpec:
    spec = job(folder, n_ranks, parallel, micro, stop=stop, batch_ramp=RAMP)
    stairs = spec.training.ramp.to_json()
    source = SourceSpec(f"{__name__}:growing_rows", {"stairs": stairs, "stop": stop})
    return replace(spec, source=source)


@pytest.mark.exhaustive
def test_a_growing_batch_is_the_same_in_every_layout_and_after_breaks(tmp_path):
    expected = ramped(tmp_path / "alone", 1, {}, 0)
    assert [step.n_rows for step in map(expected.training.ramp.at, range(4))] == [4, 4, 4, 8]
    layouts.train_here(expected)
    events = list(read_events(expected.out / LEDGER_FILE, "train.step"))
    assert [event["tokens"] for event in events] == [128] * 3 + [256] * 3
    parallels: list[tuple[dict, int]] = [
        ({}, 0), ({"tp": 2}, 2), ({"cp": 2}, 4), ({"pp": 2}, 1), ({"pp": 2, "schedule": "zbv"}, 1),
    ]  # fmt: skip
    specs = [ramped(tmp_path / str(i), 2, p, micro) for i, (p, micro) in enumerate(parallels)]
    run_ranks(2, layouts.train_all, specs)
    for spec in specs:
        assert_same(spec, expected)
    for n_ranks, parallel, micro, stop in [
        (2, {"pp": 2}, 1, 2), (1, {}, 4, 4), (4, {"replicate": 2}, 1, N_STEPS)
    ]:  # fmt: skip
        spec = ramped(tmp_path / "broken", n_ranks, parallel, micro, stop)
        run_ranks(n_ranks, layouts.train_all, [spec])
    assert_same(spec, expected)


@pytest.mark.exhaustive
def test_the_momentum_moves_between_layouts(alone, tmp_path):
    chain = [(1, {}, 8), (2, {"pp": 2}, 2), (4, {"replicate": 2, "cp": 2}, 4)]
    for i, (n_ranks, parallel, micro) in enumerate(chain):
        stop = N_STEPS if i == len(chain) - 1 else 2 * i + 2
        spec = job(tmp_path, n_ranks, parallel, micro, stop=stop, optim=MUON)
        run_ranks(n_ranks, layouts.train_all, [spec])
    assert_same(spec, alone)


@pytest.mark.exhaustive
def test_a_training_that_was_broken_off_ends_bitwise_like_one_that_was_not(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    values = {"optim": MuonConfig(lr=3e-3), "precision": "bf16"}
    run_ranks(2, layouts.train_all, [job(whole, 2, {"tp": 2}, 4, **values)])
    for stop in (3, N_STEPS):
        run_ranks(2, layouts.train_all, [job(broken, 2, {"tp": 2}, 4, stop=stop, **values)])
    assert curve(broken) == curve(whole)
    weights = layouts.parameters(whole)
    for name, value in layouts.parameters(broken).items():
        assert torch.equal(value, weights[name]), name
