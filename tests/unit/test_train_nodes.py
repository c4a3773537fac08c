"""How nodes agree, without starting a rank."""

from __future__ import annotations

import json
import threading
import time

import pytest

from puna.core.errors import PunaError
from puna.train import nodes
from puna.train.config import TrainingConfig
from puna.train.follow import follow
from puna.train.launch import address_towards, interface_of
from puna.train.launch_config import LaunchConfig
from puna.train.nodes import Board, Leader, endpoint, node_rank

CONFIG = LaunchConfig(nodes=2, rdzv_endpoint="a:1", node_timeout_s=5, wait_s=0.4)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(nodes, "PULSE_S", 0.05)
    for name in ("PUNA_NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX", "PUNA_RDZV_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def until(condition, timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_number_of_a_node(monkeypatch):
    assert node_rank() == 0
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert node_rank() == 3
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert node_rank() == 2
    monkeypatch.setenv("PUNA_NODE_RANK", "one")
    with pytest.raises(PunaError, match="PUNA_NODE_RANK = 'one'"):
        node_rank()


def test_where_nodes_meet(monkeypatch):
    assert endpoint(CONFIG) == ("a", 1)
    with pytest.raises(PunaError, match="not said"):
        endpoint(LaunchConfig(nodes=2))
    monkeypatch.setenv("PUNA_RDZV_ENDPOINT", "b:29500")
    assert endpoint(LaunchConfig(nodes=2)) == ("b", 29500)
    monkeypatch.setenv("PUNA_RDZV_ENDPOINT", "b:99999")
    with pytest.raises(PunaError, match="b:99999"):
        endpoint(LaunchConfig(nodes=2))


def test_ranks_must_divide_among_nodes():
    with pytest.raises(ValueError, match=r"launch.nodes=2 .* use nproc=2 or 4"):
        TrainingConfig(steps=1, nproc=3, global_batch=3, launch=LaunchConfig(nodes=2))


def test_orders_of_a_leader_that_is_gone_are_not_carried_out(tmp_path):
    folder = tmp_path / "nodes"
    folder.mkdir()
    (folder / "leader.json").write_text(json.dumps({"leader": "old", "pulse": 7}))
    (folder / "call.json").write_text(
        json.dumps({"leader": "old", "number": 3, "what": "end", "code": 0})
    )
    board = Board(folder, 1)
    for _ in range(3):
        assert board.leader_silent_s() < 1
        assert board.call() is None
    leader = Leader(folder)
    call = leader.call("stop", nodes=2)
    until(lambda: board.leader_silent_s() < 1 and board.call() == call)


def test_leader_sees_what_a_node_has_done(tmp_path):
    leader = Leader(tmp_path)
    board = Board(tmp_path, 1)
    assert leader.state(1)[0] is None
    call = leader.call("start", nodes=2, job="j", attempt=4)
    board.tell(call, None, (1,))
    state, silent_s = leader.state(1)
    assert state is not None
    assert (state.number, state.exit_code, state.dead) == (call.number, None, (1,))
    time.sleep(0.1)
    assert leader.state(1)[1] > silent_s
    board.tell(call, 3, ())
    state, silent_s = leader.state(1)
    assert state is not None
    assert state.exit_code == 3
    assert silent_s < 0.05


def test_waiting_ends_when_all_have_obeyed_or_are_silent(tmp_path):
    leader, board = Leader(tmp_path), Board(tmp_path, 1)
    call = leader.call("stop", nodes=3)  # node 2 has never been there
    board.tell(None, None, ())
    waiting = threading.Thread(target=leader.wait_for, args=(call, 30.0))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    board.tell(call, None, ())
    waiting.join(10.0)
    assert not waiting.is_alive()


def test_a_node_ends_with_the_run(tmp_path):
    leader = Leader(tmp_path)
    codes: list[int] = []
    config = CONFIG.model_copy(update={"wait_s": 30.0})
    node = threading.Thread(target=lambda: codes.append(follow(tmp_path, 1, config)))
    node.start()
    until(lambda: leader.state(1)[0] is not None)
    leader.wait_for(leader.call("end", nodes=2, code=2), 10.0)
    node.join(10.0)
    assert codes == [2]


def test_a_node_does_not_wait_for_ever(tmp_path):
    with pytest.raises(PunaError, match="node 0 has shown no sign of life"):
        follow(tmp_path, 1, CONFIG)
    with pytest.raises(PunaError, match="node 2"):
        follow(tmp_path, 2, CONFIG)


def test_address_and_interface_of_this_machine():
    assert address_towards("127.0.0.1", 1) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    with pytest.raises(PunaError, match=r"no way to nowhere\.invalid:1"):
        address_towards("nowhere.invalid", 1)
