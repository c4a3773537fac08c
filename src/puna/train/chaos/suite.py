"""Runs the scenarios beside a training without a fault, and judges."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from puna.core.fsio import hash_file, remove_tree
from puna.resilience.faults import SILENT
from puna.resilience.processes import process_alive
from puna.train.chaos.scenarios import Scenario, layout_of
from puna.train.chaos.subject import MissedError, Subject

_WAIT_S = 180.0
_TRIES = 3
_NOTICES = (
    "fault.detected", "train.anomaly", "straggler.detected", "sdc.detected",
    "train.checkpoint_failed",
)  # fmt: skip
_WEIGHTS = Path("model") / "model.safetensors"


@dataclass
class Verdict:
    """How a scenario ended.

    Attributes:
        name: Of the scenario.
        fault: What happened.
        expected: What had to follow.
        problems: What did not; empty when all held.
        detect_s: From the first blow to its notice.
        gap_s: From the first blow to the first step of the next attempt.
        tier: Where the state came from, in the last restart.
        steps_again: Steps computed again.
        seconds: Of the whole scenario.
    """

    name: str
    fault: str
    expected: str
    problems: list[str] = field(default_factory=list)
    detect_s: float | None = None
    gap_s: float | None = None
    tier: str | None = None
    steps_again: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "passed": not self.problems}


class ChaosError(Exception):
    """The training without a fault failed: there is nothing to compare with."""


def run_suite(
    scenarios: Iterable[Scenario],
    folder: Path,
    n_ranks: int,
    *,
    seed: int = 0,
    on_verdict: Callable[[Verdict], None] = lambda _: None,
) -> list[Verdict]:
    """Run scenarios, one after the other.

    Args:
        scenarios: Which.
        folder: For their runs; those of failed ones stay.
        n_ranks: Processes that train.
        seed: Of the choices of whom to hurt.
        on_verdict: Called after each.

    Raises:
        ChaosError: The training without a fault failed.
    """
    calm: dict[bool, _Calm] = {}
    verdicts = []
    for scenario in scenarios:
        key = scenario.is_replicated
        if key not in calm:
            calm[key] = _run_calm(folder / f"calm-{len(calm)}", n_ranks, layout_of(key, n_ranks))
        verdict = _run(scenario, folder, n_ranks, seed, calm[key])
        if not verdict.problems:
            remove_tree(folder / scenario.name)
        on_verdict(verdict)
        verdicts.append(verdict)
    return verdicts


@dataclass(frozen=True)
class _Calm:
    """What a training without a fault came to."""

    steps: dict[int, tuple[float, float]]
    weights: str


def _run_calm(folder: Path, n_ranks: int, layout: dict[str, Any]) -> _Calm:
    subject = Subject(folder, n_ranks, **layout)
    subject.start()
    if subject.wait(_WAIT_S) != 0:
        output = subject.folder / "output.txt"
        raise ChaosError(output.read_text(encoding="utf-8", errors="replace"))
    return _Calm(_steps(subject), hash_file(subject.out / _WEIGHTS))


def _run(scenario: Scenario, folder: Path, n_ranks: int, seed: int, calm: _Calm) -> Verdict:
    start_s = time.monotonic()
    verdict = Verdict(scenario.name, scenario.fault, scenario.expected)
    for number in range(_TRIES):
        subject = Subject(
            folder / scenario.name, n_ranks, scenario.bad_step, seed + number,
            **layout_of(scenario.is_replicated, n_ranks), **scenario.training,
        )  # fmt: skip
        subject.start()
        try:
            scenario.inject(subject)
            code = subject.wait(_WAIT_S)
        except MissedError:
            verdict.problems = ["the moment for the fault did not come"]
            continue
        finally:
            subject.close()
        verdict.problems = _judge(scenario, subject, code, calm, verdict)
        break
    verdict.seconds = time.monotonic() - start_s
    return verdict


def _judge(
    scenario: Scenario,
    subject: Subject,
    code: int | None,
    calm: _Calm,
    verdict: Verdict,
) -> list[str]:
    """Fill in a verdict; return what did not hold."""
    problems = []
    wanted = 0 if scenario.ends == "same" else 2
    if code != wanted:
        problems.append(f"exit code {'none in time' if code is None else code}, not {wanted}")
    _measure(subject, verdict)
    if scenario.detect_s is not None and (
        verdict.detect_s is None or verdict.detect_s > scenario.detect_s
    ):
        noticed = "never" if verdict.detect_s is None else f"after {verdict.detect_s:.2f} s"
        problems.append(f"noticed {noticed}, not within {scenario.detect_s:g} s")
    if scenario.tier is not None and verdict.tier != scenario.tier:
        problems.append(f"went on from {verdict.tier or 'nothing'}, not from {scenario.tier}")
    if any(process_alive(beat.pid) for beat in subject.beats()):
        problems.append("left processes behind")
    problems += _wrongly_named(subject)
    wrong = {
        event["step"]
        for event in subject.events("train.step")
        if (event["loss"], event["grad_norm"]) != calm.steps[event["step"]]
    }
    if wrong:
        problems.append(f"steps {sorted(wrong)} differ from those without a fault")
    if scenario.ends == "same":
        path = subject.out / _WEIGHTS
        if not path.exists() or hash_file(path) != calm.weights:
            problems.append("the final weights differ")
    elif len(subject.events("attempt.start")) != 2:
        problems.append(f"{len(subject.events('attempt.start'))} attempts, not 2")
    return problems


def _wrongly_named(subject: Subject) -> list[str]:
    """Compare the ranks that were slow or wrong with those that were named."""
    slow, wrong = set(), set()
    for event in subject.events("fault.injected"):
        of = slow if event["what"] == "slow" else wrong if event["what"] in SILENT else set()
        of.add(event["rank"])
    is_slow = {event["rank"] for event in subject.events("straggler.detected")}
    is_wrong = {rank for event in subject.events("sdc.detected") for rank in event["ranks"]}
    return [
        f"ranks {sorted(hurt)} were {what}, and {sorted(named) or 'none'} named"
        for what, hurt, named in (("slow", slow, is_slow), ("wrong", wrong, is_wrong))
        if hurt and named != hurt
    ]


def _measure(subject: Subject, verdict: Verdict) -> None:
    events = subject.events()
    restores = [event for event in events if event["kind"] == "train.restore"]
    verdict.tier = restores[-1]["tier"] if restores else None
    steps = [event["step"] for event in events if event["kind"] == "train.step"]
    verdict.steps_again = len(steps) - len(set(steps))
    hurts_s = [
        *subject.hurt_at_s,
        *(event["t_mono_s"] for event in events if event["kind"] == "fault.injected"),
    ]
    if not hurts_s:
        return
    hurt_s = hurts_s[0]
    for event in events:
        after_s = event["t_mono_s"] - hurt_s
        if after_s <= 0:
            continue
        if event["kind"] in _NOTICES and verdict.detect_s is None:
            verdict.detect_s = after_s
        if event["kind"] == "train.step" and event["attempt"] > 0 and verdict.gap_s is None:
            verdict.gap_s = after_s


def _steps(subject: Subject) -> dict[int, tuple[float, float]]:
    return {
        event["step"]: (event["loss"], event["grad_norm"]) for event in subject.events("train.step")
    }
