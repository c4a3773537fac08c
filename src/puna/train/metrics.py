"""What a step costs and how close it comes to what the machine can do.

MFU (model FLOPs utilisation) is the analytic FLOPs of the step (:mod:`puna.model.accounting` names
the convention) over the measured peak of a large matrix product, same dtype, same number of ranks
and threads, all ranks measuring at the same time. FLOP counters are not used: torch's counts zero
for attention on CPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from puna.core.fsio import write_json
from puna.core.ledger import Ledger
from puna.model.accounting import Accounting
from puna.train.parallel.world import World
from puna.train.watch.clock import STEP_PARTS, StepClock
from puna.train.watch.memory import peak_memory_bytes

if TYPE_CHECKING:
    from puna.train.parallel.model import StepReport

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


@dataclass(frozen=True)
class StepCost:
    """What a training computes per token, and what the machine can do.

    Attributes:
        model: Accounting of the model.
        n_again: Layers of it that are computed again in the backward pass.
        peak_flops: Of all ranks together, FLOP/s.
    """

    model: Accounting
    n_again: float
    peak_flops: float

    def model_flops(self, n_tokens: int, seq_len: int) -> float:
        """FLOPs of tokens by the convention: what MFU counts."""
        return float(n_tokens * self.model.flops_per_token(seq_len))

    def hardware_flops(self, n_tokens: int, seq_len: int) -> float:
        """FLOPs with those of layers that are computed again: what HFU counts."""
        again = self.n_again * self.model.layer_flops_per_token(seq_len)
        return self.model_flops(n_tokens, seq_len) + n_tokens * again

    def document_flops(self, n_tokens: int, n_visible: float) -> float:
        """FLOPs with attention counted by what the tokens can see."""
        return self.model.flops_by_documents(n_tokens, n_visible)


@dataclass
class _Sums:
    """What has come together since the last event."""

    n_steps: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    model_flops: float = 0.0
    hardware_flops: float = 0.0
    document_flops: float = 0.0
    sources: dict[str, list[float]] = field(default_factory=dict)


class StepMeter:
    """Times the steps and writes ``train.step`` events (rank 0 only).

    An event has, beside loss, learning rate and norm of the gradient of its last step:

    - ``step_s`` and its parts ``data_s, forward_s, backward_s, optimizer_s, communication_s``, in
      seconds per step, the mean over the ranks (``step_s``: rank 0). What is missing from the sum
      is the loop itself. Communication is the waiting for sums over all ranks, for FSDP and, in a
      pipeline, for other stages. What tensor and context parallel exchange, and the sum over
      replicas, happens inside forward and backward and counts there. On a GPU, FSDP's exchange
      overlaps with the computation and shows only as longer passes.
    - ``checkpoint_s, eval_s``: waiting since the last event that is in no step, in all.
    - ``mfu, hfu, mfu_documents``: model FLOPs by the convention of :mod:`puna.model.accounting`,
      these and what is computed again, and with attention counted by the lengths of the
      documents, each over the measured peak; ``tflops_per_device`` are the first.
    - ``peak_memory_bytes``: of the rank that has taken most so far.
    - ``sources``: mean cross entropy of each source in nats per token, over the steps of the
      event, without the z-loss, and its labelled tokens.

    Args:
        events: Ledger.
        world: The ranks.
        clock: Counts the parts of the steps.
        attempt: Number of the attempt.
        log_every: Steps per event.
        cost: FLOPs and peak.
        on_event: Called with the step and the event's values, on rank 0.
    """

    def __init__(
        self,
        events: Ledger,
        world: World,
        clock: StepClock,
        *,
        attempt: int,
        log_every: int,
        cost: StepCost,
        on_event: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        self._events, self._world, self._clock = events, world, clock
        self._attempt, self._log_every = attempt, log_every
        self.cost, self._on_event = cost, on_event
        self._begin_s = 0.0
        self._sums = _Sums()
        self._last: dict[str, Any] = {}

    def begin(self) -> None:
        """A step begins."""
        self._begin_s = time.perf_counter()

    def end(
        self,
        step: int,
        report: StepReport,
        *,
        n_tokens: int,
        seq_len: int,
        loss: float,
        lr: float,
        grad_norm: float,
    ) -> None:
        """A step is done.

        Args:
            step: Its number.
            report: What it was computed on.
            n_tokens: Of the global batch.
            seq_len: Tokens per row.
            loss: Mean over the labelled tokens of the global batch, in nats.
            lr: Learning rate.
            grad_norm: Before clipping.
        """
        synchronize(self._world.device)
        sums, cost = self._sums, self.cost
        sums.n_steps += 1
        sums.n_tokens += n_tokens
        sums.seconds += time.perf_counter() - self._begin_s
        sums.model_flops += cost.model_flops(n_tokens, seq_len)
        sums.hardware_flops += cost.hardware_flops(n_tokens, seq_len)
        sums.document_flops += cost.document_flops(n_tokens, report.n_visible)
        for name, (nats, n_labelled) in report.sources.items():
            of_source = sums.sources.setdefault(name, [0.0, 0.0])
            of_source[0] += nats
            of_source[1] += n_labelled
        self._last = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        if sums.n_steps >= self._log_every:
            self.flush()

    def flush(self) -> None:
        """Write the event of the steps since the last one; before a checkpoint, and when due.

        All ranks call it after the same steps.
        """
        if not self._sums.n_steps:
            return
        sums, self._sums = self._sums, _Sums()
        world, n_steps = self._world, sums.n_steps
        parts = self._clock.take()
        means = [seconds / world.size for seconds in world.sum(list(parts.values()))]
        (peak_bytes,) = world.max([peak_memory_bytes(world.device)])
        if world.rank != 0:
            return
        times = {
            f"{part}_s": seconds / (n_steps if part in STEP_PARTS else 1)
            for part, seconds in zip(parts, means, strict=True)
        }
        peak_of_steps = sums.seconds * self.cost.peak_flops
        values: dict[str, Any] = {
            **self._last,
            "tokens": sums.n_tokens,
            "step_s": sums.seconds / n_steps,
            **times,
            "tokens_per_s": sums.n_tokens / sums.seconds,
            "mfu": sums.model_flops / peak_of_steps,
            "hfu": sums.hardware_flops / peak_of_steps,
            "mfu_documents": sums.document_flops / peak_of_steps,
            "tflops_per_device": sums.model_flops / sums.seconds / world.size / 1e12,
            "peak_memory_bytes": int(peak_bytes),
            "sources": {
                name: {"loss": nats / n_labelled, "tokens": int(n_labelled)}
                for name, (nats, n_labelled) in sums.sources.items()
            },
        }
        self._events.emit("train.step", attempt=self._attempt, n_steps=n_steps, **values)
        if self._on_event is not None:
            self._on_event(self._last["step"], values)
