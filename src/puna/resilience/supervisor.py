"""The supervisor: starts a job, notices within a moment that it died or hangs, starts it again.

It stops at once where a restart cannot help: on a user error (bad input, full disk), and when the
same failure happens twice at the same step. torchrun's own restarts are not used: its agent notices
no hang, waits 30 s for a frozen process, and on gloo reuses a store with stale addresses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from puna.core.errors import PunaError
from puna.core.ledger import Ledger, read_events
from puna.core.progress import say
from puna.resilience.hang import DATA, Missing, StepTimes, find_missing, innermost
from puna.resilience.history import JobHistory
from puna.resilience.policy import actions_of, most_times
from puna.resilience.processes import process_alive
from puna.resilience.protocols import Attempt, Fault, Heartbeat, Job, Place
from puna.resilience.straggler import WINDOW_STEPS, StragglerDetector

POLL_S = 0.05
_HANG_STEPS = 10
_MORE_PATIENT = 4
_LATE_S = 0.5
"""A look at the job that comes so late says that this machine is held up, not the job."""


@dataclass(frozen=True)
class RestartPolicy:
    """When to call a job hung, and how often to start it again.

    Attributes:
        max_restarts: Restarts in a row without one new step.
        hang_timeout_s: Longest silence of a rank inside a step; at least ten times the longest step
            of the attempt so far, so that a slow machine is not taken for a hung one.
        hang_floor_s: The same once the attempt has shown how long its steps take; at least ten
            times the longest of its recent ones. Not while a rank waits for its batch. Four times
            as much after every hang, so that a false alarm is not raised twice.
        standby_after_s: Age of an attempt at which the next one is prepared; None for never.
        start_timeout_s: Longest silence while it starts (to the end of its first step) or saves.
        max_backoff_s: The first restart is immediate; while there is no new step the pause grows
            1, 2, 4 ... seconds up to this.
    """

    max_restarts: int = 10
    hang_timeout_s: float = 60.0
    start_timeout_s: float = 300.0
    max_backoff_s: float = 30.0
    hang_floor_s: float = 2.0
    standby_after_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a supervised job ended well."""

    n_attempts: int
    faults: tuple[Fault, ...]


def supervise(
    job: Job,
    events: Ledger,
    policy: RestartPolicy,
    *,
    history: JobHistory,
    on_tick: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run a job to its end, whatever happens to its processes.

    Args:
        job: The job.
        events: Ledger, bound to the job's id.
        policy: Timeouts and limits.
        history: What earlier calls (killed with the whole process tree) left behind.
        on_tick: Called about 20 times a second, for progress.

    Returns:
        Number of attempts and the faults survived, in this call.

    Raises:
        PunaError: A rank reported a user error, the same failure came again at the same step (a
            kill: twice again), or ``max_restarts`` restarts brought no new step.
    """
    try:
        return _supervise(job, events, policy, history, on_tick)
    finally:
        job.close()


def _supervise(
    job: Job,
    events: Ledger,
    policy: RestartPolicy,
    history: JobHistory,
    on_tick: Callable[[], None],
) -> Outcome:
    faults: list[Fault] = []
    attempt, furthest, fruitless, n_planned = history.next_attempt, history.steps_done, 0, 0
    down_since_s = time.monotonic() if attempt > 0 else None
    while True:
        if down_since_s is not None:
            events.emit("recovery.start", durable=True, attempt=attempt)
        patience = _MORE_PATIENT ** sum(fault.what == "hang" for fault in faults)
        watch = _Watch(job, attempt, events, policy, furthest, down_since_s, on_tick, patience)
        fault = watch.run()
        if fault is None:
            return Outcome(len(faults) + n_planned + 1, tuple(faults))
        if fault.what == "planned":
            say(f"  {fault.message}")
            furthest, down_since_s = max(furthest, watch.furthest), None
            attempt, n_planned = attempt + 1, n_planned + 1
            continue
        down_since_s = time.monotonic()
        fruitless = 0 if watch.furthest > furthest else fruitless + 1
        furthest = max(furthest, watch.furthest)
        if not job.blame(fault, attempt):
            _stop_if_hopeless(fault, faults, fruitless, policy, watch.log_tail)
        faults.append(fault)
        say(("  fault", "yellow"), f": {fault.message}; starting again from the last checkpoint")
        if fruitless:
            time.sleep(min(2.0 ** (fruitless - 1), policy.max_backoff_s))
        attempt += 1


def _stop_if_hopeless(
    fault: Fault, earlier: list[Fault], fruitless: int, policy: RestartPolicy, log_tail: str
) -> None:
    if fault.what == "user":
        raise PunaError(fault.message, fault.fix)
    n_times = 1 + sum(fault.signature == known.signature for known in earlier)
    if n_times > most_times(fault.what):
        raise PunaError(
            f"the same failure happened {n_times} times at step {fault.step}: {fault.message}\n"
            f"{log_tail}",
            _REPEATED_FIX.get(fault.what, _REPEATED_FIX["crash"]),
        )
    if fruitless > policy.max_restarts:
        raise PunaError(
            f"{policy.max_restarts} restarts brought no new step; the last fault: {fault.message}\n"
            f"{log_tail}",
            "look for the cause in the log, or raise `max_restarts`",
        )


_REPEATED_FIX = {
    "killed": "most often memory runs out at this step: lower micro_batch, seq_len or nproc",
    "hang": "if steps are just slow, raise `hang_timeout_s`; else look for the cause in the log",
    "preflight": "this machine is not sound: `puna resilience self-test --seconds 60` tests it",
    "crash": "a restart cannot help: remove the cause, then run the same command again",
}


class _Watch:
    """Watches one attempt until it ends."""

    def __init__(
        self,
        job: Job,
        attempt: int,
        events: Ledger,
        policy: RestartPolicy,
        furthest: int,
        down_since_s: float | None,
        on_tick: Callable[[], None],
        patience: int,
    ) -> None:
        self._job, self._attempt, self._events, self._policy = job, attempt, events, policy
        self._before = furthest
        self._down_since_s = down_since_s
        self._on_tick = on_tick
        self._floor_s = policy.hang_floor_s * patience
        self._start_s = time.monotonic()
        self.furthest = 0
        """Steps that some rank has completed in this attempt, or in an earlier one."""
        self.log_tail = ""
        self._times = StepTimes()
        self._stragglers = StragglerDetector()
        self._looked_s = self._start_s
        self._awake_since_s = self._start_s
        self._last_beats: dict[int, Heartbeat] = {}

    def run(self) -> Fault | None:
        """Return why the attempt failed, or None when it ended well; no process is left."""
        self._events.emit("attempt.start", attempt=self._attempt)
        running = self._job.start(self._attempt)
        try:
            fault = self._watch(running)
        finally:
            running.kill()
        self._on_tick()
        if fault is not None:
            self.log_tail = running.log_tail()
        return fault

    def _watch(self, running: Attempt) -> Fault | None:
        while True:
            code = running.poll()
            beats = running.heartbeats()
            self.furthest = max([self.furthest, *(beat.step for beat in beats)])
            self._note_recovery(beats)
            self._time_steps(beats)
            self._note_stragglers(beats)
            self._note_late_look()
            self._prepare()
            if code == 0:
                return None
            fault = self._find_fault(running, code, beats)
            if fault is not None:
                if fault.what != "user":
                    self._events.emit(
                        "fault.detected", durable=True, attempt=self._attempt, what=fault.what,
                        rank=fault.rank, step=fault.step, detect_s=fault.detect_s,
                        message=fault.message, stacks=fault.stacks,
                    )  # fmt: skip
                return fault
            why = self._job.wants_restart()
            if why is not None:
                return Fault("planned", None, self.furthest, 0.0, why)
            self._on_tick()
            time.sleep(POLL_S)

    def _prepare(self) -> None:
        """Have the next attempt wait, once this one makes new steps and has done so for a while."""
        after_s = self._policy.standby_after_s
        if after_s is None or self.furthest <= self._before:
            return
        if time.monotonic() - self._start_s > after_s:
            self._job.prepare(self._attempt + 1)

    def _find_fault(
        self, running: Attempt, code: int | None, beats: list[Heartbeat]
    ) -> Fault | None:
        now_s = time.monotonic()
        dead = [beat for beat in beats if beat.phase != "done" and not process_alive(beat.pid)]
        if dead or code is not None:
            failures = running.failures()
            noted = {note.rank for note in failures}
            silent = [beat for beat in dead if beat.rank not in noted]
            # One that only lost its peer does not explain one that died without a word.
            if failures and (failures[0].kind != "peer" or not silent):
                note = failures[0]
                what = "crash" if note.kind == "peer" else note.kind
                return Fault(
                    what, note.rank, note.step, now_s - note.t_mono_s,
                    f"rank {note.rank}: {note.message}" if what == "crash" else note.message,
                    note.fix, reason=note.message,
                )  # fmt: skip
            dead = silent
        if dead:
            # Of several dead ranks the one that fell silent first is the cause.
            beat = min(dead, key=lambda beat: beat.t_mono_s)
            return Fault(
                "killed", beat.rank, beat.step, self._since_s(beat, now_s),
                f"rank {beat.rank} was killed at step {beat.step}",
            )  # fmt: skip
        if code is not None:
            step = max((beat.step for beat in beats), default=0)
            return Fault(
                "exit", None, step, 0.0, f"the training processes ended with exit code {code}"
            )
        return self._find_hang(running, beats, now_s)

    def _find_hang(self, running: Attempt, beats: list[Heartbeat], now_s: float) -> Fault | None:
        policy = self._policy
        if len(beats) < self._job.n_ranks and now_s - self._start_s > policy.start_timeout_s:
            return Fault(
                "hang", None, 0, now_s - self._start_s,
                f"{self._job.n_ranks - len(beats)} of {self._job.n_ranks} ranks did not start "
                f"within {policy.start_timeout_s:.0f} s",
            )  # fmt: skip
        for beat in sorted(beats, key=lambda beat: beat.t_mono_s):
            silent_s = now_s - max(beat.t_mono_s, self._awake_since_s)
            limit_s = self._limit_s(beat)
            if beat.phase == "done" or silent_s <= min(limit_s, self._floor_s):
                continue
            places = running.places()
            # Of a stopped process it is certain that it does not just take its time.
            if silent_s <= limit_s and not any(place.is_stopped for place in places):
                continue
            missing = find_missing(places) if len(places) == self._job.n_ranks else None
            if silent_s <= self._patient_limit_s(beat) and _waits_for_data(places):
                continue
            return self._hang(running, beats, beat, missing, now_s)
        return None

    def _hang(
        self,
        running: Attempt,
        beats: list[Heartbeat],
        silent: Heartbeat,
        missing: Missing | None,
        now_s: float,
    ) -> Fault:
        """Describe a hang; the rank that the others wait for is its cause."""
        cause = next((beat for beat in beats if missing and beat.rank == missing.ranks[0]), silent)
        message = (
            f"rank {cause.rank} hangs at step {cause.step} ({cause.phase}): no step was finished "
            f"for {now_s - silent.t_mono_s:.1f} s"
        )
        if missing is not None:
            message += f"; {missing.why}"
        detect_s = self._since_s(cause, now_s)
        files = running.stacks()
        if cause.rank in files:
            message += f"; its stack ends at {innermost(files[cause.rank])}"
        return Fault(
            "hang", cause.rank, cause.step, detect_s, message,
            stacks={rank: str(path) for rank, path in files.items()},
        )  # fmt: skip

    def _limit_s(self, beat: Heartbeat) -> float:
        limit_s = self._patient_limit_s(beat)
        known_s = self._times.limit_s(self._floor_s, _HANG_STEPS)
        return limit_s if beat.phase != "step" or known_s is None else min(limit_s, known_s)

    def _patient_limit_s(self, beat: Heartbeat) -> float:
        if beat.phase != "step" or self._times.longest_s == 0.0:
            return self._policy.start_timeout_s
        return max(self._policy.hang_timeout_s, _HANG_STEPS * self._times.longest_s)

    def _note_late_look(self) -> None:
        """Silence counts from when this process could look: it may be held up as its ranks are."""
        now_s = time.monotonic()
        if now_s - self._looked_s > _LATE_S:
            self._awake_since_s = now_s
        self._looked_s = now_s

    def _time_steps(self, beats: list[Heartbeat]) -> None:
        for beat in beats:
            last = self._last_beats.get(beat.rank)
            if last is not None and last.phase == "step" and beat.step > last.step:
                step_s = (beat.t_mono_s - last.t_mono_s) / (beat.step - last.step)
                self._times.add(step_s, beat.step - last.step)
            self._last_beats[beat.rank] = beat

    def _note_stragglers(self, beats: list[Heartbeat]) -> None:
        for slow in self._stragglers.look(beats):
            self._events.emit(
                "straggler.detected", attempt=self._attempt, rank=slow.rank, node=slow.node,
                step=slow.step, n_steps=WINDOW_STEPS, ratio=slow.ratio, median_s=slow.median_s,
                others_s=slow.others_s, action=actions_of("straggler")[0],
            )  # fmt: skip

    def _since_s(self, beat: Heartbeat, now_s: float) -> float:
        """Seconds since a rank was hit: exact when we hit it, else since it was last heard."""
        if self._events.path is not None:
            for event in read_events(self._events.path, "fault.injected"):
                if event["pid"] == beat.pid:
                    return now_s - event["t_mono_s"]
        return now_s - beat.t_mono_s

    def _note_recovery(self, beats: list[Heartbeat]) -> None:
        if self._down_since_s is None or len(beats) < self._job.n_ranks:
            return
        if any(beat.phase == "start" for beat in beats):
            return
        step = min(beat.step for beat in beats)
        self._events.emit(
            "recovery.done", attempt=self._attempt, step=step,
            seconds=time.monotonic() - self._down_since_s,
            steps_lost=max(0, max(self._before, 0) - step),
        )  # fmt: skip
        self._down_since_s = None


def _waits_for_data(places: list[Place]) -> bool:
    """Tell whether some rank waits for its batch: slow input, which a restart does not cure."""
    return any(place.part == DATA and not place.is_stopped for place in places)
