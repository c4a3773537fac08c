"""Worlds that shrink and grow have the losses of one that does neither."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.resilience.quarantine import QUARANTINE_FILE, read_record
from puna.train.config import FaultConfig
from puna.train.nodes import NODES_DIR, NodeState, node_name
from tests.distributed import elastic_nodes

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.exhaustive]
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> dict[int, float]:
    """Losses of one rank, to which nothing happens."""
    folder = tmp_path_factory.mktemp("fixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        elastic_nodes.train(folder, elastic_nodes.config(nproc=1))
    return losses(folder)


@pytest.fixture(autouse=True)
def importable(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in kinds(folder, "train.step")}


def kinds(folder: Path, *wanted: str) -> list[dict]:
    return list(read_events(folder / LEDGER_FILE, *wanted))


def test_two_ranks_become_one_and_two_again(fixed, tmp_path):
    """A place in quarantine is left out, tested, and used again after the next checkpoint."""
    cfg = elastic_nodes.config(fault=FaultConfig(rank=1, step=5))
    metrics = elastic_nodes.train(tmp_path, cfg, [(1, 8, "node.returned")])
    place = f"{node_name()}/1"
    changes = kinds(tmp_path, "world.changed")
    assert [(e["from"], e["to"]) for e in changes] == [(2, 1), (1, 2)]
    assert changes[0]["why"] == f"{place} is in quarantine"
    assert place in changes[1]["why"]
    assert [e["world"] for e in kinds(tmp_path, "train.start")] == [2, 1, 2]
    told = kinds(tmp_path, "node.strike", "node.quarantined", "node.returned", "node.rejected")
    assert [e["kind"] for e in told] == ["node.strike", "node.quarantined", "node.returned"]
    assert {e["node"] for e in told} == {place}
    got = losses(tmp_path)
    assert sorted(got) == sorted(fixed)
    assert [got[s] for s in got] == pytest.approx([fixed[s] for s in got], rel=1e-5)
    # Growing is no fault, and comes right after a checkpoint.
    (fault,) = metrics["goodput"]["faults"]
    assert fault["what"] == "killed"
    assert metrics["goodput"]["n_attempts"] == 3
    told = kinds(tmp_path, "node.returned", "train.checkpoint", "world.changed", "train.restore")
    order = [e["kind"] for e in told]
    back = order.index("node.returned")
    grown = len(order) - 1 - order[::-1].index("world.changed")
    saved = [e["step"] for e in told[back:grown] if e["kind"] == "train.checkpoint"]
    assert told[grown + 1]["step"] == saved[-1]
    record = read_record(tmp_path / QUARANTINE_FILE)
    assert [(s.fault, s.step) for s in record.strikes_of(place)] == [("killed", 5)]
    assert (record.standing(place).state, record.standing(place).times) == ("good", 1)


def start(folder: Path, node: int, port: int) -> subprocess.Popen:
    environment = {
        **os.environ, "PUNA_NODE_RANK": str(node), "PUNA_NODE_NAME": f"machine-{node}",
        "PUNA_RDZV_ENDPOINT": f"127.0.0.1:{port}",
    }  # fmt: skip
    with (folder / f"node-{node}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", elastic_nodes.__name__, str(folder)], env=environment,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def until(folder: Path, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, (folder / "node-0.log").read_text()
        time.sleep(0.1)


def test_a_spare_replaces_a_node_then_one_goes_on_alone_until_another_is_back(fixed, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    nodes = [start(tmp_path, node, port) for node in range(3)]
    told = Ledger(tmp_path / LEDGER_FILE)

    def crews() -> list[list[int]]:
        return [[p["number"] for p in e["places"]] for e in kinds(tmp_path, "attempt.crew")]

    try:
        until(tmp_path, lambda: max(losses(tmp_path), default=-1) >= 3)
        os.killpg(nodes[1].pid, signal.SIGKILL)
        until(tmp_path, lambda: len(crews()) > 1)
        told.emit("test.replaced")
        until(tmp_path, lambda: max(losses(tmp_path)) >= 7)
        os.killpg(nodes[2].pid, signal.SIGKILL)
        until(tmp_path, lambda: len(crews()) > 2)
        told.emit("test.shrunk")
        nodes.append(start(tmp_path, 1, port))
        file, host = tmp_path / NODES_DIR / "node-1.json", f"{socket.gethostname()}.{nodes[3].pid}"
        until(tmp_path, lambda: (s := NodeState.read(file)) is not None and s.host == host)
        told.emit("test.back")
        until(tmp_path, lambda: nodes[0].poll() is not None and nodes[3].poll() is not None)
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
    assert (nodes[0].returncode, nodes[3].returncode) == (0, 0)
    assert crews() == [[0, 1], [0, 2], [0], [0, 1]]
    changes = kinds(tmp_path, "world.changed")
    assert [(e["from"], e["to"]) for e in changes] == [(2, 1), (1, 2)]
    assert changes[0]["why"] == "machine-2 is lost"
    assert changes[1]["why"] == "machine-1 can be used again"
    assert [e["node"] for e in kinds(tmp_path, "node.strike")] == ["machine-1", "machine-2"]
    got = losses(tmp_path)
    assert sorted(got) == sorted(fixed)
    assert [got[s] for s in got] == pytest.approx([fixed[s] for s in got], rel=1e-5)
