"""Checkpoints in a durable store."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.train.checkpoint import durable as durable_module
from puna.train.checkpoint.durable import DurableStore
from puna.train.checkpoint.manifest import MANIFEST_FILE, list_steps, step_dir, verify
from puna.train.checkpoint.store import CheckpointStore
from puna.train.checkpoint.tiers import CheckpointTiers
from puna.train.checkpoint_config import CheckpointConfig
from puna.train.parallel.world import World
from tests.object_store import serve_s3
from tests.unit.test_train_snapshot import various as state

WORLD = World(0, 1, torch.device("cpu"), 1, None)


@pytest.fixture(scope="module")
def s3():
    with serve_s3("kept") as options:
        yield options


@pytest.fixture(params=["file", "memory", "s3"])
def place(request, tmp_path):
    """URL and options of an empty store."""
    if request.param == "s3":
        return f"s3://kept/{tmp_path.name}", request.getfixturevalue("s3")
    return {"file": f"file://{tmp_path}/store", "memory": f"memory://{tmp_path.name}"}[
        request.param
    ], {}


class Job:
    """A training with a folder and a store."""

    def __init__(self, tmp_path, place, identity="i" * 32, keep=2):
        self.folder, self.ledger = tmp_path / "disk", tmp_path / LEDGER_FILE
        self.tensors = {name: torch.zeros_like(value) for name, value in state().items()}
        events = Ledger(self.ledger, job="j")
        self.durable = DurableStore(*place, identity=identity, keep=keep, events=events)
        store = CheckpointStore(
            self.folder, WORLD, identity=identity, keep=2, must_save=True, events=events,
            durable=self.durable,
        )  # fmt: skip
        self.tiers = CheckpointTiers(
            CheckpointConfig(every=1, memory_every=0), store, None, identity, self.tensors, WORLD,
            events, 0,
        )  # fmt: skip

    def train(self, *steps: int) -> None:
        for step in steps:
            for name, value in state(step).items():
                self.tensors[name].copy_(value)
            self.tiers.after_step(step, "float32", final=False)
            self.durable.wait()

    def restored(self):
        found = self.tiers.restore()
        if found is None:
            return None
        assert all(torch.equal(self.tensors[k], value) for k, value in state(found.step).items())
        *_, event = self.events("train.restored")
        assert (event["step"], event["tier"]) == (found.step, found.tier)
        return event

    def events(self, kind: str) -> list[dict]:
        return list(read_events(self.ledger, kind))

    def files(self) -> dict[str, str]:
        """Path in the store of each file, by name."""
        self.durable._fs.invalidate_cache()
        return {p.rpartition("/")[2]: p for p in self.durable._fs.find(self.durable._root)}

    def damage(self, name: str) -> None:
        """Flip a bit of a file in the store."""
        path = self.files()[name]
        data = bytearray(self.durable._fs.cat_file(path))
        data[len(data) // 2] ^= 4
        self.durable._fs.pipe_file(path, bytes(data))


def shard(job: Job, step: int, name: str):
    manifest = job.durable.manifest(step)
    return next(s for file in manifest.files for s in file.shards if s.name == name)


def test_a_lost_disk_is_restored_from_the_store(tmp_path, place):
    job = Job(tmp_path, place)
    assert job.restored() is None
    job.train(1, 2, 3)
    shutil.rmtree(job.folder)
    again = Job(tmp_path, place)
    event = again.restored()
    assert (event["step"], event["tier"], event["shards"]) == (3, "store", [])
    assert list_steps(job.folder) == [3]
    verify(step_dir(job.folder, 3))
    again.train(4)
    assert again.durable.steps() == [4, 3]
    assert Job(tmp_path, place, identity="k" * 32).durable.steps() == []  # of another job


def test_an_unchanged_shard_is_written_once_and_old_ones_go(tmp_path, place):
    job = Job(tmp_path, place)
    job.train(1, 2, 3)
    written = [event["written_shards"] for event in job.events("train.upload")]
    assert written == [4, 2, 2]  # header, a, b, frozen; then a, b
    kept = {
        s.xxh3_128 for n in (2, 3) for file in job.durable.manifest(n).files for s in file.shards
    }
    assert set(job.files()) == {*kept, "step-00000002.json", "step-00000003.json"}


def test_what_is_damaged_in_the_store_is_never_loaded(tmp_path, place):
    job = Job(tmp_path, place)
    job.train(1, 2)
    job.damage(shard(job, 2, "a").xxh3_128)
    shutil.rmtree(job.folder)
    assert job.restored()["step"] == 1
    (damaged,) = job.events("train.store_damaged")
    assert damaged["shard"] == shard(job, 2, "a").xxh3_128
    job.damage("step-00000001.json")
    shutil.rmtree(job.folder)
    assert job.restored() is None


def test_a_damaged_shard_on_disk_comes_from_the_store_and_so_does_the_manifest(tmp_path, place):
    job = Job(tmp_path, place)
    job.train(1, 2)
    folder = step_dir(job.folder, 2)
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[shard(job, 2, "b").offset] ^= 1
    file.write_bytes(data)
    (folder / MANIFEST_FILE).write_text("{")
    event = job.restored()
    assert (event["step"], event["tier"]) == (2, "disk")
    assert event["shards"] == [{"shard": f"{file.name}:b", "tier": "store"}]
    verify(folder)


def test_a_failed_upload_is_told_and_the_next_one_succeeds(tmp_path, monkeypatch):
    job = Job(tmp_path, (f"file://{tmp_path}/store", {}))
    job.train(1)
    pipe = type(job.durable._fs).pipe_file

    def broken(self, path, data, **kwargs):
        if path.rpartition("/")[2].startswith("step-"):
            raise PermissionError("no")
        return pipe(self, path, data, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(job.durable._fs), "pipe_file", broken)
        job.train(2)
    (failed,) = job.events("train.upload_failed")
    assert failed["step"] == 2
    assert job.durable.steps() == [1]  # without its manifest it is no checkpoint
    job.train(3)
    assert job.durable.steps() == [3, 1]


def test_in_a_full_store_the_oldest_goes_and_the_last_good_one_stays(tmp_path, monkeypatch):
    job = Job(tmp_path, (f"file://{tmp_path}/store", {}), keep=3)
    job.train(1, 2, 3)
    pipe = type(job.durable._fs).pipe_file

    def limited(self, path, data, **kwargs):
        if sum(name.startswith("step-") for name in job.files()) >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pipe(self, path, data, **kwargs)

    monkeypatch.setattr(type(job.durable._fs), "pipe_file", limited)
    room = 2
    job.train(4)
    assert job.durable.steps() == [4, 3]
    room = 0
    job.train(5)
    assert job.durable.steps() == [4]
    (failed,) = job.events("train.upload_failed")
    assert "disk is full" in failed["error"]


def test_a_damaged_file_is_not_uploaded(tmp_path):
    job = Job(tmp_path, (f"file://{tmp_path}/store", {}))
    job.train(1)
    (file,) = step_dir(job.folder, 1).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[shard(job, 1, "a").offset] ^= 1
    file.write_bytes(data)
    manifest = job.durable.manifest(1)
    shutil.rmtree(tmp_path / "store")
    job.durable.put(step_dir(job.folder, 1), manifest)
    job.durable.wait()
    assert "(a) is damaged" in job.events("train.upload_failed")[0]["error"]
    assert job.durable.steps() == []


def test_a_store_that_cannot_be_read_stops_only_a_training_that_needs_it(tmp_path, monkeypatch):
    job = Job(tmp_path, (f"file://{tmp_path}/store", {}))
    job.train(1)

    def refuse(*_args, **_kwargs):
        raise PermissionError("no")

    monkeypatch.setattr(type(job.durable._fs), "ls", refuse)
    assert job.restored()["tier"] == "disk"
    assert job.events("train.store_failed")
    shutil.rmtree(job.folder)
    with pytest.raises(PunaError):
        job.restored()


def test_what_is_being_uploaded_stays_on_disk(tmp_path, monkeypatch):
    import threading

    job, gate = Job(tmp_path, (f"file://{tmp_path}/store", {})), threading.Event()
    upload = DurableStore.upload

    def slow(self, folder, manifest):
        assert gate.wait(20)
        upload(self, folder, manifest)

    monkeypatch.setattr(durable_module.DurableStore, "upload", slow)
    for step in (1, 2, 3, 4):
        job.tiers.after_step(step, "float32", final=False)
    assert list_steps(job.folder) == [4, 3, 1]
    gate.set()
    job.durable.wait()
    assert job.durable.steps() == [4, 1]  # the ones between were overtaken


def test_a_bad_url_or_a_secret_is_refused():
    with pytest.raises(ValueError, match="is no URL"):
        CheckpointConfig(store="folder")
    with pytest.raises(ValueError, match="is a secret"):
        CheckpointConfig(store="s3://a/b", store_options={"secret": "x"})
    assert json.loads(CheckpointConfig(store="s3://a/b").model_dump_json())["store"] == "s3://a/b"
