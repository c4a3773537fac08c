"""The supervisor, with fake jobs: no process is started, so each case takes milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.resilience.faults import FaultInjector, PlannedFault, was_injected
from puna.resilience.heartbeat import HeartbeatWriter, read_failures, read_heartbeats
from puna.resilience.history import JobHistory, read_history
from puna.resilience.processes import process_alive
from puna.resilience.protocols import Failure, Fault, Heartbeat, Phase, Place
from puna.resilience.supervisor import RestartPolicy, supervise

POLICY = RestartPolicy(max_restarts=3, hang_timeout_s=0.15, start_timeout_s=0.3, max_backoff_s=0.0)


def gone_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def beat(
    rank: int, step: int, phase: Phase = "step", pid: int | None = None, age_s: float = 0.0
) -> Heartbeat:
    return Heartbeat(rank, pid or os.getpid(), step, phase, time.monotonic() - age_s)


def note(step: int, message: str, kind: str = "crash", rank: int = 0) -> Failure:
    return Failure(rank, step, kind, message, "the fix", "Traceback ...", time.monotonic())  # type: ignore[arg-type]


class FakeAttempt:
    def __init__(self, code=None, beats=(), failures=()):
        self.code, self.beats, self.notes = code, list(beats), list(failures)
        self.n_kills = 0
        self.where: list[Place] = []

    def poll(self):
        return self.code

    def kill(self):
        self.n_kills += 1

    def heartbeats(self):
        return self.beats

    def failures(self):
        return self.notes

    def places(self):
        return self.where

    def stacks(self):
        return {}

    def log_tail(self):
        return "THE LOG"


class FakeJob:
    n_ranks = 2

    def __init__(self, *attempts: FakeAttempt):
        self.attempts = attempts
        self.started: list[int] = []
        self.prepared: list[int] = []
        self.is_closed = False

    def blame(self, fault: Fault, attempt: int) -> bool:
        return False

    def wants_restart(self) -> str | None:
        return None

    def prepare(self, attempt: int) -> None:
        self.prepared.append(attempt)

    def close(self) -> None:
        self.is_closed = True

    def start(self, attempt: int) -> FakeAttempt:
        self.started.append(attempt)
        return self.attempts[len(self.started) - 1]


@pytest.fixture
def events(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / LEDGER_FILE, job="j")


def kinds(events: Ledger, *wanted: str) -> list[dict]:
    assert events.path is not None
    return list(read_events(events.path, *wanted))


def good(step: int = 9) -> FakeAttempt:
    return FakeAttempt(0, [beat(0, step), beat(1, step)])


def test_a_killed_rank_is_named_and_the_job_started_again(events: Ledger):
    hit = FakeAttempt(None, [beat(0, 5), beat(1, 5, pid=gone_pid())])
    job = FakeJob(hit, good(step=3))
    outcome = supervise(job, events, POLICY, history=JobHistory())
    assert job.started == [0, 1]
    assert [(f.what, f.rank, f.step) for f in outcome.faults] == [("killed", 1, 5)]
    assert all(attempt.n_kills for attempt in job.attempts)  # the survivors are ended, too
    detected = kinds(events, "fault.detected")
    assert [(e["what"], e["rank"], e["step"]) for e in detected] == [("killed", 1, 5)]
    recovered = kinds(events, "recovery.start", "recovery.done")
    assert [e["kind"] for e in recovered] == ["recovery.start", "recovery.done"]
    assert (recovered[1]["attempt"], recovered[1]["step"], recovered[1]["steps_lost"]) == (1, 3, 2)


def test_a_rank_that_lost_its_peer_is_not_the_cause(events: Ledger):
    lost = note(5, "RuntimeError: Connection reset by peer", kind="peer", rank=0)
    hit = FakeAttempt(None, [beat(0, 5, pid=gone_pid()), beat(1, 5, pid=gone_pid())], [lost])
    outcome = supervise(FakeJob(hit, good()), events, POLICY, history=JobHistory())
    assert [(f.what, f.rank) for f in outcome.faults] == [("killed", 1)]


def test_detection_time_counts_from_the_injection(events: Ledger):
    pid = gone_pid()
    hit = FakeAttempt(None, [beat(0, 5), beat(1, 5, pid=pid, age_s=1000)])
    events.emit("fault.injected", rank=1, step=5, what="kill")
    text = events.path.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {pid}')
    events.path.write_text(text)
    supervise(FakeJob(hit, good()), events, POLICY, history=JobHistory())
    assert kinds(events, "fault.detected")[0]["detect_s"] < 500  # not the age of the heartbeat


class Stepping(FakeAttempt):
    """Takes steps of ``step_s`` up to step 4; there rank 1 falls silent ``age_s`` ago."""

    def __init__(self, step_s: float, age_s: float):
        super().__init__()
        self.step, self.step_s, self.age_s = 0, step_s, age_s

    def heartbeats(self):
        self.step = min(self.step + 1, 4)
        age_s = (4 - self.step) * self.step_s
        silent_s = self.age_s if self.step == 4 else 0.0
        return [beat(0, self.step, age_s=age_s), beat(1, self.step, age_s=age_s + silent_s)]


def test_a_silent_rank_is_a_hang(events: Ledger):
    hung = Stepping(step_s=0.01, age_s=60)
    outcome = supervise(FakeJob(hung, good()), events, POLICY, history=JobHistory())
    assert [(f.what, f.rank, f.step) for f in outcome.faults] == [("hang", 1, 4)]


def test_slow_steps_are_no_hang(events: Ledger):
    slow = Stepping(step_s=20, age_s=60)  # far beyond hang_timeout_s, and yet only three steps
    ticks = iter(range(9))

    def tick() -> None:
        if next(ticks) == 7:
            slow.code = 0

    policy = RestartPolicy(hang_timeout_s=0.15, start_timeout_s=1e9)
    supervise(FakeJob(slow), events, policy, history=JobHistory(), on_tick=tick)
    assert not kinds(events, "fault.detected")


class HungLater(FakeAttempt):
    """A step per look up to step 9; then no rank moves any more."""

    def __init__(self, where: list[Place]):
        super().__init__()
        self.step, self.where, self.beats = 0, where, []

    def heartbeats(self):
        if self.step < 9:
            self.step += 1
            self.beats = [beat(0, self.step), beat(1, self.step)]
        return self.beats


ADAPTIVE = RestartPolicy(hang_timeout_s=1e6, start_timeout_s=1e6, hang_floor_s=0.05)


def test_known_step_times_shorten_the_patience_and_the_missing_rank_is_named(events: Ledger):
    where = [Place(0, 9, "communication", 13), Place(1, 9, "backward", 12)]
    job = FakeJob(HungLater(where), good())
    (fault,) = supervise(job, events, ADAPTIVE, history=JobHistory()).faults
    assert (fault.what, fault.rank, fault.step) == ("hang", 1, 9)
    assert "rank 1 is in its backward after collective 12, and rank 0 waits in collective 13" in (
        fault.message
    )


def test_a_stopped_process_needs_no_history(events: Ledger):
    stopped = FakeAttempt(None, [beat(0, 0, "start"), beat(1, 0, "start")])
    stopped.where = [Place(0, 0, "", 0), Place(1, 0, "", 0, is_stopped=True)]
    job = FakeJob(stopped, good())
    (fault,) = supervise(job, events, ADAPTIVE, history=JobHistory()).faults
    assert (fault.what, fault.rank) == ("hang", 1)
    assert "rank 1 is stopped by a signal" in fault.message


def test_waiting_for_a_batch_is_given_the_longer_time(events: Ledger):
    hung = HungLater([Place(0, 9, "communication", 3), Place(1, 9, "data", 2)])
    ticks = iter(range(60))

    def tick() -> None:
        if next(ticks) == 40:
            hung.code = 0

    supervise(FakeJob(hung), events, ADAPTIVE, history=JobHistory(), on_tick=tick)
    assert not kinds(events, "fault.detected")


def test_the_first_step_may_take_as_long_as_the_start(events: Ledger):
    policy = RestartPolicy(hang_timeout_s=0.0, start_timeout_s=1e9)
    first = FakeAttempt(None, [beat(0, 0, age_s=60), beat(1, 0, age_s=60)])
    ticks = iter(range(9))

    def tick() -> None:
        if next(ticks) == 2:
            first.code = 0

    supervise(FakeJob(first), events, policy, history=JobHistory(), on_tick=tick)
    assert not kinds(events, "fault.detected")


def test_a_rank_that_saves_may_be_silent_longer_than_one_that_steps(events: Ledger):
    policy = RestartPolicy(hang_timeout_s=0.0, start_timeout_s=1e9)
    saving = FakeAttempt(None, [beat(0, 4, "save", age_s=60), beat(1, 4, "done", age_s=60)])
    ticks = iter(range(3))

    def tick() -> None:
        if next(ticks) == 1:
            saving.code = 0

    supervise(FakeJob(saving), events, policy, history=JobHistory(), on_tick=tick)
    assert not kinds(events, "fault.detected")


def test_ranks_that_never_start_are_a_hang(events: Ledger):
    outcome = supervise(
        FakeJob(FakeAttempt(None, [beat(0, 0, "start")]), good()), events, POLICY,
        history=JobHistory(),
    )  # fmt: skip
    assert "1 of 2 ranks did not start" in outcome.faults[0].message


def test_a_user_error_stops_at_once_with_its_own_message(events: Ledger):
    job = FakeJob(
        FakeAttempt(2, [beat(0, 1)], [note(1, "no such source: cod", kind="user")]), good()
    )
    with pytest.raises(PunaError, match="no such source: cod") as caught:
        supervise(job, events, POLICY, history=JobHistory())
    assert caught.value.fix == "the fix"
    assert "THE LOG" not in str(caught.value)
    assert job.started == [0]
    assert not kinds(events, "fault.detected")


def test_the_same_crash_at_the_same_step_stops_after_the_second(events: Ledger):
    def crash(first: int) -> FakeAttempt:
        """Both ranks fail, and either may be the first to say so."""
        notes = [note(7, "ValueError: boom", rank=rank) for rank in (first, 1 - first)]
        return FakeAttempt(1, [beat(0, 7), beat(1, 7)], notes)

    job = FakeJob(crash(0), crash(1), good())
    with pytest.raises(PunaError, match=r"2 times at step 7: rank 1: ValueError: boom"):
        supervise(job, events, POLICY, history=JobHistory())
    assert job.started == [0, 1]


def test_the_next_attempt_is_prepared_when_steps_are_made_and_ended_when_not_needed(
    events: Ledger,
):
    policy = replace(POLICY, standby_after_s=0.0)
    hit = FakeAttempt(None, [beat(0, 5), beat(1, 5, pid=gone_pid())])
    job = FakeJob(hit, good(step=9))
    supervise(job, events, policy, history=JobHistory())
    assert job.prepared[0] == 1
    assert job.is_closed
    idle = FakeJob(FakeAttempt(None, [beat(0, 0), beat(1, 0, pid=gone_pid())]), good())
    supervise(idle, events, POLICY, history=JobHistory())
    assert not idle.prepared
    assert idle.is_closed


def test_a_rank_may_be_killed_twice_at_a_step_but_not_three_times(events: Ledger):
    def killed() -> FakeAttempt:
        return FakeAttempt(None, [beat(0, 5), beat(1, 5, pid=gone_pid())])

    assert supervise(FakeJob(killed(), killed(), good()), events, POLICY, history=JobHistory())
    job = FakeJob(killed(), killed(), killed(), good())
    with pytest.raises(PunaError, match="3 times at step 5"):
        supervise(job, events, POLICY, history=JobHistory())
    assert job.started == [0, 1, 2]


def test_another_step_is_another_failure(events: Ledger):
    def crash(step: int) -> FakeAttempt:
        return FakeAttempt(1, [beat(0, step)], [note(step, "ValueError: boom")])

    outcome = supervise(FakeJob(crash(7), crash(8), good()), events, POLICY, history=JobHistory())
    assert outcome.n_attempts == 3


def test_restarts_without_progress_end(events: Ledger):
    attempts = [FakeAttempt(1, [], [note(step, "boom")]) for step in range(10)]
    with pytest.raises(PunaError, match="3 restarts brought no new step"):
        supervise(FakeJob(*attempts), events, POLICY, history=JobHistory())


def test_a_crash_before_any_heartbeat_shows_the_log(events: Ledger):
    with pytest.raises(PunaError, match="exit code 1") as caught:
        supervise(FakeJob(FakeAttempt(1), FakeAttempt(1)), events, POLICY, history=JobHistory())
    assert "THE LOG" in str(caught.value)


def test_the_processes_are_ended_when_the_caller_is_interrupted(events: Ledger):
    running = FakeAttempt(None, [beat(0, 1), beat(1, 1)])

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(FakeJob(running), events, POLICY, history=JobHistory(), on_tick=interrupt)
    assert running.n_kills == 1


def test_attempts_are_numbered_over_the_life_of_the_job(events: Ledger):
    events.emit("attempt.start", attempt=0)
    events.emit("train.step", step=5)
    events.bind(job="other").emit("attempt.start", attempt=7)
    history = read_history(events.path, "j")
    assert history == JobHistory(next_attempt=1, steps_done=6)
    job = FakeJob(good(step=4))
    supervise(job, events, POLICY, history=history)
    assert job.started == [1]
    assert kinds(events, "recovery.done")[0]["steps_lost"] == 2


def test_heartbeats_and_failure_notes_travel_through_files(tmp_path: Path):
    for rank in (1, 0):
        HeartbeatWriter(tmp_path, rank).beat("step", 3 + rank)
    assert [(b.rank, b.step, b.pid) for b in read_heartbeats(tmp_path)] == [
        (0, 3, os.getpid()),
        (1, 4, os.getpid()),
    ]
    HeartbeatWriter(tmp_path, 0).fail(RuntimeError("connection reset"), "trace")
    HeartbeatWriter(tmp_path, 1).fail(PunaError("bad shard", "make it anew"), "trace")
    first = read_failures(tmp_path)[0]  # a user error explains the others, whatever came first
    assert (first.rank, first.kind, first.message, first.fix) == (
        1, "user", "bad shard", "make it anew",
    )  # fmt: skip


def test_a_fault_is_injected_once_in_the_life_of_a_job(events: Ledger, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, signal: sent.append(signal))
    plan = PlannedFault(rank=1, step=3)

    def run() -> None:
        for rank in (0, 1):
            injector = FaultInjector(plan, rank, "j", events)
            for step in range(5):
                injector.strike(injector.take(step))

    run()
    assert len(sent) == 1
    assert was_injected(plan, "j", events)
    run()  # a restart
    assert len(sent) == 1
    assert not was_injected(plan, "another job in the same ledger", events)


def test_a_zombie_does_not_count_as_alive():
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline_s = time.monotonic() + 30
    while process_alive(process.pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not process_alive(process.pid)
    process.wait()
    assert process_alive(os.getpid())


class ElasticJob(FakeJob):
    """Wants another attempt when it is asked in the second one; can do without who is to blame."""

    def __init__(self, *attempts: FakeAttempt):
        super().__init__(*attempts)
        self.blamed: list[tuple[str, int]] = []

    def blame(self, fault: Fault, attempt: int) -> bool:
        self.blamed.append((fault.what, attempt))
        return True

    def wants_restart(self) -> str | None:
        return "one rank becomes two" if len(self.started) == 3 else None


def test_the_same_failure_may_come_again_where_its_node_is_left_out(events: Ledger):
    def hit() -> FakeAttempt:
        return FakeAttempt(1, [beat(0, 5)], [note(5, "broken")])

    runs = FakeAttempt(None, [beat(0, 7), beat(1, 7)])
    job = ElasticJob(hit(), hit(), runs, good())
    outcome = supervise(job, events, POLICY, history=JobHistory())
    assert job.blamed == [("crash", 0), ("crash", 1)]
    # A planned restart is no fault, and is not waited for or recovered from.
    assert job.started == [0, 1, 2, 3]
    assert runs.n_kills == 1
    assert (outcome.n_attempts, len(outcome.faults)) == (4, 2)
    assert len(kinds(events, "fault.detected")) == 2
    assert [e["attempt"] for e in kinds(events, "recovery.start")] == [1, 2]
