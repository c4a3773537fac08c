"""Training configuration and schedules: what is refused before anything is started."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from puna.core.config import identity
from puna.core.recipe import resolve
from puna.train.config import (
    CheckpointConfig,
    FaultConfig,
    PretrainConfig,
    TrainingConfig,
)
from puna.train.optim_config import MuonConfig
from puna.train.schedule import lr_factor
from puna.train.schedule_config import CosineConfig, LinearConfig, WsdConfig
from puna.train.spec import plain_training
from puna.train.stage import pretrain  # noqa: F401 - registers the stage


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"global_batch": 15, "nproc": 2}, ["global_batch=15", "nproc=2", "14 or 16"]),
        ({"global_batch": 1, "nproc": 4}, ["use global_batch=4"]),
        ({"global_batch": 12, "nproc": 2, "micro_batch": 4}, ["micro_batch=4", "1, 2, 3, 6"]),
        ({"fault": {"rank": 2, "step": 3}, "nproc": 2}, ["fault.rank=2", "nproc=2"]),
        ({"fault": {"step": 10}}, ["fault.step=10", "10 steps"]),
        ({"tokens": 100}, ["either steps or tokens"]),
        ({"steps": None}, ["either steps or tokens"]),
        ({"weights": {"code": 0.0}}, ["all zero"]),
        ({"weights": {"code": -1.0}}, ["greater than or equal to 0"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(values, words):
    with pytest.raises(ValidationError) as caught:
        PretrainConfig(**{"steps": 10, **values})
    assert all(word in str(caught.value) for word in words)


def test_a_fault_that_is_turned_off_needs_no_place_in_the_run():
    TrainingConfig(steps=3, fault=FaultConfig(enabled=False, rank=7, step=99))


def test_a_token_budget_is_rounded_up_to_whole_steps():
    config = TrainingConfig(tokens=1025, seq_len=64, global_batch=8)
    assert (config.tokens_per_step, config.n_steps) == (512, 3)


def test_what_does_not_change_the_numbers_is_outside_the_fingerprint():
    plain = PretrainConfig(steps=10)
    same = PretrainConfig(
        steps=10, fault=FaultConfig(step=3), checkpoint=CheckpointConfig(every=7), device="cpu",
        log_every=5,
    )  # fmt: skip
    assert identity(plain) == identity(same)
    for other in ({"nproc": 2}, {"seed": 1}, {"precision": "bf16"}, {"micro_batch": 1}):
        assert identity(plain) != identity(PretrainConfig(steps=10, **other))


def test_a_subclass_is_reduced_to_what_every_training_has():
    config = PretrainConfig(steps=10, nproc=2, weights={"code": 1.0})
    plain = plain_training(config)
    assert type(plain) is TrainingConfig
    assert (plain.steps, plain.nproc) == (10, 2)


SCHEDULES = st.one_of(
    st.builds(
        CosineConfig,
        warmup=st.floats(0, 0.99) | st.integers(1, 50),
        warmup_from=st.floats(0, 1),
        floor=st.floats(0, 1),
    ),
    st.builds(
        LinearConfig,
        warmup=st.floats(0, 0.99) | st.integers(1, 50),
        floor=st.floats(0, 1),
    ),
    st.builds(
        WsdConfig,
        warmup=st.floats(0, 0.99) | st.integers(1, 50),
        warmup_from=st.floats(0, 1),
        decay=st.floats(0, 0.99) | st.integers(1, 50),
        shape=st.sampled_from(["linear", "sqrt", "cosine"]),
        floor=st.floats(0, 1),
    ),
)


@given(SCHEDULES, st.integers(1, 200))
def test_schedules_rise_then_fall_between_the_floor_and_the_peak(schedule, n_steps):
    factors = [lr_factor(schedule, step, n_steps) for step in range(n_steps)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert all(a >= b - 1e-12 for a, b in zip(factors[top:], factors[top + 1 :], strict=False))
    assert all(factor >= schedule.floor - 1e-12 for factor in factors[top:])
    if not (isinstance(schedule, WsdConfig | LinearConfig) and schedule.floor == 0):
        assert factors[0] > 0


def test_cosine_ends_on_its_floor_and_starts_at_its_peak():
    schedule = CosineConfig(warmup=4, floor=0.1)
    factors = [lr_factor(schedule, step, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert lr_factor(schedule, 12, 21) == pytest.approx(0.55)  # half way


def test_wsd_is_flat_and_then_linear():
    factors = [lr_factor(WsdConfig(warmup=2, decay=0.25), step, 20) for step in range(20)]
    assert factors[1:15] == [1.0] * 14
    assert factors[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", [0.75, 0.5, 0.25, 0.0]), ("sqrt", [0.5, 0.292893, 0.133975, 0.0]),
     ("cosine", [0.853553, 0.5, 0.146447, 0.0])],
)  # fmt: skip
def test_wsd_decays_in_the_shape_that_is_asked_for(shape, expected):
    schedule = WsdConfig(warmup=0, decay=4, shape=shape)
    factors = [lr_factor(schedule, step, 10) for step in range(10)]
    assert factors == pytest.approx([1.0] * 6 + expected, abs=1e-6)


def test_annealing_goes_linearly_to_zero():
    factors = [lr_factor(LinearConfig(warmup=0), step, 5) for step in range(5)]
    assert factors == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_second_warm_up_begins_where_the_first_training_ended():
    schedule = CosineConfig(warmup=4, warmup_from=0.2, floor=0.1)
    factors = [lr_factor(schedule, step, 20) for step in range(5)]
    assert factors == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])


def test_another_optimiser_takes_nothing_from_the_one_before():
    raw = {"train": {"pretrain": {"steps": 1, "optim": {"lr": 0.5, "eps": 1e-3}}}}
    recipe = resolve({"name": "t", **raw}, ["train.pretrain.optim.kind=muon"])
    assert recipe.stage_configs()["train.pretrain"][1].optim == MuonConfig()


def test_registering_the_stage_imports_no_torch():
    code = "import sys, puna.train.stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
