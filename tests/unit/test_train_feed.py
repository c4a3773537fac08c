"""Batches ahead of time: the same ones, the same errors at the same step, and no thread is left."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puna.core.errors import PunaError
from puna.core.ledger import Ledger, read_events
from puna.tokens.loader import Batch, PackedLoader
from puna.train import feed as feed_module
from puna.train.feed import BatchFeed
from puna.train.parallel.layout import Layout
from puna.train.parallel.world import World
from tests.unit.token_shards import arrays, write_large_shards

WORLD = World(0, 1, torch.device("cpu"), 1, None)


class Steps:
    """Batches that hold the number of their step; some cannot be made."""

    n_rows = 2

    def __init__(self, bad: int | None = None, seconds: float = 0.0) -> None:
        self.bad, self.seconds, self.made = bad, seconds, []

    def batch(self, step: int, rank: int, world: int) -> Batch:
        time.sleep(self.seconds)
        if step == self.bad:
            raise PunaError(f"no tokens for step {step}", "bring some")
        self.made.append(step)
        rows = np.full((2 // world, 4), 10 * step + rank)
        return Batch(rows, rows, rows.astype(np.int32), rows.astype(np.int32))

    def lineage(self, step: int) -> list[dict[str, Any]]:
        return []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "puna-batches"]


def make_feed(source: Any, depth: int, first: int = 0, world: World = WORLD) -> BatchFeed:
    return BatchFeed(source, world, first, 12, depth, Ledger(None))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_come_in_order_from_any_step(depth: int) -> None:
    source = Steps()
    with make_feed(source, depth, first=5) as feed:
        found = [int(feed.get(step).tokens_BT[0, 0]) for step in range(5, 12)]
    assert found == [10 * step for step in range(5, 12)]
    assert source.made == list(range(5, 12))
    assert not threads()


def test_a_rank_gets_its_rows() -> None:
    world = World(1, 2, torch.device("cpu"), 1, None, Layout(shard=2))
    with make_feed(Steps(), 2, world=world) as feed:
        assert int(feed.get(0).labels_BT[0, 0]) == 1


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_comes_at_the_step_that_needs_the_batch(depth: int) -> None:
    with make_feed(Steps(bad=4), depth) as feed:
        for step in range(4):
            feed.get(step)
        with pytest.raises(PunaError, match="no tokens for step 4") as raised:
            feed.get(4)
    assert raised.value.fix == "bring some"
    assert not threads()


def test_no_more_than_the_depth_is_made_ahead() -> None:
    source = Steps()
    with make_feed(source, 2) as feed:
        feed.get(0)
        time.sleep(0.3)
        assert len(source.made) <= 4  # the one taken, two that are ready, one that waits for room
    assert not threads()


def test_the_wait_is_what_is_left_of_the_work() -> None:
    waits = {}
    for depth in (0, 2):
        with make_feed(Steps(seconds=0.03), depth) as feed:
            total = 0.0
            for step in range(8):
                feed.get(step)
                total += feed.waited_s if step else 0.0
                time.sleep(0.06)  # the step itself
            waits[depth] = total
    assert waits[0] > 7 * 0.03
    assert waits[2] < 0.5 * waits[0]


def test_a_wrong_step_is_an_error_of_the_program() -> None:
    with make_feed(Steps(), 1) as feed, pytest.raises(ValueError, match="batch of step 0 is next"):
        feed.get(3)


def test_packed_batches_are_the_loaders(tmp_path: Path) -> None:
    folder = write_large_shards(tmp_path / "x", 100_000)
    one = PackedLoader(folder, "train", None, 64, 4, 0)
    with make_feed(one, 2) as feed:
        for step in range(12):
            batch = feed.get(step)
            tensors = (batch.tokens_BT, batch.labels_BT, batch.doc_ids_BT, batch.positions_BT)
            for tensor, array in zip(tensors, arrays(one.batch(step, 0, 1)), strict=True):
                np.testing.assert_array_equal(tensor.numpy(), array)


def damage(folder: Path) -> None:
    path = folder / "train/web/tokens.bin"
    data = bytearray(path.read_bytes())
    data[70_000] ^= 1
    path.write_bytes(data)


def test_documents_that_are_left_out_stand_in_the_ledger_once(tmp_path: Path) -> None:
    folder = write_large_shards(tmp_path / "x", 100_000)
    damage(folder)
    one = PackedLoader(folder, "train", None, 512, 16, 0, on_damage="skip")
    events = Ledger(tmp_path / "events.jsonl")
    with BatchFeed(one, WORLD, 0, 20, 2, events) as feed:
        for step in range(20):
            feed.get(step)
    found = list(read_events(tmp_path / "events.jsonl", "data.left_out"))
    assert sorted(event["document"] for event in found) == sorted(x.document for x in one.left_out)
    assert found
    assert {event["source"] for event in found} == {"web"}
    assert all("bytes 65536 to 131072" in event["why"] for event in found)


def test_ranks_leave_out_what_one_of_them_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks in threads, each with a copy of the shards; that of rank 1 alone is damaged."""
    meeting, box = threading.Barrier(2), [[], []]

    class Pair(World):
        def exchange(self, value: Any) -> list[Any]:
            box[self.rank] = value
            meeting.wait()
            both = list(box)
            meeting.wait()
            return both

        def sum(self, values: Any) -> list[float]:
            return [sum(column) for column in zip(*self.exchange(values), strict=True)]

    monkeypatch.setattr(
        feed_module, "_gather", lambda own, world: [x for part in world.exchange(own) for x in part]
    )
    got: dict[int, list[Any]] = {0: [], 1: []}
    loaders = []
    for rank in range(2):
        folder = write_large_shards(tmp_path / str(rank), 100_000)
        if rank == 1:
            damage(folder)
        loaders.append(PackedLoader(folder, "train", None, 512, 16, 0, on_damage="skip"))

    def run(rank: int) -> None:
        # both compute the same rows, as ranks of one pipeline do
        world = Pair(rank, 2, torch.device("cpu"), 1, None, Layout(pp=2))
        with BatchFeed(loaders[rank], world, 0, 12, 2, Ledger(None)) as feed:
            for step in range(12):
                batch = feed.get(step)
                got[rank].append((batch.tokens_BT.clone(), batch.labels_BT.clone()))

    runners = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
    assert len(got[0]) == len(got[1]) == 12
    assert loaders[0].left_out
    for (tokens, labels), (other_tokens, other_labels) in zip(got[0], got[1], strict=True):
        assert torch.equal(tokens, other_tokens)
        assert torch.equal(labels, other_labels)
