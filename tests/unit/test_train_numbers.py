"""Numbers that cannot be right: computed again, left out, gone round, or the end of the run."""

from __future__ import annotations

import json
import math

import pytest

from puna.core.errors import PunaError
from puna.resilience.protocols import RollBackError
from puna.train.checkpoint.manifest import list_steps
from puna.train.config import CheckpointConfig, FaultConfig
from puna.train.numbers_config import NumbersConfig
from puna.train.spec import CHECKPOINTS_DIR
from puna.train.watch.numbers import SKIPS_FILE, NumberWatch, StepNumbers
from tests.unit.test_train_loop import (
    N_STEPS,
    events,
    factory,  # noqa: F401
    job,
    losses,
    quick,  # noqa: F401
    reference,  # noqa: F401
    run,
    weights_hash,
)


@pytest.fixture
def bad_steps(monkeypatch) -> set[int]:
    """Steps whose loss is NaN, however often they are computed."""
    bad: set[int] = set()
    once = NumberWatch._once

    def computed(self, step: int, batch) -> StepNumbers:
        numbers = once(self, step, batch)
        return StepNumbers(math.nan, numbers.grad_norm) if step in bad else numbers

    monkeypatch.setattr(NumberWatch, "_once", computed)
    return bad


def actions(spec) -> list[tuple[int, str]]:
    return [(event["step"], event["action"]) for event in events(spec, "train.anomaly")]


@pytest.mark.parametrize(("what", "detector"), [("nan", "not_finite"), ("spike", "grad_spike")])
def test_a_fault_of_the_hardware_leaves_no_trace(reference, tmp_path, what, detector):  # noqa: F811
    numbers = NumbersConfig(window=4)
    spec = job(tmp_path, fault=FaultConfig(rank=0, step=4, what=what), numbers=numbers)
    run(spec)
    (event,) = events(spec, "train.anomaly")
    assert (event["step"], event["detector"], event["action"]) == (4, detector, "replay")
    assert event["result"].startswith("transient")
    assert losses(spec) == losses(reference)
    assert weights_hash(spec) == weights_hash(reference)


def test_an_update_with_nan_is_left_out(reference, tmp_path, bad_steps):  # noqa: F811
    bad_steps.add(3)
    spec = job(tmp_path)
    run(spec)
    assert actions(spec) == [(3, "replay"), (3, "skip")]
    assert [event["step"] for event in events(spec, "train.skip")] == [3]
    found, unbroken = losses(spec), losses(reference)
    assert sorted(found) == [0, 1, 2, 4, 5]
    assert all(found[step] == unbroken[step] for step in (0, 1, 2))
    assert found[4] != unbroken[4]
    assert weights_hash(spec) != weights_hash(reference)


def test_skipping_ends_when_it_does_not_help(tmp_path, bad_steps):
    bad_steps.update(range(1, N_STEPS))
    spec = job(tmp_path, numbers=NumbersConfig(not_finite=["skip", "stop"], max_skips=2))
    with pytest.raises(PunaError, match=r"step 3: the loss is nan") as stopped:
        run(spec)
    assert "numbers.not_finite" in str(stopped.value.fix)
    assert actions(spec) == [(1, "skip"), (2, "skip"), (3, "stop")]


@pytest.mark.parametrize("every", [1, 2])
def test_it_goes_back_and_round_the_bad_data(tmp_path, bad_steps, every):
    bad_steps.add(3)
    numbers = NumbersConfig(not_finite=["replay", "roll_back", "stop"], skip_steps=2)
    kept = CheckpointConfig(every=every, memory_every=0, keep=5)
    spec = job(tmp_path, numbers=numbers, checkpoint=kept)
    with pytest.raises(RollBackError, match="the loss is nan"):
        run(spec)
    assert json.loads((spec.state_dir / SKIPS_FILE).read_text())["windows"] == [[3, 5]]
    run(spec, attempt=1)
    assert actions(spec) == [(3, "replay"), (3, "roll_back")]
    assert [event["step"] for event in events(spec, "train.skip")] == [3, 4]
    assert sorted(losses(spec)) == [0, 1, 2, 5]
    assert events(spec, "train.restore")[-1]["step"] == 4 - every


def test_a_state_that_was_bad_already_is_given_up(tmp_path, bad_steps):
    """The step after the window is bad as well: the state it began with is older, then oldest."""
    bad_steps.update({3, 4})
    numbers = NumbersConfig(not_finite=["roll_back", "stop"], max_roll_backs=2)
    kept = CheckpointConfig(every=1, memory_every=0, keep=5)
    spec = job(tmp_path, numbers=numbers, checkpoint=kept)
    for attempt, newest in enumerate((3, 2)):
        with pytest.raises(RollBackError):
            run(spec, attempt)
        assert list_steps(spec.out / CHECKPOINTS_DIR)[0] == newest
    run(spec, attempt=2)
    assert sorted(losses(spec)) == [0, 1, 2, 5]
    bad_steps.add(2)
    spec = job(tmp_path / "again", numbers=numbers, checkpoint=kept)
    for attempt in range(2):
        with pytest.raises(RollBackError):
            run(spec, attempt)
    with pytest.raises(PunaError, match="the loss is nan"):
        run(spec, attempt=2)
    assert actions(spec)[-1] == (4, "stop")


def test_without_a_state_to_go_back_to_it_stops(tmp_path, bad_steps):
    bad_steps.add(4)
    kept = CheckpointConfig(every=3, memory_every=0, keep=5)
    spec = job(tmp_path, numbers=NumbersConfig(not_finite=["roll_back"]), checkpoint=kept)
    with pytest.raises(RollBackError):
        run(spec)
    bad_steps.add(3)  # the state after step 3 is bad itself, and there is none before
    with pytest.raises(RollBackError):
        run(spec, attempt=1)
    assert list_steps(spec.out / CHECKPOINTS_DIR) == []


def test_what_is_known_of_earlier_steps_survives_a_restart(reference, tmp_path, monkeypatch):  # noqa: F811
    """The window is filled from the ledger: a spike right after a restart is found."""
    numbers = NumbersConfig(window=4)
    fault = FaultConfig(rank=0, step=4, what="spike")
    spec = job(tmp_path, numbers=numbers)
    with monkeypatch.context() as patch:
        patch.setattr("puna.train.loop.export_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(spec)
    for step in (5, 6):
        for path in (spec.out / CHECKPOINTS_DIR).glob(f"step-*{step}"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    spec = job(tmp_path, numbers=numbers, fault=fault)
    run(spec, attempt=1)
    assert actions(spec) == [(4, "replay")]
    assert weights_hash(spec) == weights_hash(reference)
