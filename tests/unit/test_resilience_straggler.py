"""Slow ranks are named, and equal ones never are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.resilience import faults
from puna.resilience.faults import FaultInjector, PlannedFault
from puna.resilience.goodput import job_goodput
from puna.resilience.history import JobHistory
from puna.resilience.protocols import Heartbeat
from puna.resilience.straggler import WINDOW_STEPS, StragglerDetector, slow_in_words
from puna.resilience.supervisor import supervise
from tests.unit.test_resilience_supervisor import POLICY, FakeAttempt, FakeJob

N_STEPS = 10_000


def noise(n_ranks: int, n_steps: int, seed: int) -> np.ndarray:
    """Seconds of equal ranks: noise of 15 %, and one step in 25 takes up to ten times as long."""
    rng = np.random.default_rng(seed)
    times_RS = 0.1 * rng.lognormal(0.0, 0.15, (n_ranks, n_steps))
    is_held_up = rng.random(times_RS.shape) < 0.04
    return np.where(is_held_up, times_RS * rng.uniform(2, 10, times_RS.shape), times_RS)


def beats(times_RS: np.ndarray, step: int) -> list[Heartbeat]:
    first = max(0, step - WINDOW_STEPS)
    return [
        Heartbeat(rank, 1, step, "step", 0.0, rank // 2, tuple(times_S[first:step].tolist()))
        for rank, times_S in enumerate(times_RS)
    ]


@pytest.mark.parametrize("n_ranks", [2, 3, 8])
def test_equal_ranks_are_never_named(n_ranks: int):
    times_RS = noise(n_ranks, N_STEPS, seed=n_ranks)
    detector = StragglerDetector()
    for step in range(N_STEPS):
        assert detector.look(beats(times_RS, step)) == [], step


@pytest.mark.parametrize(("n_ranks", "factor"), list(itertools.product([2, 3, 8], [1.6, 3.0])))
def test_a_slow_rank_is_named_once_and_soon(n_ranks: int, factor: float):
    begin, times_RS = 100, noise(n_ranks, 400, seed=7)
    times_RS[1, begin:] *= factor
    detector = StragglerDetector()
    found = [one for step in range(400) for one in detector.look(beats(times_RS, step))]
    (slow,) = found
    assert (slow.rank, slow.node) == (1, 0)
    assert begin + 8 <= slow.step <= begin + (16 if factor > 2 else 60)
    assert slow.ratio == pytest.approx(factor, rel=0.3)


def test_it_is_told_and_takes_no_time_from_the_account(tmp_path):
    events = Ledger(tmp_path / LEDGER_FILE, job="j")
    times_RS = noise(2, 20, seed=1)
    times_RS[1] *= 2
    job = FakeJob(FakeAttempt(0, beats(times_RS, 20)))
    supervise(job, events, POLICY, history=JobHistory())
    (told,) = read_events(tmp_path / LEDGER_FILE, "straggler.detected")
    assert (told["rank"], told["n_steps"], told["action"]) == (1, 16, "report")
    assert slow_in_words(told).startswith("rank 1 (node 0) computes ")
    at = {"job": "j", "t_wall_s": 0.0}
    own = [
        {**at, "kind": "attempt.start", "t_mono_s": 0.0},
        {**at, "kind": "train.step", "t_mono_s": 5.0, "step": 0},
        {**told, "t_mono_s": 6.0, "t_wall_s": 6.0},
        {**at, "kind": "train.step", "t_mono_s": 9.0, "step": 1},
    ]
    assert job_goodput(own).buckets["productive"] == 9.0


def test_a_rank_that_is_slow_on_purpose_sleeps_twice_its_median_step(tmp_path, monkeypatch):
    slept: list[float] = []
    clock = itertools.count(0.0, 0.5)
    monkeypatch.setattr(faults.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    events = Ledger(tmp_path / LEDGER_FILE, job="j")
    injector = FaultInjector(PlannedFault(0, 3, "slow"), 0, "j", Ledger(None, job="j"))
    for step in range(6):
        injector.strike(injector.take(step))
        injector.drag()
    assert slept == [1.0, 1.0, 1.0]
    other = FaultInjector(PlannedFault(1, 0, "slow"), 0, "j", events)
    other.strike(other.take(0))
    other.drag()
    assert len(slept) == 3
