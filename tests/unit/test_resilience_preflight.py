"""Tests before the first step: what is unsound is named, what differs among ranks is refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.ledger import Ledger, read_events
from puna.resilience import preflight
from puna.resilience.heartbeat import HeartbeatWriter, read_failures
from puna.resilience.protocols import PreflightError
from puna.resilience.sdc import known
from puna.train.config import AdamWConfig, CheckpointConfig
from puna.train.preflight import checkpoint_bytes, run_preflight
from puna.train.preflight_config import PreflightConfig
from tests.unit.test_train_loop import MODEL, WORLD, job

CPU = torch.device("cpu")
Usage = namedtuple("Usage", "total used free")


def test_a_wrong_answer_is_named(monkeypatch):
    monkeypatch.setitem(known.KNOWN, "attention", lambda device, turn: False)
    with pytest.raises(PreflightError, match="known answers on cpu came out wrong: attention"):
        preflight.check_answers(CPU)


def test_a_burn_in_finds_what_comes_late_and_shows_signs_of_life(monkeypatch):
    turns: list[int] = []

    def late(device: torch.device, turn: int) -> bool:
        turns.append(turn)
        return len(turns) < 50

    monkeypatch.setattr(known, "KNOWN", {"late": late})
    monkeypatch.setattr(preflight, "_TURN_S", 0.0)
    beats: list[int] = []
    with pytest.raises(PreflightError, match="late"):
        preflight.check_answers(CPU, 60.0, lambda: beats.append(1))
    assert len(beats) == 49


def test_a_disk_that_gives_back_something_else_is_found(tmp_path: Path, monkeypatch):
    times = preflight.check_disk(tmp_path, 1 << 20, "0")
    assert times.n_bytes == 1 << 20
    assert list(tmp_path.iterdir()) == []

    def flipped(path: Path) -> str:
        content = bytearray(path.read_bytes())
        content[12_345] ^= 1
        path.write_bytes(content)
        return hash_file(path)

    hash_file = preflight.hash_file
    monkeypatch.setattr(preflight, "hash_file", flipped)
    with pytest.raises(PreflightError, match="read back changed"):
        preflight.check_disk(tmp_path, 1 << 20, "0")
    assert list(tmp_path.iterdir()) == []


def test_what_differs_is_named_with_its_ranks():
    same = preflight.handshake({"seed of the recipe": 1, "optim of the recipe": {"lr": "x" * 99}})
    preflight.check_handshakes([same] * 5)
    other = {**same, "torch": "1.0", "seed of the recipe": "2"}
    with pytest.raises(PunaError) as refused:
        preflight.check_handshakes([same, same, other, same])
    assert refused.value.message == (
        f"the ranks do not run the same: torch is {torch.__version__} on rank 0, 1, 3, "
        "1.0 on rank 2; seed of the recipe is 1 on rank 0, 1, 3, 2 on rank 2"
    )
    assert len(max(same.values(), key=len)) < 64


def flown(spec) -> dict:
    heart = HeartbeatWriter(spec.attempt_dir(0), 0)
    run_preflight(spec, 0, WORLD, heart, Ledger(spec.ledger, job="j"))
    return next(read_events(spec.ledger, "preflight.done"))


def test_one_rank_tells_what_it_tested(tmp_path: Path):
    event = flown(job(tmp_path))
    assert event["seconds"] >= event["answers_s"] > 0
    assert set(event["disks"]) == {"0"}
    assert set(event["disks"]["0"]) == {"write_bytes_per_s", "read_bytes_per_s"}
    assert list((tmp_path / "checkpoints").iterdir()) == []
    off = job(tmp_path / "off", preflight=PreflightConfig(enabled=False))
    with pytest.raises(StopIteration):
        flown(off)


def test_a_disk_without_room_is_a_warning_or_the_end(tmp_path: Path, monkeypatch):
    spec = job(tmp_path)
    n_params = 2 * 37 * 16 + 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 24 + 2 * 16) + 16
    assert checkpoint_bytes(spec) == 12 * n_params
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 9, 9))
    assert "9 B are free" in flown(spec)["disks"]["0"]["warning"]
    strict = job(tmp_path / "strict", checkpoint=CheckpointConfig(on_failure="stop"))
    with pytest.raises(PunaError, match=r"before the first step: .*9 B are free"):
        flown(strict)


def test_the_failure_note_says_that_it_was_a_test(tmp_path: Path):
    heart = HeartbeatWriter(tmp_path, 3, node=1)
    heart.fail(PreflightError("attention came out wrong"), "Traceback")
    (note,) = read_failures(tmp_path)
    assert (note.kind, note.rank) == ("preflight", 3)
    assert note.message == "before the first step, rank 3 (node 1): attention came out wrong"


def test_another_learning_rate_is_another_recipe(tmp_path: Path):
    from puna.train.preflight import _settings

    one, two = job(tmp_path), job(tmp_path, optim=AdamWConfig(lr=5e-3))
    three = replace(one, model=MODEL.model_copy(update={"rope_theta": 7.0}))
    shown = [preflight.handshake(_settings(spec)) for spec in (one, two, three)]
    differ = [name for name in shown[0] if len({one[name] for one in shown}) > 1]
    assert differ == ["the model", "optim of the recipe"]
    assert json.dumps(shown)
