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
from puna.train.checkpoint import snapshot as snapshot_module
from puna.train.checkpoint import store as store_module
from puna.train.checkpoint.manifest import (
    MANIFEST_FILE,
    DamagedCheckpointError,
    list_steps,
    merkle_root,
    read_manifest,
    step_dir,
    verify,
)
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


def various(step: int = 0) -> dict[str, torch.Tensor]:
    """A state in which no two shards of any steps are the same, but for one that never changes."""
    generator = torch.Generator().manual_seed(step)
    return {
        "a": torch.randn(50, 3, generator=generator),
        "b": torch.randn(70, generator=generator).bfloat16(),
        "frozen": torch.arange(9.0),
    }


def train_various(tmp_path, first: int, last: int, tensors=None, tiers=None):
    tensors = tensors or various()
    tiers = tiers or make_tiers(tmp_path, tensors)
    for step in range(first, last + 1):
        for name, value in various(step).items():
            tensors[name].copy_(value)
        tiers.after_step(step, "float32", final=False)
        tiers.wait()
    return tensors, tiers


def restored_various(tmp_path, **config):
    """Restore in a new place of work; check the values; return the event."""
    tensors = {name: torch.zeros_like(value) for name, value in various().items()}
    found = make_tiers(tmp_path, tensors, **config).restore()
    assert found is not None
    assert all(torch.equal(tensors[key], value) for key, value in various(found.step).items())
    *_, event = read_events(tmp_path / LEDGER_FILE, "train.restored")
    assert (event["step"], event["tier"]) == (found.step, found.tier)
    return event


def shard_of(tmp_path, step: int, name: str):
    """File on disk and where a tensor begins in it."""
    folder = step_dir(tmp_path / "disk", step)
    for file in read_manifest(folder).files:
        for shard in file.shards:
            if shard.name == name:
                return folder / file.path, shard.offset
    raise AssertionError(name)


def test_a_damaged_snapshot_is_repaired_from_disk(tmp_path):
    train_various(tmp_path, 1, 4)
    flip(buffers(tmp_path / "memory", 4)[0])
    event = restored_various(tmp_path)
    assert (event["step"], event["tier"]) == (4, "memory")
    assert event["shards"] == [{"shard": "a", "tier": "disk", "rank": 0}]
    assert restored_various(tmp_path)["shards"] == []  # it was repaired for good


def test_a_damaged_checkpoint_is_repaired_from_a_snapshot_and_another_checkpoint(tmp_path):
    train_various(tmp_path, 1, 8)
    file, at = shard_of(tmp_path, 8, "b")
    flip(file, at)
    flip(file, shard_of(tmp_path, 8, "frozen")[1])
    flip(file, 3)  # the header, which is the same at every step
    file.write_bytes(file.read_bytes() + b"more")
    for note in (tmp_path / "memory").glob("*.json"):  # other ranks: nobody's snapshot to go on
        note.rename(note.with_name(note.name.replace("rank-0", "rank-7")))
    for buffer in (tmp_path / "memory").glob("*.bin"):
        buffer.rename(buffer.with_name(buffer.name.replace("rank-0", "rank-7")))
    event = restored_various(tmp_path)
    assert (event["step"], event["tier"]) == (8, "disk")
    tiers = {one["shard"].rpartition(":")[2]: one["tier"] for one in event["shards"]}
    assert tiers == {"b": "memory", "frozen": "memory", "": "disk"}
    assert not list(read_events(tmp_path / LEDGER_FILE, "train.checkpoint_damaged"))
    verify(step_dir(tmp_path / "disk", 8))


def test_what_no_tier_has_any_more_is_the_checkpoint_before(tmp_path):
    train_various(tmp_path, 1, 9)
    for buffer in (tmp_path / "memory").glob("*.bin"):
        flip(buffer)
    file, at = shard_of(tmp_path, 8, "a")
    flip(file, at)
    event = restored_various(tmp_path)
    assert (event["step"], event["tier"], event["shards"]) == (4, "disk", [])


@pytest.mark.parametrize("field", ["step", "world", "dtype", "xxh3_128", "offset"])
def test_no_field_of_a_manifest_changes_unnoticed(tmp_path, field):
    train_various(tmp_path, 4, 4)
    path = step_dir(tmp_path / "disk", 4) / MANIFEST_FILE
    values = json.loads(path.read_text())
    place = values if field in values else values["files"][0]["shards"][1]
    place[field] = place[field] + 1 if isinstance(place[field], int) else "f" * 32
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedCheckpointError, match="another root"):
        read_manifest(path.parent)


def test_a_file_that_does_not_belong_to_a_checkpoint_is_found_and_removed(tmp_path):
    train_various(tmp_path, 4, 4)
    folder = step_dir(tmp_path / "disk", 4)
    foreign = folder / "z.safetensors"
    foreign.write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"z\.safetensors does not belong"):
        verify(folder)
    restored_various(tmp_path, memory_every=0)
    assert not foreign.exists()


def test_the_root_depends_on_every_leaf_and_on_their_order():
    leaves = [str(i) for i in range(7)]
    roots = {merkle_root(leaves[:n]) for n in range(8)}
    roots |= {merkle_root([*leaves[:i], "x", *leaves[i + 1 :]]) for i in range(7)}
    roots |= {merkle_root(leaves[::-1])}
    assert len(roots) == 16


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
    tiers = make_tiers(tmp_path, tensors, on_failure="stop")
    tiers.restore()
    monkeypatch.setattr(store_module, "seal", full)
    train(tiers, tensors, 1, 7)
    with pytest.raises(PunaError, match=r"checkpoint of step 4 .*disk is full"):
        train(tiers, tensors, 8, 8)
    monkeypatch.undo()
    assert list((tmp_path / "disk").iterdir()) == []


def test_on_a_full_disk_the_oldest_goes_and_the_last_good_one_stays(tmp_path, monkeypatch):
    tensors, tiers = train_various(tmp_path, 1, 8)
    seal, room = store_module.seal, 1

    def limited(folder, **kwargs):
        if len(list_steps(tmp_path / "disk")) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return seal(folder, **kwargs)

    monkeypatch.setattr(store_module, "seal", limited)
    train_various(tmp_path, 12, 12, tensors, tiers)
    assert list_steps(tmp_path / "disk") == [12, 8]
    (dropped,) = read_events(tmp_path / LEDGER_FILE, "train.checkpoint_dropped")
    assert dropped["step"] == 4
    room = 0
    train_various(tmp_path, 16, 16, tensors, tiers)
    assert list_steps(tmp_path / "disk") == [12]
    (failed,) = read_events(tmp_path / LEDGER_FILE, "train.checkpoint_failed")
    assert failed["step"] == 16
    assert "disk is full" in failed["error"]
    with pytest.raises(PunaError, match="disk is full"):
        tiers.after_step(17, "float32", final=True)
    monkeypatch.undo()
    train_various(tmp_path, 20, 20, tensors, tiers)
    assert list_steps(tmp_path / "disk") == [20, 12]
    assert restored_various(tmp_path)["step"] == 20


def test_a_snapshot_that_cannot_be_committed_is_told_and_the_checkpoint_is_saved(
    tmp_path, monkeypatch
):
    tensors, tiers = train_various(tmp_path, 1, 3)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module, "write_json", full)
        train_various(tmp_path, 4, 4, tensors, tiers)
    (failed,) = read_events(tmp_path / LEDGER_FILE, "train.snapshot_failed")
    assert "No space" in failed["why"]
    assert list_steps(tmp_path / "disk") == [4]
    assert restored_various(tmp_path)["tier"] == "disk"
    train_various(tmp_path, 5, 5, tensors, tiers)
    assert restored_various(tmp_path)["step"] == 5


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
