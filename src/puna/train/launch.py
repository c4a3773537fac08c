"""Starting the ranks of a job: what the supervisor calls; imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from puna.core.fsio import remove_tree
from puna.resilience.heartbeat import read_failures, read_heartbeats
from puna.resilience.protocols import Failure, Heartbeat
from puna.resilience.supervisor import process_alive
from puna.train.parallel.threads import thread_env
from puna.train.spec import JobSpec
from puna.train.worker import PARENT_ENV

LOG_FILE = "log.txt"
_LOG_TAIL_LINES = 15
_GONE_TIMEOUT_S = 10.0


class TrainJob:
    """A training that the supervisor can start again and again.

    One rank is a plain process; more are started by torchrun, with a fresh agent, port and store
    for every attempt.

    Args:
        spec: The job.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._path = spec.write()

    @property
    def n_ranks(self) -> int:
        """Number of ranks that an attempt has."""
        return self._spec.training.nproc

    def start(self, attempt: int) -> TrainAttempt:
        """Start the processes of an attempt."""
        folder = self._spec.attempt_dir(attempt)
        remove_tree(folder)
        folder.mkdir(parents=True)
        worker = ["puna.train.worker", str(self._path), str(attempt)]
        env = {**os.environ, **thread_env(self.n_ranks), "PYTHONUNBUFFERED": "1"}
        if self.n_ranks == 1:
            env[PARENT_ENV] = str(os.getpid())
            command = [sys.executable, "-m", *worker]
        else:
            command = [
                sys.executable, "-m", "puna.train.agent", str(os.getpid()),
                "--nnodes=1", f"--nproc-per-node={self.n_ranks}", "--max-restarts=0",
                "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
                f"--rdzv-id={self._spec.job}.{attempt}", "--local-addr=localhost",
                "--monitor-interval=0.1", f"--log-dir={folder}", "-m", *worker,
            ]  # fmt: skip
            if sys.platform == "linux":
                # All ranks are on this machine: no need for a network, or for a host name.
                env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
            env.pop(name, None)  # of a torchrun around us
        with (folder / LOG_FILE).open("wb") as log:
            # A session of its own: Ctrl-C reaches this process, which then ends the tree.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                start_new_session=True,
            )  # fmt: skip
        return TrainAttempt(process, folder)


class TrainAttempt:
    """The processes of one attempt."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process, self._folder = process, folder

    def poll(self) -> int | None:
        """Exit code of the agent (or of the only rank); None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Kill the agent, with which the ranks die; wait until none is left to write anything."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline_s = time.monotonic() + _GONE_TIMEOUT_S
        for beat in self.heartbeats():
            while process_alive(beat.pid) and time.monotonic() < deadline_s:
                time.sleep(0.01)

    def heartbeats(self) -> list[Heartbeat]:
        """The last heartbeat of each rank."""
        return read_heartbeats(self._folder)

    def failures(self) -> list[Failure]:
        """What failing ranks wrote down."""
        return read_failures(self._folder)

    def log_tail(self) -> str:
        """Path of the log and its last lines."""
        path = self._folder / LOG_FILE
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"log: {path}", *(f"  | {line}" for line in lines[-_LOG_TAIL_LINES:])])
