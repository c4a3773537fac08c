"""Seconds from ``kill -9`` of a rank to the first new step, beside torchrun's own restart.

    python benchmarks/bench_gap.py [--kills 5]

Two ranks, a small model, a copy of the state after every step: in shared memory here, in a file
there. Waiting processes (``restart.standby``) are there before each kill, as they are in a run that
fails every few hours; without them the same is measured once more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from puna.train.chaos.subject import Subject

KEPT = {"every": 1_000_000, "memory_every": 1}


class Ours:
    """A training of ours, with or without waiting processes."""

    def __init__(self, folder: Path, *, standby: bool) -> None:
        restart = {"standby": standby, "standby_after_s": 0.0}
        self._subject = Subject(folder, 2, steps=1_000_000, restart=restart, checkpoint=KEPT)
        self._standby, self._n_kills = standby, 0
        self._subject.start()
        self.n_lost = 0

    def kill(self) -> float:
        """Kill a rank; return the seconds until the next step."""
        subject, self._n_kills = self._subject, self._n_kills + 1
        subject.at_step(5)
        if self._standby:
            folder = subject.out / "state" / f"attempt-{self._n_kills}"
            subject.until(lambda: len(list(folder.glob("ready-*"))) == 2)
        subject.hurt(subject.beats()[1].pid)
        at_s = subject.hurt_at_s[-1]

        def again() -> list[dict[str, Any]]:
            steps = subject.events("train.step")
            return [e for e in steps if e["attempt"] == self._n_kills]

        first = subject.until(again)[0]
        done = [e for e in subject.events("recovery.done") if e["attempt"] == self._n_kills]
        self.n_lost += sum(event["steps_lost"] for event in done)
        return first["t_mono_s"] - at_s

    def close(self) -> None:
        """End it."""
        self._subject.close()


class Torchrun:
    """A plain training that torchrun restarts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        script = Path(__file__).with_name("gap_peer.py")
        with (folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                 "--max-restarts=99", "--monitor-interval=0.1", str(script), str(folder)],
                stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )  # fmt: skip

    def _last(self, rank: int) -> dict[str, Any]:
        path = self._folder / f"steps-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1]) if lines else {"pid": 0, "step": 0, "t_mono_s": 0.0}

    def kill(self) -> float:
        """Kill a rank; return the seconds until the next step."""
        self._until(lambda: self._last(1)["step"] > 5)
        time.sleep(1)
        victim, at_s = self._last(1)["pid"], time.monotonic()
        os.kill(victim, signal.SIGKILL)
        self._until(lambda: self._last(1)["pid"] != victim)
        return self._last(1)["t_mono_s"] - at_s

    def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            if self._process.poll() is not None:
                raise SystemExit((self._folder / "log.txt").read_text())
            time.sleep(0.002)

    def close(self) -> None:
        """End it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="of each")
    args = parser.parse_args()
    makers: dict[str, Callable[[Path], Ours | Torchrun]] = {
        "puna, waiting processes": lambda folder: Ours(folder, standby=True),
        "puna, without": lambda folder: Ours(folder, standby=False),
        "torchrun": Torchrun,
    }
    gaps: dict[str, list[float]] = {name: [] for name in makers}
    for name, make in makers.items():
        # One at a time: three trainings at once would measure each other.
        with tempfile.TemporaryDirectory() as folder:
            training = make(Path(folder) / "run")
            try:
                gaps[name] = [training.kill() for _ in range(args.kills)]
            finally:
                training.close()
            lost = f", {training.n_lost} steps lost" if isinstance(training, Ours) else ""
        shown = " ".join(f"{gap:.2f}" for gap in gaps[name])
        print(f"{name:26} median {statistics.median(gaps[name]):6.2f} s  ({shown}){lost}")


if __name__ == "__main__":
    main()
