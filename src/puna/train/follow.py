"""A node other than the first: it starts its share of the ranks when node 0 says so.

Imports no torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.progress import say
from puna.resilience.burn_in import BurnIn
from puna.resilience.health import HealthWatch, HostHealth
from puna.resilience.heartbeat import read_heartbeats
from puna.resilience.processes import process_alive
from puna.resilience.protocols import Heartbeat
from puna.train.launch import start_ranks
from puna.train.launch_config import LaunchConfig
from puna.train.nodes import Board, BurnInOrder, Call
from puna.train.spec import JobSpec

_POLL_S = 0.05


def follow(folder: Path, node: int, config: LaunchConfig) -> int:
    """Carry out node 0's orders until the run is over.

    Args:
        folder: Of the run's nodes.
        node: Number of this node, from 1.
        config: Limits.

    Returns:
        How the run ended on node 0: an exit code.

    Raises:
        PunaError: Node 0 does not come, or does not come back.
    """
    n_nodes = config.nodes + config.spares
    if not 0 < node < n_nodes:
        spares = f" and spares = {config.spares}" if config.spares else ""
        raise PunaError(
            f"this is node {node}, and launch.nodes = {config.nodes}{spares}", "nodes count from 0"
        )
    say(("node ", "bold"), f"{node} of {n_nodes} waits for node 0")
    board, share, tests, done = Board(folder, node), _Share(node), _Tests(), None
    try:
        while True:
            silent_s = board.leader_silent_s()
            if silent_s > config.node_timeout_s:
                share.stop()
            if silent_s > config.wait_s:
                raise PunaError(
                    f"node 0 has shown no sign of life for {silent_s:.0f} s in {folder}",
                    "start node 0; the folder must be on a file system that all nodes share; "
                    "launch.wait_s is how long the others wait",
                )
            call = board.call()
            if call is not None and call != done:
                if call.what == "end":
                    share.stop()
                    share.clean(call.code)
                    board.tell(call, None, ())
                    return call.code
                share.obey(call)
                done = call
            share.look_at_health()
            tests.go_on(board.test_order(), is_idle=share.is_idle)
            board.tell(done, share.exit_code(), share.dead(), **tests.state())
            time.sleep(_POLL_S)
    finally:
        share.stop()
        tests.stop()


class _Tests:
    """The burn-in of this node, while it is in quarantine."""

    def __init__(self) -> None:
        self._burn_in: BurnIn | None = None
        self._order: BurnInOrder | None = None
        self._tested = 0
        self._failed: tuple[str, ...] = ()

    def go_on(self, order: BurnInOrder | None, *, is_idle: bool) -> None:
        """Begin a test that is wanted, or look whether it is over; ranks come first."""
        if order is None or not is_idle or order != self._order:
            self.stop()
        if order is None or not is_idle or order.number == self._tested:
            return
        if self._burn_in is None:
            say(f"  in quarantine: testing this node for {order.seconds:.0f} s")
            self._order, self._burn_in = order, BurnIn(order.seconds)
        failed = self._burn_in.failed()
        if failed is not None:
            self._tested, self._failed = order.number, tuple(failed)
            self.stop()

    def state(self) -> dict[str, Any]:
        """What the leader is told."""
        return {
            "tested": self._tested, "failed": self._failed,
            "is_testing": self._burn_in is not None,
        }  # fmt: skip

    def stop(self) -> None:
        """End a test that runs."""
        if self._burn_in is not None:
            self._burn_in.stop()
            self._burn_in = None


class _Share:
    """The ranks of this node."""

    def __init__(self, node: int) -> None:
        self._node = node
        self._process: subprocess.Popen[bytes] | None = None
        self._spec: JobSpec | None = None
        self._health: HealthWatch | None = None
        self._attempt = 0

    def obey(self, call: Call) -> None:
        """Start or stop the ranks."""
        self.stop()
        if call.what == "start" and self._node in call.others:
            self._spec, self._attempt = JobSpec.read(Path(call.job)), call.attempt
            say(f"  attempt {call.attempt}: starting the ranks of this node")
            self._process = start_ranks(
                self._spec, Path(call.job), call.attempt, self._node
            )  # fmt: skip

    @property
    def is_idle(self) -> bool:
        """Whether no rank of this node runs."""
        return self._process is None

    def look_at_health(self) -> None:
        """Tell the ledger what is bad about this machine, when it is time to look."""
        if self._health is None and self._spec is not None:
            spec = self._spec
            self._health = HealthWatch(
                HostHealth(spec.out), Ledger(spec.ledger, job=spec.job, **spec.common), self._node
            )
        if self._health is not None:
            self._health.tick()

    def exit_code(self) -> int | None:
        """Exit code of the agent; None while it runs, and without one."""
        return None if self._process is None else self._process.poll()

    def dead(self) -> tuple[int, ...]:
        """Ranks of this node that are gone without having finished."""
        return tuple(
            beat.rank
            for beat in self._beats()
            if beat.phase != "done" and not process_alive(beat.pid)
        )

    def stop(self) -> None:
        """Kill the agent, with which the ranks die; wait until they are gone."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline_s = time.monotonic() + 10.0
        for beat in self._beats():
            while process_alive(beat.pid) and time.monotonic() < deadline_s:
                time.sleep(0.01)
        self._process = None

    def clean(self, code: int) -> None:
        """Remove what a finished job has left in the memory of this node."""
        if code == 0 and self._spec is not None and self._spec.memory_dir is not None:
            remove_tree(self._spec.memory_dir)

    def _beats(self) -> list[Heartbeat]:
        if self._spec is None or self._process is None:
            return []
        folder = self._spec.attempt_dir(self._attempt)
        return [beat for beat in read_heartbeats(folder) if beat.node == self._node]
