"""Starting the ranks of a job: what the supervisor calls; imports no torch."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.fsio import remove_tree
from puna.resilience.hang import collect_stacks, read_places
from puna.resilience.heartbeat import read_failures, read_heartbeats
from puna.resilience.processes import NO_PROCESS, process_alive
from puna.resilience.protocols import Failure, Heartbeat, Place
from puna.resilience.supervisor import Fault
from puna.train.elastic import spec_of
from puna.train.fleet import Crew, Fleet
from puna.train.launch_config import LaunchConfig
from puna.train.nodes import NODES_DIR, Call, Leader, NodeState, endpoint
from puna.train.parallel.threads import thread_env
from puna.train.spec import JobSpec
from puna.train.standby import GO_FILE
from puna.train.worker import NODE_ENV, PARENT_ENV, STANDBY_ENV

LOG_FILE = "log.txt"
STACKS_DIR = "stacks"
"""Folder beside the ledger with the stacks of hung attempts."""
_LOG_TAIL_LINES = 15
_GONE_TIMEOUT_S = 10.0
_SIOCGIFADDR = 0x8915  # Linux: address of an interface


class TrainJob:
    """A training that the supervisor can start again and again.

    One rank is a plain process; more are started by torchrun, with a fresh agent, port and store
    for every attempt. On several nodes this is node 0, and the others start theirs when told to
    (see :mod:`puna.train.nodes`).

    Args:
        spec: The job.

    Raises:
        PunaError: There are several nodes, and where they meet is not said.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._path = spec.write()
        self._leader: Leader | None = None
        self._standby: tuple[int, Crew, subprocess.Popen[bytes]] | None = None
        if spec.training.launch.nodes > 1:
            endpoint(spec.training.launch)
            self._leader = Leader.of(nodes_folder(spec))
        self._fleet = Fleet(spec, self._leader, nodes_folder(spec).parent)

    @property
    def n_ranks(self) -> int:
        """Number of ranks that an attempt has."""
        return self._fleet.n_ranks

    def blame(self, fault: Fault, attempt: int) -> bool:
        """Write down whose fault it was; tell whether the next attempt goes without that node."""
        return self._fleet.blame(fault, attempt)

    def wants_restart(self) -> str | None:
        """Return why the attempt should end now though it has no fault; None to go on."""
        return self._fleet.wants_restart()

    def prepare(self, attempt: int) -> None:
        """Start processes that get ready for an attempt and wait; on one node only."""
        if self._leader is None and self._standby is None:
            self._new_folder(attempt)
            crew = self._fleet.preview()
            spec, path = self._spec_of(crew)
            process = start_ranks(spec, path, attempt, places=crew.numbers, is_standby=True)
            self._standby = attempt, crew, process

    def close(self) -> None:
        """End what waits."""
        self._fleet.close()
        self._end_standby()

    def _end_standby(self) -> None:
        if self._standby is not None:
            _, _, process = self._standby
            self._standby = None
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start(self, attempt: int) -> TrainAttempt:
        """Start the processes of an attempt, or tell those that wait for it."""
        folder, kept = self._spec.attempt_dir(attempt), self._stacks_folder(attempt)
        crew = self._fleet.choose(attempt)
        if self._standby is not None:
            number, waiting, process = self._standby
            if (number, waiting) == (attempt, crew) and process.poll() is None:
                self._standby = None
                (folder / GO_FILE).touch()
                return TrainAttempt(process, folder, kept)
            self._end_standby()
        self._new_folder(attempt)
        spec, path = self._spec_of(crew)
        if self._leader is None:
            process = start_ranks(spec, path, attempt, places=crew.numbers)
            return TrainAttempt(process, folder, kept)
        call = self._leader.call(
            "start", nodes=len(crew.places), members=crew.numbers, job=str(path), attempt=attempt
        )  # fmt: skip
        process = start_ranks(spec, path, attempt)
        timeout_s = spec.training.launch.node_timeout_s
        return ManyNodesAttempt(process, folder, kept, self._leader, call, timeout_s)

    def _spec_of(self, crew: Crew) -> tuple[JobSpec, Path]:
        """Return the job on so many ranks, and its file."""
        if crew.n_ranks == self._spec.training.nproc:
            return self._spec, self._path
        spec = spec_of(self._spec, crew.n_ranks)
        return spec, spec.write(f"job-{crew.n_ranks}.json")

    def _stacks_folder(self, attempt: int) -> Path:
        run = self._spec.ledger.parent if self._spec.ledger else self._spec.out
        return run / STACKS_DIR / f"{self._spec.job}-attempt-{attempt}"

    def _new_folder(self, attempt: int) -> None:
        folder = self._spec.attempt_dir(attempt)
        remove_tree(folder)
        folder.mkdir(parents=True)


def nodes_folder(spec: JobSpec) -> Path:
    """Where the nodes of a job agree: beside the ledger, which is the run's folder."""
    return (spec.ledger.parent if spec.ledger else spec.out) / NODES_DIR


def start_ranks(
    spec: JobSpec,
    path: Path,
    attempt: int,
    node: int = 0,
    *,
    places: Sequence[int] = (),
    is_standby: bool = False,
) -> subprocess.Popen[bytes]:
    """Start the ranks of this node.

    Args:
        spec: The job.
        path: Its file.
        attempt: Number of the attempt; its folder exists.
        node: Number of this node.
        places: GPUs of this machine that the ranks take; the first ones when empty.
        is_standby: They get ready and wait.
    """
    folder, launch = spec.attempt_dir(attempt), spec.training.launch
    per_node = spec.training.nproc // launch.nodes
    worker = ["puna.train.worker", str(path), str(attempt)]
    env = {**os.environ, **thread_env(per_node), "PYTHONUNBUFFERED": "1", NODE_ENV: str(node)}
    if list(places) != list(range(len(places))):
        seen = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(
            seen[place] if place < len(seen) and seen[0] else str(place) for place in places
        )
    if spec.training.nproc == 1:
        env[PARENT_ENV] = str(os.getpid())
        command = [sys.executable, "-m", *worker]
    else:
        command = [
            sys.executable, "-m", "puna.train.agent", str(os.getpid()),
            f"--nnodes={launch.nodes}", f"--nproc-per-node={per_node}", "--max-restarts=0",
            "--rdzv-backend=c10d", f"--rdzv-id={spec.job}.{attempt}", "--monitor-interval=0.1",
            f"--log-dir={folder}", *_meeting(launch, node, env), "-m", *worker,
        ]  # fmt: skip
    if is_standby:
        env[STANDBY_ENV] = "1"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        env.pop(name, None)  # of a torchrun around us
    with (folder / (log_name(node))).open("wb") as log:
        # A session of its own: Ctrl-C reaches this process, which then ends the tree.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
            start_new_session=True,
        )  # fmt: skip


def _meeting(launch: LaunchConfig, node: int, env: dict[str, str]) -> list[str]:
    """Tell torchrun where ranks meet, and set by which interface they talk."""
    if launch.nodes == 1:
        if sys.platform == "linux":
            # All ranks are on this machine: no need for a network, or for a host name.
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return ["--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
    host, port = endpoint(launch)
    address = address_towards(host, port)
    interface = interface_of(address)
    if interface is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", interface)
    return [
        f"--rdzv-endpoint={host}:{port}", f"--local-addr={address}",
        # By its number and not by its name: nodes may share a name, or have several.
        f"--rdzv-conf=is_host={int(node == 0)},join_timeout={int(launch.wait_s)}",
    ]  # fmt: skip


def log_name(node: int) -> str:
    """Name of the file with what the ranks of a node print."""
    return LOG_FILE if node == 0 else f"log-{node}.txt"


class TrainAttempt:
    """The processes of one attempt."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, kept: Path) -> None:
        self._process, self._folder, self._kept = process, folder, kept

    def poll(self) -> int | None:
        """Exit code of the agent (or of the only rank); None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Kill the agent, with which the ranks die; wait until none is left to write anything."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline_s = time.monotonic() + _GONE_TIMEOUT_S
        for beat in read_heartbeats(self._folder):
            while beat.node == 0 and process_alive(beat.pid) and time.monotonic() < deadline_s:
                time.sleep(0.01)

    def heartbeats(self) -> list[Heartbeat]:
        """The last heartbeat of each rank."""
        return read_heartbeats(self._folder)

    def failures(self) -> list[Failure]:
        """What failing ranks wrote down."""
        return read_failures(self._folder)

    def places(self) -> list[Place]:
        """Where the ranks of this machine are inside their steps."""
        return read_places(self._folder, self.heartbeats())

    def stacks(self) -> dict[int, Path]:
        """Stacks of the ranks of this machine, in the run's folder."""
        return collect_stacks(self._folder, self.heartbeats(), self._kept)

    def log_tail(self) -> str:
        """Path of the log and its last lines."""
        path = self._folder / LOG_FILE
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"log: {path}", *(f"  | {line}" for line in lines[-_LOG_TAIL_LINES:])])


class ManyNodesAttempt(TrainAttempt):
    """The processes of one attempt on several nodes, seen from node 0.

    Of ranks elsewhere only their heartbeats are known. Their times are of another clock, so what
    counts is when they were first seen here; whether they live is told by their node.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        folder: Path,
        kept: Path,
        leader: Leader,
        call: Call,
        node_timeout_s: float,
    ) -> None:
        super().__init__(process, folder, kept)
        self._leader, self._call, self._timeout_s = leader, call, node_timeout_s
        self._seen: dict[str, tuple[Any, float]] = {}

    def poll(self) -> int | None:
        """Exit code of node 0's agent, or of one that failed elsewhere; None while all run."""
        code = super().poll()
        if code is not None:
            return code
        for state, _ in self._states().values():
            if state is not None and state.exit_code:
                return state.exit_code
        return None

    def kill(self) -> None:
        """End the ranks of all nodes; a node that shows no sign of life is not waited for."""
        call = self._leader.call("stop", nodes=self._call.nodes, members=self._call.members)
        super().kill()
        self._leader.wait_for(call, self._timeout_s)

    def heartbeats(self) -> list[Heartbeat]:
        """The last heartbeat of each rank, in the time of this machine."""
        states = self._states()
        return [
            beat if beat.node == 0 else self._from_afar(beat, *states[beat.node])
            for beat in read_heartbeats(self._folder)
        ]

    def failures(self) -> list[Failure]:
        """What failing ranks wrote down, in the time of this machine."""
        return [
            note if note.node == 0 else replace(note, t_mono_s=self._when(f"f{note.rank}", note))
            for note in super().failures()
        ]

    def _states(self) -> dict[int, tuple[NodeState | None, float]]:
        return {node: self._leader.state(node) for node in self._call.others}

    def _from_afar(self, beat: Heartbeat, state: NodeState | None, silent_s: float) -> Heartbeat:
        is_lost = silent_s > self._timeout_s
        is_dead = state is not None and self._is_current(state) and beat.rank in state.dead
        return replace(
            beat,
            pid=NO_PROCESS if is_lost or is_dead else os.getpid(),
            t_mono_s=self._when(f"b{beat.rank}", beat),
        )

    def _is_current(self, state: NodeState) -> bool:
        return state.leader == self._call.leader and state.number == self._call.number

    def _when(self, key: str, value: Any) -> float:
        """When a value was first seen."""
        if self._seen.get(key, (None, 0.0))[0] != value:
            self._seen[key] = value, time.monotonic()
        return self._seen[key][1]


def address_towards(host: str, port: int) -> str:
    """Return the address of this machine on the way to another one; nothing is sent.

    Raises:
        PunaError: The host has no address, or there is no way to it.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise PunaError(
            f"there is no way to {host}:{port}, where the nodes meet ({error})",
            "correct launch.rdzv_endpoint, or the network",
        ) from error


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with an IPv4 address; None when unknown (Linux)."""
    if sys.platform != "linux" or ":" in address:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
