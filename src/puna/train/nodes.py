"""How the nodes of a training agree: small files in the run's folder, one writer each.

``leader.json`` is the pulse of node 0 and ``call.json`` its last order: start an attempt, stop it,
or the end of the run. ``node-K.json`` is the pulse of node K with the order it has carried out. The
number of an attempt is in the order, so all nodes have the same. ``tests.json`` tells nodes in
quarantine to test themselves. Imports no torch.

Clocks of machines differ: a pulse is a number that grows, and whoever reads it looks at his own
clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from puna.core.errors import PunaError
from puna.train.launch_config import LaunchConfig

NODES_DIR = ".nodes"
"""Folder, inside the run's, by which its nodes agree."""
NODE_RANK_ENV = "PUNA_NODE_RANK"
NODE_NAME_ENV = "PUNA_NODE_NAME"
ENDPOINT_ENV = "PUNA_RDZV_ENDPOINT"
PULSE_S = 0.5
_RANK_VARIABLES = (NODE_RANK_ENV, "SLURM_NODEID", "JOB_COMPLETION_INDEX")
LEADER_FILE, _CALL_FILE, _TESTS_FILE = "leader.json", "call.json", "tests.json"


def node_rank() -> int:
    """Return the number of this node, from the environment; 0 when nothing gives one.

    Raises:
        PunaError: The variable is not a number.
    """
    for name in _RANK_VARIABLES:
        text = os.environ.get(name)
        if text is not None:
            if not text.isdecimal():
                raise PunaError(f"{name} = {text!r} is no number of a node", "nodes count from 0")
            return int(text)
    return 0


def node_name() -> str:
    """Return the name of this machine: the host's, or of the environment where that is another."""
    return os.environ.get(NODE_NAME_ENV) or socket.gethostname()


def endpoint(config: LaunchConfig) -> tuple[str, int]:
    """Return host and port at which the ranks of all nodes meet.

    Raises:
        PunaError: Neither recipe nor environment give it.
    """
    text = config.rdzv_endpoint or os.environ.get(ENDPOINT_ENV, "")
    host, _, port = text.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise PunaError(
            f"launch.nodes = {config.nodes}, and where the nodes meet is "
            + (f"{text!r}" if text else "not said"),
            f"set launch.rdzv_endpoint (or {ENDPOINT_ENV}) to host:port of node 0",
        )
    return host, int(port)


@dataclass(frozen=True)
class Call:
    """An order of node 0.

    Attributes:
        leader: Which process gave it.
        number: Grows with every order of that process.
        what: ``start`` an attempt, ``stop`` it, or ``end``: the run is over.
        nodes: Nodes that are meant: 0 up to this number.
        members: Nodes of an attempt, where they are chosen among more.
        job: Path of the job's file.
        attempt: Number of the attempt.
        code: How the run ended.
    """

    leader: str
    number: int
    what: Literal["start", "stop", "end"]
    nodes: int = 1
    job: str = ""
    attempt: int = 0
    code: int = 0
    members: tuple[int, ...] = ()

    @property
    def others(self) -> tuple[int, ...]:
        """Nodes that are meant, without node 0."""
        return self.members[1:] if self.members else tuple(range(1, self.nodes))


@dataclass(frozen=True)
class BurnInOrder:
    """What a node in quarantine is to do while it waits.

    Attributes:
        number: Counts the tests of a node.
        seconds: How long.
    """

    number: int
    seconds: float


@dataclass(frozen=True)
class NodeState:
    """What a node other than 0 tells.

    Attributes:
        node: Its number.
        pulse: Grows while it lives.
        host: Its name.
        leader: Leader of the order that it has carried out.
        number: Number of that order.
        exit_code: Of its ranks' agent; None while it runs and when there is none.
        dead: Its ranks that are gone without having finished.
        name: Of the machine; what is known of it goes by this.
        tested: Number of the last test that it has finished.
        failed: What failed in it.
        is_testing: A test runs.
    """

    node: int
    pulse: int
    host: str = ""
    leader: str = ""
    number: int = -1
    exit_code: int | None = None
    dead: tuple[int, ...] = ()
    name: str = ""
    tested: int = 0
    failed: tuple[str, ...] = ()
    is_testing: bool = False

    @classmethod
    def read(cls, path: Path) -> NodeState | None:
        """Read what a node tells; None when it has told nothing."""
        values = _read(path)
        if values is None:
            return None
        for key in ("dead", "failed"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)


@dataclass
class Pulse:
    """Tells how long something has not changed, by this machine's clock."""

    value: Any = None
    since_s: float = field(default_factory=time.monotonic)

    def silent_s(self, value: Any) -> float:
        """Take what is seen now; return the seconds since it last changed."""
        if value != self.value:
            self.value, self.since_s = value, time.monotonic()
        return time.monotonic() - self.since_s


class Leader:
    """Node 0's side: its pulse, its orders and what the other nodes tell.

    Args:
        folder: Of the run's nodes.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.id = uuid.uuid4().hex
        self._folder, self._number = folder, 0
        self._pulses: dict[int, Pulse] = {}
        self._beat(0)
        threading.Thread(target=self._beat_on, daemon=True).start()

    @staticmethod
    @cache
    def of(folder: Path) -> Leader:
        """Return this process's leader of a folder."""
        return Leader(folder)

    def call(self, what: Literal["start", "stop", "end"], **values: Any) -> Call:
        """Give an order."""
        self._number += 1
        call = Call(self.id, self._number, what, **values)
        _write(self._folder / _CALL_FILE, asdict(call))
        return call

    def state(self, node: int) -> tuple[NodeState | None, float]:
        """Return what a node tells, and for how many seconds it has been silent."""
        state = NodeState.read(self._folder / f"node-{node}.json")
        pulse = self._pulses.setdefault(node, Pulse())
        return state, pulse.silent_s(state and (state.host, state.pulse))

    def answers(self, node: int, timeout_s: float) -> bool:
        """Tell whether a node lives and has carried out the last order."""
        state, silent_s = self.state(node)
        return (
            state is not None
            and silent_s <= timeout_s
            and (state.leader, state.number) == (self.id, self._number)
        )

    def order_tests(self, orders: Mapping[int, BurnInOrder]) -> None:
        """Tell nodes to test themselves while they have nothing else to do."""
        tests = {str(node): asdict(order) for node, order in orders.items()}
        _write(self._folder / _TESTS_FILE, {"leader": self.id, "tests": tests})

    def wait_for(self, call: Call, timeout_s: float) -> None:
        """Wait until the other nodes have carried out an order; those that are silent are left.

        Args:
            call: The order.
            timeout_s: Longest wait, and longest silence of a node that is waited for.
        """
        waiting = set(call.others)
        deadline_s = time.monotonic() + timeout_s
        while waiting and time.monotonic() < deadline_s:
            for node in sorted(waiting):
                state, silent_s = self.state(node)
                # Without a state it has never been there.
                is_done = state is None or (state.leader == self.id and state.number >= call.number)
                if is_done or silent_s > timeout_s:
                    waiting.discard(node)
            time.sleep(0.02)

    def _beat(self, pulse: int) -> None:
        _write(self._folder / LEADER_FILE, {"leader": self.id, "pulse": pulse})

    def _beat_on(self) -> None:
        pulse = 0
        while True:
            time.sleep(PULSE_S)
            pulse += 1
            with contextlib.suppress(OSError):  # the folder is full or away: others see silence
                self._beat(pulse)


class Board:
    """The other nodes' side: node 0's orders, as long as it lives.

    Args:
        folder: Of the run's nodes.
        node: Number of this node.
    """

    def __init__(self, folder: Path, node: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._node = folder, node
        self._host = f"{socket.gethostname()}.{os.getpid()}"
        self._leader = Pulse()
        self._alive: set[str] = set()
        self._first = True
        self._told_s = -PULSE_S
        self._state = NodeState(node, 0, self._host, name=node_name())

    def leader_silent_s(self) -> float:
        """Return for how many seconds node 0 has shown no sign of life."""
        seen = _read(self._folder / LEADER_FILE)
        before = self._leader.value
        silent_s = self._leader.silent_s(seen and (seen["leader"], seen["pulse"]))
        # What lies there at the start may be of a leader long gone; a change is a sign of life.
        if seen is not None and not self._first and self._leader.value != before:
            self._alive.add(seen["leader"])
        self._first = False
        return silent_s

    def call(self) -> Call | None:
        """Return the last order of a leader that has been seen alive."""
        values = _read(self._folder / _CALL_FILE)
        if values is None or values["leader"] not in self._alive:
            return None
        values["members"] = tuple(values.get("members", ()))
        return Call(**values)

    def test_order(self) -> BurnInOrder | None:
        """Return the test that the leader wants of this node."""
        values = _read(self._folder / _TESTS_FILE)
        if values is None or values["leader"] not in self._alive:
            return None
        order = values["tests"].get(str(self._node))
        return None if order is None else BurnInOrder(**order)

    def tell(
        self, call: Call | None, exit_code: int | None, dead: tuple[int, ...], **tests: Any
    ) -> None:
        """Write down the state of this node, at every change and from time to time.

        Args:
            call: The order that it has carried out.
            exit_code: Of its ranks' agent.
            dead: Ranks that are gone.
            **tests: ``tested``, ``failed`` and ``is_testing``, as in :class:`NodeState`.
        """
        now = NodeState(
            self._node, self._state.pulse, self._host, call.leader if call else "",
            call.number if call else -1, exit_code, dead, self._state.name, **tests,
        )  # fmt: skip
        if now == self._state and time.monotonic() - self._told_s < PULSE_S:
            return
        self._state = replace(now, pulse=now.pulse + 1)
        self._told_s = time.monotonic()
        _write(self._folder / f"node-{self._node}.json", asdict(self._state))


def _write(path: Path, values: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    aside.write_text(json.dumps(values), encoding="utf-8")
    os.replace(aside, path)  # a reader sees the old or the new one, never half


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # on some shared file systems a rename is seen late
        return None
