"""The parts of a dry run that need no processes, and the command."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from puna.cli.main import cli
from puna.core.errors import PunaError
from puna.train.config import ParallelConfig
from puna.train.dryrun.flight import most_in_flight, single_stage_flight
from puna.train.dryrun.plan import parse_bytes
from puna.train.dryrun.records import Collective, added
from puna.train.dryrun.uneven import Cut, distinct_places, part_size, uneven

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("size", range(12))
@pytest.mark.parametrize("n_parts", [1, 2, 3, 5, 8])
def test_parts_are_those_of_torch_chunk(size, n_parts):
    chunks = [len(x) for x in torch.empty(size).chunk(n_parts)] if size else []
    want = chunks + [0] * (n_parts - len(chunks))
    assert [part_size(size, index, n_parts) for index in range(n_parts)] == want


@pytest.mark.parametrize(("tp", "shards"), [(1, 4), (2, 3), (4, 8), (3, 16)])
def test_every_shape_of_a_part_has_one_place(tp, shards):
    cuts = [Cut("a", (37, 16), 0), Cut("b", (16, 24), 1), Cut("c", (16,), None)]
    shapes = {
        tuple(cut.local_shape(t, tp, s, shards) for cut in cuts)
        for t in range(tp)
        for s in range(shards)
    }
    places = distinct_places(cuts, tp, shards)
    assert places[0] == (0, 0)
    found = [tuple(cut.local_shape(t, tp, s, shards) for cut in cuts) for t, s in places]
    assert len(found) == len(set(found))
    assert set(found) == shapes


def test_uneven_parts_are_named():
    (line,) = uneven([Cut("a.weight", (37, 16), 0), Cut("b", (16, 16), None)], 2, 1)
    assert line == "a.weight: 37 rows over 2 tp ranks, 19 on the first, 18 on the last"


def test_micro_batches_in_flight():
    one = ParallelConfig(pp=4)
    assert [single_stage_flight(one, rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert single_stage_flight(one, 0, 3) == 3
    assert single_stage_flight(ParallelConfig(pp=4, schedule="gpipe"), 3, 8) == 8
    actions = [("F", 0), ("F", 1), ("F", 0), ("I", 1), ("W", 1), ("B", 0), ("F", 1)]
    assert most_in_flight(actions, {0: 10, 1: 3}) == 23


def test_counts_go_on_in_a_straight_line():
    once, each = Collective("shard", "all_gather", 4, 8), Collective("tp", "all_reduce", 2, 8)
    assert added({once: 1, each: 2}, {each: 1}, 3) == Counter({once: 1, each: 5})
    assert each.sent_bytes == 8
    assert once.sent_bytes == 6


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29), ("24e9", 24 * 10**9)]
)
def test_amounts_of_memory(text, n_bytes):
    assert parse_bytes(text, "x") == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80 XB", "nan", "inf"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(PunaError):
        parse_bytes(text, "--device-memory")


SMALL = [
    "train.pretrain.model={preset='tiny', n_layers=3, tie_embeddings=false}",
    "train.pretrain.global_batch=8", "train.pretrain.seq_len=128", "train.pretrain.launch.nodes=1",
    "train.pretrain.parallel.tp=2", "train.pretrain.parallel.pp=2", "train.pretrain.nproc=4",
]  # fmt: skip


def plan(*arguments: str):
    return CliRunner().invoke(cli, ["train", "plan", str(RECIPES / "llama3-8b.toml"), *arguments])


def test_plan_of_a_small_training():
    result = plan(*SMALL, "--world", "8", "--json", "--device-memory", "1GB")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["kind"] == "prediction"
    assert found["world"] == 8
    assert found["fits"]
    assert found["layout"] == {"replicate": 1, "shard": 2, "pp": 2, "cp": 1, "tp": 2}
    assert [rank["stages"][0]["layers"] for rank in found["ranks"]] == [[0, 1], [1, 3]]
    for rank in found["ranks"]:
        assert rank["total_bytes"] == sum(rank["bytes"].values())
        held = rank["n_params"] / 4  # over 2 x 2 ranks; norms are shared by 2 only
        assert rank["bytes"]["parameters"] == pytest.approx(4 * held, rel=0.05)
        assert rank["bytes"]["optimizer"] == pytest.approx(8 * held, rel=0.05)
        dims = {one["dim"] for one in rank["collectives"]}
        assert dims == {"all", "tp", "pp", "shard"}
        sends = [one for one in rank["collectives"] if one["kind"] == "send"]
        assert sum(one["count"] for one in sends) == found["micro_batches"]
    assert math.isclose(
        sum(rank["n_params"] for rank in found["ranks"]), found["n_params"], rel_tol=1e-9
    )


def gathers(*arguments: str) -> int:
    """Count the gatherings of parameters in a step of a rank without a pipeline."""
    result = plan(
        *SMALL, "train.pretrain.parallel.tp=1", "train.pretrain.parallel.pp=1", *arguments,
        "--world", "4", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (rank,) = json.loads(result.output)["ranks"]
    return sum(
        one["count"] for one in rank["collectives"]
        if (one["dim"], one["kind"]) == ("shard", "all_gather")
    )  # fmt: skip


def test_parameters_are_gathered_once_per_step_where_memory_allows():
    whole, halves = (f"train.pretrain.micro_batch={rows}" for rows in (2, 1))
    assert gathers(halves) == gathers(whole)
    again = "train.pretrain.parallel.reshard_after_forward=true"
    assert gathers(halves, again) == 2 * gathers(whole, again) > 2 * gathers(whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.pretrain.parallel.tp=3", "train.pretrain.nproc=6"], "tp = 3"),
        (["train.pretrain.seq_len=129"], "seq_len"),
        (["train.pretrain.parallel.pp=8", "train.pretrain.nproc=16"], "stages"),
        (["--device-memory", "much"], "--device-memory"),
        (["--world", "7"], "nproc=7"),
    ],
)
def test_a_layout_that_cannot_work_is_refused(arguments, words, monkeypatch):
    monkeypatch.setattr("puna.train.dryrun.plan.FreshProcesses", None)  # nothing is built
    result = plan(*SMALL, *arguments)
    assert isinstance(result.exception, PunaError)
    assert words in str(result.exception)
