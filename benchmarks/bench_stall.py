"""What a snapshot costs a training: the stall, and how much the write behind it slows the steps.

    python benchmarks/bench_stall.py [--mib 1024] [--rounds 5] [--limit-s 50]

Each round takes, one after the other and in an order that turns by one: a copy into memory that was
mapped and touched before (the floor), our snapshot, DCP's asynchronous save (the time until it
returns, warm), and DCP's synchronous save. Whatever goes on behind is waited for before the next.
The medians count. Then steps (products of matrices) are timed alone and while a checkpoint is
written from a snapshot; a step at whose end the write was over is not counted.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch import Tensor

from puna.core.ledger import Ledger
from puna.train.checkpoint.snapshot import Snapshots
from puna.train.checkpoint.store import CheckpointStore
from puna.train.checkpoint.tiers import CheckpointTiers
from puna.train.checkpoint_config import CheckpointConfig
from puna.train.parallel.world import World
from puna.train.spec import SHARED_MEMORY

State = dict[str, Tensor]
MIB = 1 << 20
TENSOR_MIB = 16
GOAL_STALL, GOAL_SLOWER = 1.3, 0.05


def make_state(mib: int) -> State:
    """Matrices of 16 MiB each."""
    rows = 2048
    return {
        f"layer.{i}": torch.randn(rows, TENSOR_MIB * MIB // 4 // rows)
        for i in range(max(1, mib // TENSOR_MIB))
    }


def seconds(action: Callable[[], object]) -> float:
    """Time one call."""
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


class Stalls:
    """The ways to save, each with what has to be waited for afterwards."""

    def __init__(self, state: State, memory: Path, disk: Path) -> None:
        self._state, self._disk, self._step = state, disk, 0
        self._floor = [torch.zeros_like(value) for value in state.values()]
        self._snapshots = Snapshots(memory, 0, "benchmark", state)
        self._ways = {
            "preallocated copy": self._copy, "puna snapshot": self._snapshot,
            "DCP async": self._dcp_async, "DCP sync": self._dcp_sync,
        }  # fmt: skip

    def round(self, number: int) -> dict[str, float]:
        """Time each way once, beginning with another one in each round."""
        names = list(self._ways)
        turned = names[number % len(names) :] + names[: number % len(names)]
        return {name: self._ways[name]() for name in turned}

    def _copy(self) -> float:
        return seconds(lambda: torch._foreach_copy_(self._floor, list(self._state.values())))

    def _snapshot(self) -> float:
        self._step += 1
        stall_s = seconds(lambda: self._snapshots.take(self._step, "float32"))
        self._snapshots.settle()
        return stall_s

    def _dcp_async(self) -> float:
        folder, pending = self._disk / "async", []
        stall_s = seconds(
            lambda: pending.append(torch_dcp.async_save(self._state, checkpoint_id=folder))
        )
        pending[0].result()
        shutil.rmtree(folder)
        return stall_s

    def _dcp_sync(self) -> float:
        folder = self._disk / "sync"
        stall_s = seconds(lambda: torch_dcp.save(self._state, checkpoint_id=folder))
        shutil.rmtree(folder)
        return stall_s


def slower(state: State, memory: Path, disk: Path, limit_s: float) -> tuple[float, float, int]:
    """Return the median step without a write and during one, and how many were during one."""
    world = World(0, 1, torch.device("cpu"), 1, None)
    store = CheckpointStore(
        disk / "checkpoints", world, identity="b", keep=1, must_save=True, events=Ledger(None)
    )
    config = CheckpointConfig(every=1, memory_every=1)
    tiers = CheckpointTiers(config, store, memory, "b", state, world, Ledger(None), 0)
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def step() -> float:
        return seconds(lambda: [torch.mm(left, right) for _ in range(8)])

    quiet: list[float] = []
    busy: list[float] = []
    end_s, number = time.monotonic() + limit_s, 0
    for _ in range(5):
        step()
    while time.monotonic() < end_s:
        number += 1
        quiet += [step() for _ in range(20)]
        tiers.after_step(number, "float32", final=False)
        thread = tiers._thread
        while thread is not None and thread.is_alive():
            took_s = step()
            if thread.is_alive():
                busy.append(took_s)
        tiers.wait()
    return statistics.median(quiet), statistics.median(busy or [float("nan")]), len(busy)


def main() -> int:
    """Print the medians; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=50.0, help="no new round after this")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    start_s = time.monotonic()
    with (
        tempfile.TemporaryDirectory(dir=SHARED_MEMORY, prefix="puna-bench-") as memory,
        tempfile.TemporaryDirectory(dir=options.folder) as disk,
    ):
        dist.init_process_group(
            "gloo", init_method=f"file://{disk}/meeting", rank=0, world_size=1
        )  # DCP's asynchronous save needs one
        state = make_state(options.mib)
        stalls = Stalls(state, Path(memory) / "a", Path(disk))
        stalls.round(0)  # warm: DCP's buffers, the page cache
        rounds: list[dict[str, float]] = []
        while len(rounds) < options.rounds and time.monotonic() - start_s < options.limit_s / 2:
            rounds.append(stalls.round(len(rounds)))
        del stalls
        print(f"stall of a snapshot of {options.mib} MiB, median of {len(rounds)} rounds")
        medians = {name: statistics.median(r[name] for r in rounds) for name in (rounds or [{}])[0]}
        floor_s = medians.get("preallocated copy", float("nan"))
        for name, median_s in medians.items():
            low = min(r[name] for r in rounds)
            print(f"  {name:18s} {median_s:7.3f} s (best {low:.3f})  {median_s / floor_s:6.2f}x")
        rest_s = max(3.0, options.limit_s - (time.monotonic() - start_s))
        quiet_s, busy_s, n_busy = slower(state, Path(memory) / "b", Path(disk), min(rest_s, 15.0))
        share = busy_s / quiet_s - 1
        print(f"steps: {quiet_s * 1e3:.2f} ms alone, {busy_s * 1e3:.2f} ms during the write "
              f"({share:+.1%}, {n_busy} steps)")  # fmt: skip
        dist.destroy_process_group()
    if not rounds:
        print("no round fits into --limit-s")
        return 1
    ratio = medians["puna snapshot"] / floor_s
    print(f"goals: stall {ratio:.2f}x (at most {GOAL_STALL}x), steps {share:+.1%} "
          f"(at most {GOAL_SLOWER:+.0%})")  # fmt: skip
    return 0 if ratio <= GOAL_STALL and share <= GOAL_SLOWER else 1


if __name__ == "__main__":
    sys.exit(main())
