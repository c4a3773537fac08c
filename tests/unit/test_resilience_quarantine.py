"""Strikes, quarantine, burn-in, without a rank."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from puna.core.errors import PunaError
from puna.resilience import burn_in
from puna.resilience.burn_in import BurnIn
from puna.resilience.quarantine import QUARANTINE_FILE, Quarantine, read_record


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quarantine(tmp_path: Path, clock: Clock) -> Quarantine:
    return Quarantine(tmp_path / "shared" / QUARANTINE_FILE, 2, 3600.0, now=clock)


def test_two_strikes_within_the_window(quarantine: Quarantine, clock: Clock):
    assert not quarantine.read().standing("a").is_out
    assert not quarantine.strike("a", "killed", 5)
    assert not quarantine.strike("b", "hang", 6)
    clock.now_s += 3600
    assert quarantine.strike("a", "killed", 9)
    record = quarantine.read()
    assert record.standing("a").state == "quarantined"
    assert record.standing("a").why == "killed at step 9, fault 2"
    assert [(one.fault, one.step) for one in record.strikes_of("a")] == [
        ("killed", 5),
        ("killed", 9),
    ]
    assert not record.standing("b").is_out
    assert not quarantine.strike("a", "killed", 10)  # it is there already


def test_old_strikes_are_forgotten(quarantine: Quarantine, clock: Clock):
    quarantine.strike("a", "killed", 5)
    clock.now_s += 3601
    assert not quarantine.strike("a", "killed", 9)
    assert [one.step for one in quarantine.read().strikes_of("a")] == [9]


def test_wrong_answers_need_no_second_strike(quarantine: Quarantine):
    assert quarantine.strike("a", "silent corruption (persistent)", 5, is_certain=True)
    assert quarantine.read().standing("a").why == "silent corruption (persistent) at step 5"


def test_a_node_comes_back_on_probation_or_stays_out(quarantine: Quarantine):
    for node in ("a", "b"):
        quarantine.strike(node, "killed", 1)
        quarantine.strike(node, "killed", 2)
    quarantine.passed("a")
    quarantine.failed("b", ["memory", "attention"])
    record = quarantine.read()
    assert (record.standing("a").state, record.standing("a").times) == ("good", 1)
    assert record.standing("b").state == "rejected"
    assert record.standing("b").why == "failed: memory, attention"
    assert quarantine.strike("a", "killed", 3)  # within the window one more is enough
    assert quarantine.read().standing("a").times == 2


def test_runs_that_share_the_file_lose_no_strike(tmp_path: Path):
    path = tmp_path / QUARANTINE_FILE

    def strike(node: str) -> None:
        for step in range(20):
            Quarantine(path, n_strikes=100).strike(node, "killed", step)

    threads = [threading.Thread(target=strike, args=(node,)) for node in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = read_record(path)
    assert [len(record.strikes_of(node)) for node in ("a", "b", "c")] == [20, 20, 20]


@pytest.mark.parametrize("text", ["{", "[]", '{"strikes": [{"who": 1}], "standings": {}}'])
def test_a_file_that_is_something_else(tmp_path: Path, text: str):
    path = tmp_path / QUARANTINE_FILE
    path.write_text(text)
    with pytest.raises(PunaError, match=r"quarantine\.json does not say which nodes"):
        read_record(path)


def test_burn_in_runs_beside():
    test = BurnIn(0.0, "cpu")
    try:
        deadline_s = time.monotonic() + 60
        while (failed := test.failed()) is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert failed == []
    finally:
        test.stop()


def test_a_machine_that_cannot_run_the_tests_has_not_passed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(burn_in.sys, "executable", "/bin/false")
    test = BurnIn(0.0, "cpu")
    try:
        while (failed := test.failed()) is None:
            time.sleep(0.01)
        assert failed == ["the tests ended with exit code 1"]
    finally:
        test.stop()


def test_what_the_burn_in_finds_is_told(monkeypatch: pytest.MonkeyPatch, capsys):
    from puna.resilience.sdc import known

    monkeypatch.setattr(known, "KNOWN", {"sum": lambda device, turn: False})
    monkeypatch.setattr(burn_in, "die_with_parent", lambda pid: None)
    burn_in.main(["1", "0", "auto:0"])
    assert [one.partition(" ")[0] for one in json.loads(capsys.readouterr().out)] == ["sum"]
