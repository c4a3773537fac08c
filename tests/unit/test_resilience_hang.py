"""Where the ranks of a hung job are, and which one is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puna.resilience.hang import (
    PlaceWriter,
    StepTimes,
    collect_stacks,
    find_missing,
    innermost,
    read_places,
    stack_file,
)
from puna.resilience.protocols import Heartbeat, Place

WAITS = "communication"


@pytest.mark.parametrize(
    ("places", "ranks"),
    [
        ([Place(0, 5, WAITS, 9), Place(1, 5, "backward", 8)], (1,)),
        ([Place(0, 5, "", 7), Place(1, 5, WAITS, 9), Place(2, 5, "forward", 8)], (0,)),
        ([Place(0, 6, "forward", 9), Place(1, 5, "", 9), Place(2, 5, WAITS, 9)], (1,)),
        ([Place(0, 5, WAITS, 9), Place(1, 5, WAITS, 8)], (1,)),
        ([Place(0, 5, WAITS, 9, is_stopped=True), Place(1, 5, "forward", 9)], (0,)),
        ([Place(0, 5, "backward", 0)], (0,)),
    ],
)
def test_the_missing_rank_is_named(places: list[Place], ranks: tuple[int, ...]):
    missing = find_missing(places)
    assert missing is not None
    assert missing.ranks == ranks


@pytest.mark.parametrize("part", [WAITS, "forward"])
def test_ranks_at_the_same_place_accuse_nobody(part: str):
    assert find_missing([Place(0, 5, part, 9), Place(1, 5, part, 9)]) is None


def test_a_place_travels_through_a_file_without_a_call(tmp_path: Path):
    writer = PlaceWriter(tmp_path, 1)
    writer.enter("forward")
    writer.enter(WAITS)
    writer.back_in("forward")
    beats = [Heartbeat(1, os.getpid(), 4, "step", 0.0), Heartbeat(2, 1, 4, "step", 0.0, node=1)]
    assert read_places(tmp_path, beats) == [Place(1, 4, "forward", 1)]


def test_a_limit_needs_steps_and_leaves_out_the_first():
    times = StepTimes()
    times.add(30.0)
    assert times.limit_s(2.0, 10) is None
    for _ in range(6):
        times.add(0.1)
    assert times.limit_s(2.0, 10) == 2.0
    times.add(0.5)
    assert times.limit_s(2.0, 10) == 5.0
    assert times.longest_s == 30.0


CHILD = """
import sys, time
from pathlib import Path
from puna.resilience.hang import write_stacks_on_signal

def endless():
    print("ready", flush=True)
    while True:
        pass

write_stacks_on_signal(Path(sys.argv[1]), 3)
endless()
"""


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_process_that_answers_nothing_writes_its_stack(tmp_path: Path, is_stopped: bool):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        if is_stopped:
            os.kill(child.pid, signal.SIGSTOP)
        beats = [Heartbeat(3, child.pid, 4, "step", time.monotonic())]
        PlaceWriter(tmp_path, 3)
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            (place,) = read_places(tmp_path, beats)
            if place.is_stopped == is_stopped:
                break
        assert place.is_stopped == is_stopped
        stacks = collect_stacks(tmp_path, beats, tmp_path / "kept")
        assert list(stacks) == [3]
        assert stacks[3] == tmp_path / "kept" / stack_file(tmp_path, 3).name
        assert innermost(stacks[3]).endswith(" in endless")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
