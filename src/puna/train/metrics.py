"""What a step costs and how close it comes to what the machine can do.

MFU (model FLOPs utilisation) is the analytic FLOPs of the step (:mod:`puna.model.accounting` names
the convention) over the measured peak of a large matrix product, same dtype, same number of ranks
and threads, all ranks measuring at the same time. FLOP counters are not used: torch's counts zero
for attention on CPU.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from puna.core.fsio import write_json
from puna.core.ledger import Ledger
from puna.train.parallel.world import World

_BUDGET_S = 0.15
_SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the matrix-product peak of this process, in FLOP/s.

    Args:
        device: Where.
        dtype: Of the operands.

    Returns:
        The best rate of several products of each size, in about a third of a second. The small one
        fits between two interruptions by other work, the large one is the truer peak when there
        are none.
    """
    return max(_best_rate(n, device, dtype) for n in _SIZES[device.type])


def _best_rate(n: int, device: torch.device, dtype: torch.dtype) -> float:
    a_nn = torch.ones((n, n), device=device, dtype=dtype)
    out_nn = torch.empty_like(a_nn)
    best_s, n_done, end_s = float("inf"), 0, time.perf_counter() + _BUDGET_S
    while n_done < 4 or time.perf_counter() < end_s:
        begin_s = time.perf_counter()
        torch.mm(a_nn, a_nn, out=out_nn)
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - begin_s)
        n_done += 1
    return 2.0 * n**3 / best_s


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(folder: Path, world: World, dtype: torch.dtype) -> float:
    """Peak of all ranks together in FLOP/s; measured in the first attempt of a run, then read.

    Args:
        folder: Keeps the number, so that every attempt divides by the same one.
        world: All ranks must call it; they measure at the same time.
        dtype: Of the operands.
    """
    path = folder / f"peak-{str(dtype).removeprefix('torch.')}-{world.size}.json"
    known = world.from_first(_read_peak(path) if world.rank == 0 else None)
    if known is not None:
        return known
    world.barrier()
    (total,) = world.sum([measure_peak_flops(world.device, dtype)])
    if world.rank == 0:
        write_json(path, {"flops_per_s": total})
    return total


def _read_peak(path: Path) -> float | None:
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["flops_per_s"]


class StepMeter:
    """Times the steps and writes ``train.step`` events (rank 0 only).

    Args:
        events: Ledger.
        world: The ranks.
        attempt: Number of the attempt.
        log_every: Steps per event.
        flops_per_token: Analytic, forward and backward.
        peak_flops: Of all ranks together.
    """

    def __init__(
        self,
        events: Ledger,
        world: World,
        *,
        attempt: int,
        log_every: int,
        flops_per_token: int,
        peak_flops: float,
    ) -> None:
        self._events, self._world, self._attempt, self._log_every = (
            events,
            world,
            attempt,
            log_every,
        )
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self._begin_s = 0.0
        self._n_steps, self._n_tokens, self._seconds, self._data_s = 0, 0, 0.0, 0.0
        self._last: dict[str, Any] = {}

    def begin(self) -> None:
        """A step begins."""
        self._begin_s = time.perf_counter()

    def end(
        self,
        step: int,
        *,
        n_tokens: int,
        loss: float,
        lr: float,
        grad_norm: float,
        data_s: float = 0.0,
    ) -> None:
        """A step is done.

        Args:
            step: Its number.
            n_tokens: Of the global batch.
            loss: Mean over the labelled tokens of the global batch, in nats.
            lr: Learning rate.
            grad_norm: Before clipping.
            data_s: What this rank waited for its batch (the event has rank 0's mean per step).
        """
        synchronize(self._world.device)
        self._n_steps += 1
        self._n_tokens += n_tokens
        self._seconds += time.perf_counter() - self._begin_s
        self._data_s += data_s
        self._last = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        if self._n_steps >= self._log_every:
            self.flush()

    def flush(self) -> None:
        """Write the event of the steps since the last one; before a checkpoint, and when due."""
        if self._n_steps and self._world.rank == 0:
            step_s = self._seconds / self._n_steps
            tokens_per_s = self._n_tokens / self._seconds
            self._events.emit(
                "train.step", attempt=self._attempt, n_steps=self._n_steps, **self._last,
                tokens=self._n_tokens, step_s=step_s,
                data_s=self._data_s / self._n_steps,
                tokens_per_s=tokens_per_s,
                mfu=tokens_per_s * self.flops_per_token / self.peak_flops,
            )  # fmt: skip
        self._n_steps, self._n_tokens, self._seconds, self._data_s = 0, 0, 0.0, 0.0
