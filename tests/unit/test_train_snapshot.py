"""Snapshots in shared memory, and checkpoints written from them in the background."""

from __future__ import annotations

import errno
import json
import os
import threading

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.train.checkpoint import store as store_module
from puna.train.checkpoint.manifest import list_steps
from puna.train.checkpoint.snapshot import Snapshots
from puna.train.checkpoint.store import CheckpointStore
from puna.train.checkpoint.tiers import CheckpointTiers
from puna.train.config import CheckpointConfig
from puna.train.parallel.world import World

WORLD = World(0, 1, torch.device("cpu"), 1, None)


def state(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "a": torch.full((5, 3), value),
        "b": torch.full((7,), value, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "step": torch.tensor(value),
    }


def fill(tensors: dict[str, torch.Tensor], value: float) -> None:
    for tensor in tensors.values():
        tensor.fill_(value)


def is_all(tensors: dict[str, torch.Tensor], value: float) -> bool:
    return all(bool((tensor == value).all()) for tensor in tensors.values())


def flip(path, at: int = 8) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


def buffers(folder, step: int):
    """Buffer and note of a snapshot."""
    for note in folder.glob("*.json"):
        if json.loads(note.read_text())["step"] == step:
            return note.with_suffix(".bin"), note
    raise AssertionError(step)


def taken(folder, *steps: int, key: str = "k") -> dict[str, torch.Tensor]:
    tensors = state()
    snapshots = Snapshots(folder, 0, key, tensors)
    for step in steps:
        fill(tensors, step)
        snapshots.take(step, "float32")
        fill(tensors, -1)  # the live ones may change at once
    snapshots.settle()
    return tensors


def test_the_two_newest_outlive_the_process(tmp_path):
    taken(tmp_path, 1, 2, 3)
    tensors = state()
    again = Snapshots(tmp_path, 0, "k", tensors)
    assert again.steps() == [3, 2]
    assert again.load(2) == "float32"
    assert is_all(tensors, 2)
    again.load(3)
    assert is_all(tensors, 3)
    with pytest.raises(ValueError, match="no whole snapshot of step 1"):
        again.load(1)


@pytest.mark.parametrize("at", [0, 33, 64, 77])
def test_one_flipped_bit_is_found_and_the_other_snapshot_serves(tmp_path, at):
    taken(tmp_path, 4, 5)
    flip(buffers(tmp_path, 5)[0], at)
    assert Snapshots(tmp_path, 0, "k", state()).steps() == [4]
    flip(buffers(tmp_path, 4)[0], at)
    assert Snapshots(tmp_path, 0, "k", state()).steps() == []


def test_a_changed_note_and_swapped_buffers_are_found(tmp_path):
    taken(tmp_path, 4, 5)
    _, note = buffers(tmp_path, 5)
    note.write_text(note.read_text().replace('"step": 5', '"step": 9'))
    assert Snapshots(tmp_path, 0, "k", state()).steps() == [4]
    first, second = sorted(tmp_path.glob("*.bin"))
    first.rename(tmp_path / "x"), second.rename(first), (tmp_path / "x").rename(second)
    assert Snapshots(tmp_path, 0, "k", state()).steps() == []


def test_a_copy_that_was_broken_off_is_no_snapshot(tmp_path, monkeypatch):
    taken(tmp_path, 4, 5)
    tensors = state(6.0)
    snapshots = Snapshots(tmp_path, 0, "k", tensors)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "_foreach_copy_", killed)
    with pytest.raises(KeyboardInterrupt):
        snapshots.take(6, "float32")
    monkeypatch.undo()
    assert Snapshots(tmp_path, 0, "k", tensors).steps() == [5]


def test_snapshots_of_another_job_or_shape_are_not_read(tmp_path):
    taken(tmp_path, 4, 5)
    assert Snapshots(tmp_path, 0, "another", state()).steps() == []
    assert Snapshots(tmp_path, 1, "k", state()).steps() == []
    other = {**state(), "a": torch.zeros(15)}
    assert Snapshots(tmp_path, 0, "k", other).steps() == [5, 4]  # the same bytes by the same name
    assert Snapshots(tmp_path, 0, "k", {**state(), "a": torch.zeros(400, 3)}).steps() == []


def test_a_snapshot_that_is_read_is_not_overwritten(tmp_path):
    tensors = taken(tmp_path, 1, 2)
    snapshots = Snapshots(tmp_path, 0, "k", tensors)
    with snapshots.pinned(2) as kept:
        for step in (3, 4, 5):
            fill(tensors, step)
            snapshots.take(step, "float32")
        assert snapshots.steps() == [5, 2]
        assert is_all(kept, 2)
    snapshots.take(6, "float32")
    assert snapshots.steps() == [6, 5]


def make_tiers(tmp_path, tensors, **config):
    events = Ledger(tmp_path / LEDGER_FILE, job="j")
    cfg = CheckpointConfig(**{"every": 4, "memory_every": 1, **config})
    store = CheckpointStore(
        tmp_path / "disk", WORLD, identity="i", keep=cfg.keep, events=events,
        must_save=cfg.on_failure == "stop",
    )  # fmt: skip
    return CheckpointTiers(cfg, store, tmp_path / "memory", "i", tensors, WORLD, events, 0)


def train(tiers, tensors, first: int, last: int, final: bool = False) -> None:
    for step in range(first, last + 1):
        fill(tensors, step)
        if tiers.is_due(step, final=final and step == last):
            tiers.after_step(step, "float32", final=final and step == last)


def test_each_tier_serves_where_the_nearer_one_does_not(tmp_path):
    tensors = state()
    tiers = make_tiers(tmp_path, tensors)
    assert tiers.restore() is None
    train(tiers, tensors, 1, 8)
    tiers.wait()
    train(tiers, tensors, 9, 10)
    tiers.wait()
    assert list_steps(tmp_path / "disk") == [8, 4]

    def restored() -> tuple[int, str]:
        tensors = state()
        found = make_tiers(tmp_path, tensors).restore()
        assert found is not None
        assert is_all(tensors, found.step)
        return found.step, found.tier

    assert restored() == (10, "memory")
    flip(buffers(tmp_path / "memory", 10)[0])
    assert restored() == (9, "memory")
    flip(buffers(tmp_path / "memory", 9)[0])
    assert restored() == (8, "disk")
    shard = next((tmp_path / "disk" / "step-00000008").glob("*.safetensors"))
    flip(shard, shard.stat().st_size - 3)
    assert restored() == (4, "disk")
    (damaged,) = read_events(tmp_path / LEDGER_FILE, "train.checkpoint_damaged")
    assert damaged["step"] == 8


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, monkeypatch):
    tensors, gate = state(), threading.Event()
    seal = store_module.seal

    def slow_seal(*args, **kwargs):
        assert gate.wait(20)
        return seal(*args, **kwargs)

    monkeypatch.setattr(store_module, "seal", slow_seal)
    tiers = make_tiers(tmp_path, tensors, memory_every=2)
    tiers.restore()
    train(tiers, tensors, 1, 7)  # with the checkpoint of step 4 waiting at the gate
    assert list_steps(tmp_path / "disk") == []
    gate.set()
    train(tiers, tensors, 8, 9, final=True)
    assert list_steps(tmp_path / "disk") == [9, 8]
    tensors = state()
    CheckpointStore(
        tmp_path / "disk", WORLD, identity="i", keep=2, must_save=True, events=Ledger(None, job="j")
    ).restore(tensors)
    assert is_all(tensors, 9)


def test_a_failed_save_in_the_background_is_told_at_the_next_one(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tensors = state()
    tiers = make_tiers(tmp_path, tensors)
    tiers.restore()
    monkeypatch.setattr(store_module, "seal", full)
    train(tiers, tensors, 1, 7)
    with pytest.raises(PunaError, match=r"checkpoint of step 4 .*disk is full"):
        train(tiers, tensors, 8, 8)
    monkeypatch.undo()
    assert list((tmp_path / "disk").iterdir()) == []


def test_without_room_in_memory_checkpoints_go_to_disk(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    tensors = state()
    tiers = make_tiers(tmp_path, tensors)
    tiers.restore()
    train(tiers, tensors, 1, 9)
    assert list_steps(tmp_path / "disk") == [8, 4]
    (off,) = read_events(tmp_path / LEDGER_FILE, "train.snapshots_off")
    assert "No space" in off["why"]
