"""Ranks that compare what they run and measure the ways between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.resilience.heartbeat import HeartbeatWriter
from puna.resilience.protocols import PreflightError
from puna.train import preflight
from puna.train.config import TrainingConfig
from puna.train.parallel.layout import Layout
from puna.train.parallel.world import make_world
from puna.train.spec import JobSpec, SourceSpec
from tests.distributed.ranks import run_ranks
from tests.unit.test_train_loop import MODEL

pytestmark = pytest.mark.distributed


def fly(out: Path, fault: str) -> str:
    """Run the tests on this rank; return how they ended."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = make_world(torch.device("cpu"), 1, Layout(shard=size))
    hit = rank == 1
    spec = JobSpec(
        job="j", out=out, ledger=out / LEDGER_FILE, common={}, source=SourceSpec("a:b"),
        model=MODEL, weights=None, special_ids={},
        training=TrainingConfig(
            steps=1, global_batch=6, nproc=size, seed=8 if hit and fault == "seed" else 7
        ),
    )  # fmt: skip
    folder = out / f"{fault}-{rank}"
    folder.mkdir()
    heart = HeartbeatWriter(folder, rank)
    events = Ledger(spec.ledger if fault == "none" else None, job="j")
    with pytest.MonkeyPatch.context() as patch:
        if hit and fault == "send":  # what it sends is wrong, and it takes it for right
            numbers = preflight._numbers
            patch.setattr(
                preflight, "_numbers", lambda of, device: numbers(of, device) + (of == rank)
            )
        try:
            preflight.run_preflight(spec, 0, world, heart, events)
        except (PunaError, PreflightError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "sound"


def fly_all(out: Path) -> dict[str, str]:
    return {fault: fly(out, fault) for fault in ("none", "seed", "send")}


def test_ranks_compare_what_they_run_and_what_arrives(tmp_path: Path):
    results = run_ranks(2, fly_all, tmp_path)
    assert [of["none"] for of in results] == ["sound"] * 2
    (event,) = read_events(tmp_path / LEDGER_FILE, "preflight.done")
    rates = event["exchange_bytes_per_s"]
    assert len(rates) == 2
    assert event["slowest_bytes_per_s"] == min(rates) > 0
    slow = rates.index(min(rates))
    assert event["slowest_way"] == [1 - slow, slow]
    assert {of["seed"] for of in results} == {
        "PunaError: the ranks do not run the same: seed of the recipe is 7 on rank 0, 8 on rank 1"
    }
    assert [of["send"] for of in results] == [
        "sound",
        "PreflightError: what it sent to all arrived changed at rank 0",
    ]
