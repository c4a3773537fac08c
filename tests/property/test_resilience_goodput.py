"""The goodput account: whatever the ledger holds, the buckets sum to the wall time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.resilience.goodput import BUCKETS, job_goodput

FIELDS: dict[str, Any] = {
    "job.start": st.just({}),
    "attempt.start": st.integers(0, 3).map(lambda n: {"attempt": n}),
    "preflight.done": st.floats(-1, 200).map(lambda s: {"seconds": s}),
    "train.start": st.just({}),
    "train.restore": st.integers(0, 20).map(lambda n: {"step": n}),
    "train.step": st.tuples(st.integers(0, 20), st.integers(1, 5)).map(
        lambda pair: {"step": pair[0], "n_steps": pair[1]}
    ),
    "train.checkpoint": st.just({"seconds": 0.1}),
    "fault.injected": st.just({}),
    "fault.detected": st.floats(-1, 1e4).map(lambda s: {"detect_s": s}),
    "recovery.start": st.just({}),
    "recovery.done": st.just({"seconds": 1.0, "steps_lost": 2}),
    "job.done": st.just({}),
}
EVENT = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.floats(0, 100), FIELDS[kind])
)


def ledger(steps: list[tuple[str, float, dict[str, Any]]], job: str = "j") -> list[dict[str, Any]]:
    now_s, events = 1000.0, []
    for kind, seconds, fields in steps:
        now_s += seconds
        events.append(
            {"kind": kind, "t_mono_s": now_s, "t_wall_s": now_s + 1e9, "job": job, **fields}
        )
    return events


@given(st.lists(EVENT, min_size=1, max_size=40))
def test_buckets_sum_to_the_wall_time(steps):
    events = ledger(steps)
    found = job_goodput(events)
    wall_s = events[-1]["t_mono_s"] - events[0]["t_mono_s"]
    assert found.wall_s == pytest.approx(wall_s, abs=1e-6)
    assert sum(found.buckets.values()) == pytest.approx(wall_s, abs=1e-6)
    assert all(seconds >= -1e-9 for seconds in found.buckets.values())
    assert set(found.buckets) == set(BUCKETS)
    assert -1e-9 <= found.goodput <= 1 + 1e-9


def test_a_run_with_a_fault_is_told_apart():
    events = ledger(
        [
            ("job.start", 0, {}),
            ("attempt.start", 0.5, {"attempt": 0}),
            ("preflight.done", 2.25, {"seconds": 0.25}),
            ("train.start", 1, {}),
            ("train.step", 2, {"step": 0}),
            ("train.step", 2, {"step": 1}),
            ("train.checkpoint", 0.25, {}),
            ("train.step", 2, {"step": 2}),
            ("fault.injected", 1, {"rank": 1, "step": 3}),
            ("fault.detected", 0.125, {"what": "killed", "rank": 1, "step": 3, "detect_s": 0.125}),
            ("recovery.start", 0, {}),
            ("attempt.start", 0.5, {"attempt": 1}),
            ("train.restore", 3, {"step": 2}),
            ("recovery.done", 0.0, {"seconds": 3.5, "steps_lost": 1}),
            ("train.step", 2, {"step": 2}),
            ("train.step", 2, {"step": 3}),
            ("job.done", 0.5, {}),
        ]
    )
    found = job_goodput(events)
    assert found.buckets == {
        "productive": 8.0, "recomputed": 3.0, "checkpoint": 0.25, "data": 0.0,
        "evaluation": 0.0, "detection": 0.125,
        "restart_init": 7.0, "preflight": 0.25, "other": 0.5, "stopped": 0.0,
    }  # fmt: skip
    assert (found.n_steps, found.n_recomputed, found.n_attempts) == (4, 1, 2)
    fault = found.faults[0]
    assert (fault["rank"], fault["steps_lost"], fault["recover_s"]) == (1, 1, 3.5)


def test_time_in_which_nothing_ran_does_not_count_against_goodput():
    events = ledger(
        [
            ("job.start", 0, {}),
            ("train.step", 10, {"step": 0}),
            ("job.start", 1000, {}),  # killed, and started again by hand later
            ("train.step", 10, {"step": 1}),
        ]
    )
    found = job_goodput(events)
    assert found.buckets["stopped"] == 1000
    assert found.goodput == 1.0


def test_an_event_over_several_steps_is_split_at_what_was_done_before():
    events = ledger(
        [
            ("job.start", 0, {}),
            ("train.step", 10, {"step": 5, "n_steps": 6}),
            ("train.step", 10, {"step": 9, "n_steps": 8}),  # steps 2 to 9, of which 2 to 5 again
        ]
    )
    found = job_goodput(events)
    assert found.buckets["recomputed"] == 5.0
    assert found.n_recomputed == 4


def test_only_the_last_job_of_a_ledger_counts_and_a_reboot_does_not_matter():
    old = ledger([("job.start", 0, {}), ("train.step", 50, {"step": 0})], job="old")
    new = ledger([("job.start", 0, {}), ("train.step", 5, {"step": 0})], job="new")
    rebooted = ledger([("job.start", 0, {}), ("train.step", 5, {"step": 1})], job="new")
    for event in rebooted:
        event["t_mono_s"] -= 900  # the monotonic clock began anew
        event["t_wall_s"] += 60
    assert job_goodput([*old, *new]).wall_s == 5
    assert job_goodput([*old, *new, *rebooted]).wall_s == 65
