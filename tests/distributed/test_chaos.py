"""Scenarios of ``puna chaos`` on two ranks; the command itself runs all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from puna.cli.main import cli
from puna.core.errors import PunaError
from puna.train.chaos.scenarios import SCENARIOS
from puna.train.chaos.subject import Subject
from puna.train.chaos.suite import run_suite

BY_NAME = {one.name: one for one in SCENARIOS}
CHOSEN = ("bad-data",)
"""What no other test does to a whole run; `puna chaos` does all."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_survives_and_what_is_late_fails(tmp_path: Path) -> None:
    late = replace(BY_NAME["kill-rank"], name="late", detect_s=0.0, tier="store")
    *good, bad = run_suite([*(BY_NAME[name] for name in CHOSEN), late], tmp_path, n_ranks=2)
    assert {one.name: one.problems for one in good if one.problems} == {}
    assert {one.name for one in good if one.gap_s is None} == {"bad-data"}
    assert [problem.split(" ")[0] for problem in bad.problems] == ["noticed", "went"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_training_survives_everything(tmp_path: Path) -> None:
    verdicts = run_suite(SCENARIOS, tmp_path, n_ranks=2)
    assert {one.name: one.problems for one in verdicts if one.problems} == {}


def test_a_fault_that_needs_a_replica_needs_two_ranks() -> None:
    result = CliRunner().invoke(cli, ["chaos", "flip-weight", "--ranks", "1"])
    assert isinstance(result.exception, PunaError)
    assert result.exception.fix == "set --ranks 2"


def losses(subject: Subject) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in subject.events("train.step")]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_processes_that_wait_take_over(tmp_path: Path) -> None:
    changes = {"steps": 1000, "restart": {"standby_after_s": 0.0}}
    calm, hit = (Subject(tmp_path / name, 2, **changes) for name in ("calm", "hit"))
    calm.start()
    assert calm.wait(250) == 0
    hit.start()
    try:
        folder = hit.out / "state" / "attempt-1"
        hit.until(lambda: len(list(folder.glob("ready-*"))) == 2)
        ready = {int(path.read_text()) for path in folder.glob("ready-*")}
        hit.hurt(hit.at_step(0)[1].pid)
        assert {beat.pid for beat in hit.next_attempt(1, "step")} <= ready
        assert hit.wait(250) == 0
        assert hit.events("attempt.start")[-1]["attempt"] == 1
        assert sorted(set(losses(hit))) == losses(calm)
    finally:
        hit.close()


def test_an_unknown_scenario_is_named() -> None:
    result = CliRunner().invoke(cli, ["chaos", "kill-everything"])
    assert isinstance(result.exception, PunaError)
    assert "kill-everything" in result.exception.message
