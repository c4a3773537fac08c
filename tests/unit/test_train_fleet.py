"""Which nodes are chosen, without starting a rank."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from puna.cli.main import cli
from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LlamaConfig
from puna.resilience.heartbeat import HeartbeatWriter
from puna.resilience.protocols import Fault
from puna.resilience.quarantine import QUARANTINE_FILE, Quarantine
from puna.train import fleet as fleet_module
from puna.train import follow as follow_module
from puna.train import nodes
from puna.train.config import ParallelConfig, RestartConfig, TrainingConfig
from puna.train.elastic import allowed_ranks, check_elastic, shrunk, spec_of
from puna.train.fleet import Fleet
from puna.train.follow import follow
from puna.train.launch_config import LaunchConfig
from puna.train.nodes import NODES_DIR, Leader
from puna.train.restart_config import QuarantineConfig
from puna.train.spec import JobSpec, SourceSpec

MODEL = LlamaConfig(
    vocab_size=33, dim=12, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=18, max_seq_len=16
)


def config(**values: Any) -> TrainingConfig:
    usual = {"steps": 9, "seq_len": 16, "global_batch": 24, "nproc": 4, "device": "cpu"}
    return TrainingConfig(**{**usual, **values})


def elastic(least: int, **values: Any) -> RestartConfig:
    return RestartConfig(min_nproc=least, **values)


def test_numbers_of_ranks_that_share_the_batch():
    assert allowed_ranks(config(), MODEL) == [4]
    assert allowed_ranks(config(restart=elastic(1)), MODEL) == [4, 3, 2, 1]
    assert allowed_ranks(config(restart=elastic(2)), MODEL) == [4, 3, 2]
    assert allowed_ranks(config(restart=elastic(1), nproc=8), MODEL) == [8, 6, 4, 3, 2, 1]
    layout = ParallelConfig(tp=2, replicate=2)
    assert allowed_ranks(config(restart=elastic(1), nproc=8, parallel=layout), MODEL) == [8, 4]
    on_nodes = LaunchConfig(nodes=4)
    got = allowed_ranks(config(restart=elastic(1), nproc=8, launch=on_nodes), MODEL)
    assert got == [8, 6, 4, 2]


def test_fewer_ranks_hold_no_more_rows_at_once():
    cfg = config(restart=elastic(1), launch=LaunchConfig(nodes=2, spares=1))
    fewer = shrunk(cfg, MODEL, 2)
    assert fewer is not None
    assert (fewer.nproc, fewer.micro_batch, fewer.launch.nodes, fewer.launch.spares) == (2, 6, 1, 0)
    assert shrunk(cfg, MODEL, 5) is None


def test_a_least_number_that_never_helps_is_refused():
    check_elastic(config(restart=elastic(3)), MODEL)
    with pytest.raises(PunaError, match=r"restart.min_nproc = 6: no number of ranks from 6 to 7"):
        check_elastic(config(restart=elastic(6), nproc=8, global_batch=8), MODEL)
    with pytest.raises(ValueError, match="min_nproc=5 is more than nproc=4"):
        config(restart=elastic(5))
    with pytest.raises(ValueError, match=r"launch.spares=1 replace nodes"):
        LaunchConfig(spares=1)


def spec(folder: Path, **values: Any) -> JobSpec:
    return JobSpec(
        job="j", out=folder / "train.pretrain", ledger=folder / LEDGER_FILE,
        common={"stage": "train.pretrain"}, source=SourceSpec("m:f"), model=MODEL, weights=None,
        special_ids={}, training=config(**values),
    )  # fmt: skip


def kinds(folder: Path, *wanted: str) -> list[dict]:
    return list(read_events(folder / LEDGER_FILE, *wanted))


def killed(rank: int, step: int) -> Fault:
    return Fault("killed", rank, step, 0.1, f"rank {rank} was killed at step {step}")


class Passes:
    """A burn-in that is over at once."""

    result: ClassVar[list[str]] = []

    def __init__(self, seconds: float, device: str = "auto") -> None:
        self.seconds = seconds

    def failed(self) -> list[str] | None:
        return self.result

    def stop(self) -> None:
        pass


@pytest.fixture
def burn_in(monkeypatch: pytest.MonkeyPatch) -> type[Passes]:
    monkeypatch.setattr(fleet_module, "BurnIn", Passes)
    monkeypatch.setattr(follow_module, "BurnIn", Passes)
    monkeypatch.setattr(fleet_module, "_LOOK_S", 0.0)
    monkeypatch.setattr(nodes, "PULSE_S", 0.05)
    monkeypatch.setattr(Passes, "result", [])
    monkeypatch.setenv("PUNA_NODE_NAME", "box")
    return Passes


def test_a_place_in_quarantine_is_left_out_and_comes_back(tmp_path: Path, burn_in: type[Passes]):
    fleet = Fleet(spec(tmp_path, restart=elastic(1)), None, tmp_path)
    assert fleet.choose(0).numbers == (0, 1, 2, 3)
    assert not fleet.blame(killed(1, 3), 0)
    assert fleet.choose(1).n_ranks == 4
    assert fleet.blame(killed(1, 3), 1)  # the second strike
    assert fleet.choose(2).numbers == (0, 2, 3)
    assert fleet.n_ranks == 3
    (change,) = kinds(tmp_path, "world.changed")
    assert (change["from"], change["to"]) == (4, 3)
    assert change["why"] == "box/1 is in quarantine"
    # It has passed; nothing happens before there is a checkpoint to go on from.
    assert fleet.wants_restart() is None
    assert [e["node"] for e in kinds(tmp_path, "node.returned")] == ["box/1"]
    Ledger(tmp_path / LEDGER_FILE, job="other").emit("train.checkpoint", step=5)
    assert fleet.wants_restart() is None
    Ledger(tmp_path / LEDGER_FILE, job="j").emit("train.checkpoint", step=9)  # the end
    assert fleet.wants_restart() is None
    Ledger(tmp_path / LEDGER_FILE, job="j").emit("train.checkpoint", step=6)
    assert fleet.wants_restart() == "3 ranks become 4 after the checkpoint"
    assert fleet.choose(3).n_ranks == 4
    assert fleet.wants_restart() is None
    # Rank 1 of an attempt that goes without place 1 is place 2.
    fleet.blame(killed(1, 7), 3)
    fleet.choose(4)
    fleet.blame(killed(1, 7), 4)
    assert {e["node"] for e in kinds(tmp_path, "node.strike")} == {"box/1", "box/2"}
    fleet.close()


def test_one_that_fails_its_tests_stays_out(tmp_path: Path, burn_in: type[Passes]):
    burn_in.result = ["memory"]
    fleet = Fleet(spec(tmp_path, restart=elastic(1)), None, tmp_path)
    fleet.choose(0)
    fleet.blame(killed(3, 3), 0)
    fleet.blame(killed(3, 3), 0)
    assert fleet.choose(1).n_ranks == 3
    assert fleet.wants_restart() is None
    (rejected,) = kinds(tmp_path, "node.rejected")
    assert (rejected["node"], rejected["failed"]) == ("box/3", ["memory"])
    again = Fleet(spec(tmp_path, restart=elastic(1)), None, tmp_path)  # of a command run again
    assert again.choose(2).numbers == (0, 1, 2)
    assert len(kinds(tmp_path, "world.changed")) == 1


def test_a_run_that_cannot_do_without_goes_on_and_says_so(tmp_path: Path, burn_in: type[Passes]):
    fleet = Fleet(spec(tmp_path), None, tmp_path)
    fleet.choose(0)
    fleet.blame(killed(1, 3), 0)
    assert not fleet.blame(killed(1, 4), 0)  # the same failure may well come again
    assert fleet.choose(1).n_ranks == 4
    (told,) = kinds(tmp_path, "node.used_anyway")
    assert (told["node"], told["why"]) == ("box/1", "killed at step 4, fault 2")
    assert fleet.wants_restart() is None  # what is in use is not tested


def test_persistent_corruption_is_enough_and_names_the_rank(tmp_path: Path, burn_in: type[Passes]):
    fleet = Fleet(spec(tmp_path, restart=elastic(1)), None, tmp_path)
    told = Ledger(tmp_path / LEDGER_FILE, job="j")
    told.emit("sdc.detected", cause="persistent", ranks=[0])  # of an earlier attempt
    told.emit("attempt.start", attempt=0)
    fleet.choose(0)
    told.emit("sdc.detected", cause="transient", ranks=[3])
    told.emit("sdc.detected", cause="persistent", ranks=[2])
    crash = Fault("crash", 0, 4, 0.1, "rank 0: FaultyRankError: rank 2 is wrong")
    assert fleet.blame(crash, 0)
    (strike,) = kinds(tmp_path, "node.strike")
    assert (strike["node"], strike["fault"]) == ("box/2", "silent corruption (persistent)")
    assert fleet.choose(1).numbers == (0, 1, 3)


def test_errors_are_nobodys_fault(tmp_path: Path, burn_in: type[Passes]):
    fleet = Fleet(spec(tmp_path, restart=elastic(1)), None, tmp_path)
    fleet.choose(0)
    for what in ("user", "crash", "exit"):
        assert not fleet.blame(Fault(what, 1, 3, 0.0, "no"), 0)
    assert not kinds(tmp_path, "node.strike")


@pytest.fixture
def followers(tmp_path: Path, monkeypatch, burn_in) -> Iterator[Callable[[int], None]]:
    """Start nodes as threads; they obey, but have no ranks."""
    monkeypatch.setattr(follow_module._Share, "obey", lambda self, call: None)
    config, threads = LaunchConfig(nodes=2, spares=1, wait_s=30.0), []

    def start(node: int) -> None:
        monkeypatch.setenv("PUNA_NODE_NAME", f"box-{node}")
        thread = threading.Thread(target=follow, args=(tmp_path / NODES_DIR, node, config))
        thread.start()
        threads.append(thread)
        file = tmp_path / NODES_DIR / f"node-{node}.json"
        deadline_s = time.monotonic() + 10
        while not file.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        monkeypatch.setenv("PUNA_NODE_NAME", "box-0")

    yield start
    Leader.of(tmp_path / NODES_DIR).call("end", nodes=3, code=0)
    for thread in threads:
        thread.join(10)


def beat(job: JobSpec, attempt: int, rank: int, node: int) -> None:
    folder = job.attempt_dir(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    HeartbeatWriter(folder, rank, node).beat("step", 3)


def test_a_spare_takes_the_place_of_a_node_in_quarantine(tmp_path: Path, followers):
    followers(1)
    followers(2)
    launch = LaunchConfig(nodes=2, spares=1, node_timeout_s=5.0, wait_s=20.0)
    rules = RestartConfig(quarantine=QuarantineConfig(strikes=1, burn_in_s=0))
    job = spec(tmp_path, launch=launch, restart=rules)
    leader = Leader.of(tmp_path / NODES_DIR)
    fleet = Fleet(job, leader, tmp_path)
    assert fleet.choose(0).numbers == (0, 1)
    leader.call("start", members=(0, 1), nodes=2, attempt=0)
    beat(job, 0, 2, node=1)
    beat(job, 0, 0, node=0)
    assert fleet.blame(killed(2, 3), 0)
    crew = fleet.choose(1)
    assert (crew.numbers, crew.n_ranks) == ((0, 2), 4)
    assert not kinds(tmp_path, "world.changed")
    leader.call("start", members=crew.numbers, nodes=2, attempt=1)
    deadline_s = time.monotonic() + 10
    while not kinds(tmp_path, "node.returned"):  # node 1 tests itself
        assert fleet.wants_restart() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    shown = status(tmp_path)
    assert {n["name"]: n["state"] for n in shown["nodes"]} == {
        "box-0": "in use", "box-1": "spare", "box-2": "in use",
    }  # fmt: skip
    assert [one["nodes"] for one in shown["attempts"]] == [["box-0", "box-1"], ["box-0", "box-2"]]
    # Node 0 leads: it cannot be left out.
    assert not fleet.blame(killed(0, 4), 0)
    assert fleet.choose(2).numbers == (0, 2)
    assert [e["node"] for e in kinds(tmp_path, "node.used_anyway")] == ["box-0"]


def test_too_few_nodes(tmp_path: Path, followers):
    launch = LaunchConfig(nodes=2, spares=1, node_timeout_s=0.1, wait_s=0.3)
    fleet = Fleet(spec(tmp_path, launch=launch), Leader.of(tmp_path / NODES_DIR), tmp_path)
    with pytest.raises(PunaError, match="1 of 2 nodes have signed on within 0 s"):
        fleet.choose(0)
    alone = spec(tmp_path, launch=launch, restart=elastic(1))
    assert Fleet(alone, Leader.of(tmp_path / NODES_DIR), tmp_path).choose(0).numbers == (0,)
    (change,) = kinds(tmp_path, "world.changed")
    assert (change["from"], change["to"]) == (4, 2)


def test_a_node_in_quarantine_is_not_waited_for(tmp_path: Path, followers):
    """Nor is node 0 counted out, which cannot be."""
    followers(1)
    for node in ("box-0", "box-1"):
        Quarantine(tmp_path / QUARANTINE_FILE).strike(node, "preflight", 0, is_certain=True)
    launch = LaunchConfig(nodes=2, spares=1, node_timeout_s=0.3, wait_s=1000.0)
    fleet = Fleet(spec(tmp_path, launch=launch), Leader.of(tmp_path / NODES_DIR), tmp_path)
    assert fleet.choose(0).numbers == (0, 1)  # no spare has come
    assert {e["node"] for e in kinds(tmp_path, "node.used_anyway")} == {"box-0", "box-1"}
    followers(2)
    assert fleet.choose(1).numbers == (0, 2)


def status(run: Path, *arguments: str) -> Any:
    result = CliRunner().invoke(cli, ["cluster", "status", str(run), "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_status_of_one_machine(tmp_path: Path, burn_in: type[Passes]):
    job = spec(tmp_path, restart=elastic(1))
    fleet = Fleet(job, None, tmp_path)
    told = Ledger(tmp_path / LEDGER_FILE, job="j", stage="train.pretrain")
    fleet.choose(0)
    for _ in range(2):
        fleet.blame(killed(1, 3), 0)
    told.emit("fault.detected", message="rank 1 was killed at step 3")
    fleet.choose(1)
    beat(job, 1, 1, node=0)
    shown = status(tmp_path)
    assert [(n["number"], n["state"], n["ranks"]) for n in shown["nodes"]] == [
        (0, "in use", [0]), (1, "burn-in", []), (2, "in use", [1]), (3, "in use", [2]),
    ]  # fmt: skip
    assert shown["nodes"][1]["why"] == "killed at step 3, fault 2"
    assert len(shown["nodes"][1]["strikes"]) == 2
    assert shown["nodes"][2]["silent_s"] < 60
    assert [(one["world"], one["changed"], one["ended_by"]) for one in shown["attempts"]] == [
        (4, None, "rank 1 was killed at step 3"), (3, "box/1 is in quarantine", None),
    ]  # fmt: skip
    told.emit("job.done")
    Quarantine(tmp_path / QUARANTINE_FILE).failed("box/1", ["memory"])
    result = CliRunner().invoke(cli, ["cluster", "status", str(tmp_path)])
    words = " ".join(result.output.split())
    assert "1 box/1 rejected - - killed at step 3" in words
    assert "rejected: failed: memory" in words
    assert "1 3 box/1 is in quarantine the end of the training" in words


def test_status_of_what_has_no_ranks(tmp_path: Path):
    result = CliRunner().invoke(cli, ["cluster", "status", str(tmp_path)], standalone_mode=False)
    assert isinstance(result.exception, PunaError)
    assert "is not the folder of a run" in str(result.exception)
    Ledger(tmp_path / LEDGER_FILE).emit("stage.start", stage="data.ingest")
    result = CliRunner().invoke(cli, ["cluster", "status", str(tmp_path)], standalone_mode=False)
    assert "has started no rank" in str(result.exception)


def test_a_world_has_its_own_job_file(tmp_path: Path):
    job = spec(tmp_path, restart=elastic(1))
    job.state_dir.mkdir(parents=True)
    fewer = spec_of(job, 2)
    assert fewer.identity() == job.identity()
    assert JobSpec.read(fewer.write("job-2.json")).training.nproc == 2
    assert os.listdir(job.state_dir) == ["job-2.json"]
