"""One training on two nodes, which are network namespaces with a cable between them.

Each has its own loopback device, so nothing can be reached by accident.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.train.nodes import NODES_DIR
from puna.train.spec import SourceSpec
from puna.train.stage import train_job
from tests.distributed import two_nodes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TIMEOUT_S = 150.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two namespaces; the second one is 10.177.0.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command `ip`")
    tag = uuid.uuid4().hex[:6]
    names = [f"puna-{tag}-0", f"puna-{tag}-1"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", f"p{tag}0", "type", "veth", "peer", "name", f"p{tag}1")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for number, name in enumerate(names):
            ip("link", "set", f"p{tag}{number}", "netns", name)
            ip("-n", name, "addr", "add", f"10.177.0.{number + 1}/24", "dev", f"p{tag}{number}")
            for device in ("lo", f"p{tag}{number}"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, float]:
    """Losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        train_job(
            two_nodes.config(nodes=1, nproc=1), two_nodes.MODEL,
            SourceSpec("tests.distributed.two_nodes:Rows"), folder / "out",
            Ledger(folder / LEDGER_FILE),
        )  # fmt: skip
    return losses(folder)


def losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(folder / LEDGER_FILE, "train.step")}


def start(folder: Path, namespace: str, node: int, block: Path | None = None) -> subprocess.Popen:
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", two_nodes.__name__]
    environment = {
        **os.environ, "PUNA_NODE_RANK": str(node), "PYTHONPATH": os.pathsep.join(sys.path),
        "PUNA_RDZV_ENDPOINT": "10.177.0.1:29711",
    }  # fmt: skip
    with (folder / f"node-{node}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, str(folder), str(block or "")], env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def finish(folder: Path, *processes: subprocess.Popen) -> list[int]:
    try:
        return [process.wait(TIMEOUT_S) for process in processes]
    except subprocess.TimeoutExpired:
        logs = "\n".join(
            f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(folder.rglob("*log*.txt"))
        )
        pytest.fail(f"not finished after {TIMEOUT_S} s\n{logs}")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.exhaustive
def test_two_nodes_train_as_one(nodes, alone, tmp_path):
    processes = [start(tmp_path, name, node) for node, name in enumerate(nodes)]
    codes = finish(tmp_path, *processes)
    assert codes == [0, 0], (tmp_path / "node-0.log").read_text()
    got = losses(tmp_path)
    assert sorted(got) == sorted(alone)
    for step, loss in alone.items():
        assert got[step] == pytest.approx(loss, rel=1e-5)
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    (start_event,) = read_events(tmp_path / LEDGER_FILE, "train.start")
    assert start_event["world"] == 2
    state = json.loads((tmp_path / NODES_DIR / "node-1.json").read_text())
    assert state["dead"] == []


def test_lost_node_comes_back(nodes, alone, tmp_path):
    """kill -9 of all that runs on node 1; a new process there takes up its place."""
    block = tmp_path / "block"
    block.touch()
    first = [start(tmp_path, name, node, block) for node, name in enumerate(nodes)]
    deadline_s = time.monotonic() + TIMEOUT_S
    while max(losses(tmp_path), default=-1) < two_nodes.BLOCKED_STEP - 1:
        assert time.monotonic() < deadline_s, (tmp_path / "node-0.log").read_text()
        time.sleep(0.1)
    os.killpg(first[1].pid, signal.SIGKILL)
    first[1].wait()
    block.unlink()
    again = start(tmp_path, nodes[1], 1)
    codes = finish(tmp_path, first[0], again)
    assert codes == [0, 0], (tmp_path / "node-0.log").read_text()
    assert len(list(read_events(tmp_path / LEDGER_FILE, "attempt.start"))) == 2
    got = losses(tmp_path)
    for step, loss in alone.items():
        assert got[step] == pytest.approx(loss, rel=1e-5)
