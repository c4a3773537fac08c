"""Kills a training again and again and compares every step with the one that nothing happened to.

    python benchmarks/bench_resume.py [--kills 100] [--ranks 2] [--tp 1] [--pp 1] [--cp 1]

Two trainings of the same small model on the same packed rows, through supervisor, torchrun, FSDP2
and checkpoints: one is left alone; in the other a random rank is killed (SIGKILL) after a random
number of new steps, until it has died ``--kills`` times. Compared are loss and gradient norm of
every step of every attempt, bit by bit, and the bytes of the final weights. Counted apart: the
first new step after each resume.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from puna.core.fsio import hash_file
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LlamaConfig
from puna.resilience.heartbeat import read_heartbeats
from puna.train.config import CheckpointConfig, ParallelConfig, RestartConfig, TrainingConfig
from puna.train.spec import SourceSpec
from puna.train.stage import train_job

MODEL = LlamaConfig(
    vocab_size=512, dim=64, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=128, max_seq_len=128
)
EVERY = 3


class Killer(threading.Thread):
    """Kills a random rank whenever an attempt has made some new steps."""

    def __init__(self, out: Path, n_kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.kills: list[tuple[int, int]] = []
        self._out, self._left, self._random = out, n_kills, random.Random(seed)

    def run(self) -> None:
        """Until all are done."""
        attempt, done = 0, -1
        while self._left:
            goal = done + self._random.randint(1, 2 * EVERY)
            folder = self._out / "state" / f"attempt-{attempt}"
            while True:
                beats = [b for b in read_heartbeats(folder) if b.phase == "step"]
                if beats and min(b.step for b in beats) > goal:
                    break
                time.sleep(0.002)
            time.sleep(self._random.random() * 0.05)  # anywhere inside the step
            victim = self._random.choice(beats)
            os.kill(victim.pid, signal.SIGKILL)
            self.kills.append((victim.rank, victim.step))
            done, attempt, self._left = victim.step, attempt + 1, self._left - 1


def train(folder: Path, options: argparse.Namespace, n_kills: int) -> tuple[Path, list]:
    """Train; return the folder and what was killed."""
    folder.mkdir()
    steps = options.kills * (EVERY + 2) + 20
    cfg = TrainingConfig(
        steps=steps, seq_len=64, global_batch=8, micro_batch=1 if options.pp > 1 else 0,
        nproc=options.ranks, precision=options.precision,
        parallel=ParallelConfig(tp=options.tp, pp=options.pp, cp=options.cp),
        checkpoint=CheckpointConfig(every=EVERY), restart=RestartConfig(max_restarts=20),
    )  # fmt: skip
    source = SourceSpec("bench_train:RandomRows", {
        "vocab_size": MODEL.vocab_size, "seq_len": 64, "n_rows": 8, "doc_len": 20,
    })  # fmt: skip
    killer = Killer(folder / "out", n_kills, options.seed)
    killer.start()
    train_job(cfg, MODEL, source, folder / "out", Ledger(folder / LEDGER_FILE))
    return folder, killer.kills


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    for dim in ("tp", "pp", "cp"):
        parser.add_argument(f"--{dim}", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, here)
    with tempfile.TemporaryDirectory() as folder:
        quiet, _ = train(Path(folder) / "quiet", options, 0)
        start_s = time.monotonic()
        hit, kills = train(Path(folder) / "hit", options, options.kills)
        seconds = time.monotonic() - start_s
        expected = {
            e["step"]: (e["loss"], e["grad_norm"])
            for e in read_events(quiet / LEDGER_FILE, "train.step")
        }
        seen: dict[int, list[int]] = {}
        n_wrong = 0
        for event in read_events(hit / LEDGER_FILE, "train.step"):
            seen.setdefault(event["attempt"], []).append(event["step"])
            n_wrong += (event["loss"], event["grad_norm"]) != expected[event["step"]]
        first_good = 0
        for event in read_events(hit / LEDGER_FILE, "train.step"):
            if event["attempt"] and event["step"] == seen[event["attempt"]][0]:
                first_good += (event["loss"], event["grad_norm"]) == expected[event["step"]]
        n_resumed = sum(attempt > 0 for attempt in seen)
        weights = [hash_file(f / "out" / "model" / "model.safetensors") for f in (quiet, hit)]
    n_steps = sum(map(len, seen.values()))
    layout = f"{options.ranks} ranks, tp {options.tp}, cp {options.cp}, pp {options.pp}"
    print(f"{layout}, {options.precision}: {len(kills)} kills in {seconds:.0f} s")
    print(f"first new step after a resume equal: {first_good} of {n_resumed}")
    print(f"steps equal: {n_steps - n_wrong} of {n_steps} ({n_steps - len(expected)} recomputed)")
    print(f"final weights equal: {weights[0] == weights[1]}")
    return 0 if not n_wrong and weights[0] == weights[1] else 1


if __name__ == "__main__":
    sys.exit(main())
