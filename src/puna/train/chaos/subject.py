"""A training in processes of its own, seen and hurt from outside."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from puna.core.fsio import remove_tree, write_json
from puna.core.ledger import LEDGER_FILE, read_events
from puna.resilience.heartbeat import read_heartbeats
from puna.resilience.processes import process_alive
from puna.resilience.protocols import Heartbeat
from puna.train.chaos.job import JOB_FILE, OUT_DIR, ROWS, SEQ_LEN
from puna.train.checkpoint.manifest import list_steps, step_dir
from puna.train.config import TrainingConfig
from puna.train.spec import CHECKPOINTS_DIR, STATE_DIR, JobSpec
from puna.train.spec import JOB_FILE as SPEC_FILE

STEPS, EVERY = 24, 4
_POLL_S = 0.005


class MissedError(Exception):
    """The moment for a fault did not come before the training ended."""


class Subject:
    """One training.

    Args:
        folder: Its run, made anew.
        n_ranks: Processes that train.
        bad_step: Step whose data are broken; -1 for none.
        seed: Of the choices of whom to hurt.
        **changes: Of the configuration.
    """

    def __init__(
        self, folder: Path, n_ranks: int, bad_step: int = -1, seed: int = 0, **changes: Any
    ) -> None:
        remove_tree(folder)
        folder.mkdir(parents=True)
        self.folder, self.out = folder, folder / OUT_DIR
        self.random = random.Random(seed)
        self.hurt_at_s: list[float] = []
        """When something was done to it (monotonic clock)."""
        cfg = TrainingConfig.model_validate({
            "steps": STEPS, "seq_len": SEQ_LEN, "global_batch": ROWS, "nproc": n_ranks,
            "precision": "fp32", "checkpoint": {"every": EVERY, "memory_every": 2},
            "restart": {"hang_floor_s": 1.0}, **changes,
        })  # fmt: skip
        write_json(
            folder / JOB_FILE, {"training": cfg.model_dump(mode="json"), "bad_step": bad_step}
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the supervisor, as somebody does who calls the same command again."""
        with (self.folder / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "puna.train.chaos.job", str(self.folder)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, "PUNA_PROGRESS": "plain"},
            )  # fmt: skip

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The supervisor."""
        assert self._process is not None
        return self._process

    def wait(self, timeout_s: float) -> int | None:
        """Return the supervisor's exit code; None when it is still running, and is then killed."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def close(self) -> None:
        """End what still runs and free its shared memory."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        spec_file = self.out / STATE_DIR / SPEC_FILE
        if spec_file.exists():
            memory = JobSpec.read(spec_file).memory_dir
            if memory is not None:
                remove_tree(memory)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Return events of the ledger."""
        return list(read_events(self.folder / LEDGER_FILE, *kinds))

    def beats(self) -> list[Heartbeat]:
        """Return the heartbeats of the newest attempt that was begun."""
        begun = self.events("attempt.start")
        if not begun:
            return []
        return read_heartbeats(self.out / STATE_DIR / f"attempt-{begun[-1]['attempt']}")

    def until(self, holds: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        """Wait until something holds, and return it.

        Raises:
            MissedError: It does not, and the training is over, or time is.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = holds()
            if found:
                return found
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise MissedError
            time.sleep(_POLL_S)

    def at_step(self, step: int) -> list[Heartbeat]:
        """Wait until all ranks compute a step, or a later one; return their heartbeats."""

        def all_there() -> list[Heartbeat]:
            beats = self.beats()
            there = beats and all(b.phase == "step" and b.step >= step for b in beats)
            return beats if there else []

        return self.until(all_there)

    def next_attempt(self, attempt: int, phase: str) -> list[Heartbeat]:
        """Wait until some rank of an attempt, or of a later one, is in a phase."""

        def there() -> list[Heartbeat]:
            if len(self.events("attempt.start")) <= attempt:
                return []
            return [b for b in self.beats() if b.phase == phase and process_alive(b.pid)]

        return self.until(there)

    def hurt(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one of its processes."""
        self.hurt_at_s.append(time.monotonic())
        with contextlib.suppress(ProcessLookupError):  # it ended in this very moment
            os.kill(pid, number)

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the supervisor and wait until it and its ranks are gone."""
        self.hurt(self.process.pid, number)
        self.process.wait()
        self.until_gone()

    def go_down(self) -> None:
        """Lose the machine: all processes at once, and what is in memory."""
        self.end()
        self.close()

    def until_gone(self, timeout_s: float = 20.0) -> None:
        """Wait until no rank is left.

        Raises:
            MissedError: Some stay.
        """
        deadline_s = time.monotonic() + timeout_s
        while any(process_alive(b.pid) for b in self.beats()):
            if time.monotonic() > deadline_s:
                raise MissedError
            time.sleep(0.01)

    def newest_checkpoint(self) -> Path:
        """Return the folder of the newest checkpoint."""
        steps = list_steps(self.out / CHECKPOINTS_DIR)
        return step_dir(self.out / CHECKPOINTS_DIR, max(steps))
