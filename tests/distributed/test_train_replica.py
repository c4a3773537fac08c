"""Copies of snapshots in the memory of other ranks: a lost or damaged snapshot costs no step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.device import pick_device
from puna.train.checkpoint.store import CheckpointStore
from puna.train.checkpoint.tiers import CheckpointTiers
from puna.train.checkpoint_config import CheckpointConfig
from puna.train.parallel.layout import Layout
from puna.train.parallel.world import make_world
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def values(step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {
        "a": torch.randn(50 + rank, 3, generator=generator),
        "b": torch.randn(70, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
        "step": torch.tensor(float(step)),
    }


def node_of(folder: Path, rank: int, per_node: int) -> Path:
    """Shared memory of a rank's machine."""
    return folder / f"node-{rank // per_node}"


def session(folder: str, per_node: int, last: int, size: int):
    """Restore, train on to a step, end without a checkpoint; return what was restored."""
    import os

    rank = torch.distributed.get_rank()
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    world = make_world(pick_device("cpu", 0), 1, Layout(shard=size))
    base = Path(folder)
    tensors = {name: torch.zeros_like(value) for name, value in values(0, rank).items()}
    events = Ledger(base / LEDGER_FILE, job="j")
    store = CheckpointStore(
        base / "disk", world, identity="i", keep=2, must_save=True, events=events
    )
    config = CheckpointConfig(every=1000, memory_every=1, replicate=True)
    tiers = CheckpointTiers(
        config, store, node_of(base, rank, per_node), "i", tensors, world, events, 0
    )
    found = tiers.restore()
    start = found.step if found else 0
    if found:
        assert all(torch.equal(tensors[k], v) for k, v in values(start, rank).items()), rank
    for step in range(start + 1, last + 1):
        for name, value in values(step, rank).items():
            tensors[name].copy_(value)
        tiers.after_step(step, "float32", final=False)
    tiers.wait()
    return start


def restored(folder: Path) -> dict:
    *_, event = read_events(folder / LEDGER_FILE, "train.restored")
    assert event["tier"] == "memory"
    return event


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 8
    path.write_bytes(data)


def test_a_lost_node_is_healed_from_the_memory_of_another(tmp_path):
    assert run_ranks(4, session, str(tmp_path), 2, 5, 4) == [0] * 4
    shutil.rmtree(tmp_path / "node-1")
    assert run_ranks(4, session, str(tmp_path), 2, 7, 4) == [5] * 4
    event = restored(tmp_path)
    parts = {(one["rank"], one["shard"], one["tier"]) for one in event["shards"]}
    assert parts == {(r, name, "peer") for r in (2, 3) for name in ("a", "b", "step")}
    shutil.rmtree(tmp_path / "node-0")  # what was copied anew after that serves the other node
    assert run_ranks(4, session, str(tmp_path), 2, 7, 4) == [7] * 4
    assert not list(read_events(tmp_path / LEDGER_FILE, "train.replica_failed"))


def test_a_flipped_bit_is_healed_by_the_copy_and_two_are_the_step_before(tmp_path):
    assert run_ranks(2, session, str(tmp_path), 2, 5, 2) == [0] * 2
    memory = tmp_path / "node-0"
    newest = [p for p in memory.glob("rank-1.*.json") if '"step": 5' in p.read_text()]
    flip(newest[0].with_suffix(".bin"), 4)
    assert run_ranks(2, session, str(tmp_path), 2, 5, 2) == [5] * 2
    assert restored(tmp_path)["shards"] == [{"shard": "a", "tier": "peer", "rank": 1}]
    copies = [p for p in (memory / "peers").glob("rank-0.*.json") if '"step": 5' in p.read_text()]
    flip(newest[0].with_suffix(".bin"), 4)
    flip(copies[0].with_suffix(".bin"), 4)
    assert run_ranks(2, session, str(tmp_path), 2, 5, 2) == [4] * 2
    assert restored(tmp_path)["shards"] == []
