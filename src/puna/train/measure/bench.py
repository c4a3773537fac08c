"""The microbenchmarks of one rank: matrix products, memory, collectives."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from puna.train.measure.run import MeasurePlan
from puna.train.metrics import synchronize
from puna.train.parallel.world import World

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SHARES = {"bf16": 0.3, "fp32": 0.15, "copy": 0.1, "collectives": 0.45}
"""Of the time."""
_TOKENS = {"cpu": (128, 512, 2048), "cuda": (512, 2048, 8192)}
_WIDTHS = {
    "cpu": ((256, 256), (1024, 1024), (1024, 4096), (4096, 1024), (2048, 2048)),
    "cuda": ((1024, 4096), (4096, 1024), (4096, 4096), (4096, 14_336), (14_336, 4096)),
}
"""Outer and inner size (n, k): projections and feed-forwards of small and large models."""
_QUICK_TOKENS, _QUICK_WIDTHS = (64, 256), ((128, 128), (256, 512), (512, 256))
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_QUICK_COPY_BYTES = 1 << 25
_FEWEST = 2
"""Repetitions of a collective, however long one takes."""
_FEWEST_SHAPES = 4
"""Products that a fit needs, however long they take."""
_ROUNDS = 4
"""Times that all products are measured in turn."""
_QUARTER = 0.25


class Bench:
    """Measures one machine; every rank makes one and calls :meth:`measure`.

    Args:
        world: The ranks.
        plan: How long.
        tell: Called with percent and what is measured.
    """

    def __init__(
        self, world: World, plan: MeasurePlan, tell: Callable[[float, str], None]
    ) -> None:  # fmt: skip
        self._world, self._plan, self._tell = world, plan, tell
        self._device = world.device
        self._done = 0.0

    def measure(self) -> dict[str, Any]:
        """Return everything, in seconds, bytes and bytes/s; the same on all ranks."""
        products = {kind: self._products(kind) for kind in _DTYPES}
        copy_bytes_s, copy_scatter = self._copy()
        return {
            "device": self._device.type, "n_ranks": self._world.size,
            "threads": self._world.n_threads, "products": products,
            "copy_bytes_s": copy_bytes_s, "copy_scatter": copy_scatter,
            "collectives": self._collectives(), **_describe(self._device, self._world.size),
        }  # fmt: skip

    def _advance(self, what: str, share: float, note: str) -> None:
        self._done += 100 * _SHARES[what] * share
        self._tell(min(self._done, 99.0), note)

    def _products(self, kind: str) -> list[tuple[int, int, int, float]]:
        """Seconds of (m, k) x (k, n), the mean over the ranks."""
        quick, device = self._plan.quick, self._device.type
        tokens = _QUICK_TOKENS if quick else _TOKENS[device]
        widths = _QUICK_WIDTHS if quick else _WIDTHS[device]
        shapes = sorted({(m, n, k) for m in tokens for n, k in widths}, key=math.prod)
        budget_s, begin_s = self._plan.seconds * _SHARES[kind], time.perf_counter()
        each_s = budget_s / (len(shapes) * _ROUNDS)
        times: dict[tuple[int, int, int], list[float]] = {}
        for turn in range(_ROUNDS):  # what else the machine does comes and goes
            for m, n, k in shapes:
                spent_s = time.perf_counter() - begin_s
                next_s = self._expected(times, m * n * k, is_first=turn == 0)
                (at_s,) = self._world.max([spent_s + next_s])
                if len(times) >= _FEWEST_SHAPES and at_s > budget_s:
                    break  # the rest are larger
                a_mk = torch.randn((m, k), device=self._device).to(_DTYPES[kind])
                b_kn = torch.randn((k, n), device=self._device).to(_DTYPES[kind])
                out_mn = torch.empty((m, n), device=self._device, dtype=_DTYPES[kind])
                self._world.barrier()
                times.setdefault((m, n, k), []).extend(
                    self._repeat(
                        lambda a=a_mk, b=b_kn, o=out_mn: torch.mm(a, b, out=o), each_s,
                        warm=turn == 0,
                    )
                )  # fmt: skip
                share = 1 / (len(shapes) * _ROUNDS)
                self._advance(kind, share, f"{kind} product {m} x {n} x {k}")
        self._done = max(self._done, 100 * self._until(kind))
        sums = self._world.sum([_typical(seconds) for seconds in times.values()])
        size = self._world.size
        return [(*shape, total / size) for shape, total in zip(times, sums, strict=True)]

    @staticmethod
    def _expected(
        times: dict[tuple[int, int, int], list[float]], size: int, *, is_first: bool
    ) -> float:
        """Seconds that a product of m n k = size will take, by the largest one so far."""
        if not times:
            return 0.0
        largest = max(times, key=math.prod)
        per_call = _typical(times[largest]) * max(size / math.prod(largest), 0.1)
        return per_call * (2.0 if is_first else 1.0)

    @staticmethod
    def _until(kind: str) -> float:
        """Share of the time at the end of a kind of measurement."""
        names = list(_SHARES)
        return sum(_SHARES[name] for name in names[: names.index(kind) + 1])

    def _copy(self) -> tuple[float, float]:
        """Bytes/s read and written by a large copy, the mean over the ranks, and their scatter."""
        n_bytes = _QUICK_COPY_BYTES if self._plan.quick else _COPY_BYTES[self._device.type]
        a, b = (torch.zeros(n_bytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        self._world.barrier()
        times = self._repeat(lambda: b.copy_(a), self._plan.seconds * _SHARES["copy"])
        rate, scatter = self._world.sum(
            [2 * n_bytes / _typical(times), _log_spread(times)]
        )  # fmt: skip
        self._advance("copy", 1.0, "memory bandwidth")
        return rate / self._world.size, round(scatter / self._world.size, 4)

    def _repeat(
        self, call: Callable[[], object], budget_s: float, *, warm: bool = True
    ) -> list[float]:
        """Seconds of each call within a budget, at least one, after one to warm up."""
        if warm:
            call()
            synchronize(self._device)
        times: list[float] = []
        end_s = time.perf_counter() + budget_s
        while not times or time.perf_counter() < end_s:
            begin_s = time.perf_counter()
            call()
            synchronize(self._device)
            times.append(time.perf_counter() - begin_s)
        return times

    def _collectives(self) -> list[dict[str, Any]]:
        """Seconds of gathers and reductions by size, of all ranks and of half of them."""
        if self._world.size == 1:
            return []
        last = 20 if self._plan.quick else 28 if self._device.type == "cuda" else 25
        sizes = [2**power for power in range(12, last + 1, 2)]
        counts = [n for n in (2, self._world.size // 2, self._world.size) if n >= 2]
        counts = sorted(set(counts))
        budget_s = self._plan.seconds * _SHARES["collectives"] / (2 * len(sizes) * len(counts))
        found = []
        for n_ranks in counts:
            group = dist.new_group(list(range(n_ranks)))
            for op in ("all_gather", "all_reduce"):
                points = []
                for size in sizes:
                    seconds = self._collective(op, n_ranks, group, size, budget_s)
                    points.append((size, seconds))
                    note = f"{op} of {n_ranks} ranks, {size >> 10} KiB"
                    self._advance("collectives", 1 / (2 * len(sizes) * len(counts)), note)
                found.append({"op": op, "n_ranks": n_ranks, "points": points})
        return found

    def _collective(
        self, op: str, n_ranks: int, group: Any, n_bytes: int, budget_s: float
    ) -> float:
        """Seconds of one call; ranks outside the group wait, as they would compute."""
        whole = torch.zeros(n_bytes // 4, device=self._device)
        part = torch.zeros(n_bytes // 4 // n_ranks, device=self._device)
        whole = whole[: part.numel() * n_ranks]

        def call() -> None:
            if op == "all_gather":
                dist.all_gather_into_tensor(whole, part, group=group)
            else:
                dist.all_reduce(whole, group=group)

        inside = self._world.rank < n_ranks
        first_s, times = 0.0, []
        for attempt in range(2):  # the first one connects
            self._world.barrier()
            begin_s = time.perf_counter()
            if inside:
                call()
                synchronize(self._device)
            first_s = time.perf_counter() - begin_s if attempt else 0.0
        (first_s,) = self._world.max([first_s])
        n_calls = min(max(int(budget_s / max(first_s, 1e-6)), _FEWEST), 2000)
        self._world.barrier()
        for _ in range(n_calls if inside else 0):
            begin_s = time.perf_counter()
            call()
            synchronize(self._device)
            times.append(time.perf_counter() - begin_s)
        (slowest,) = self._world.max([_typical(times) if times else 0.0])
        return slowest


def _typical(times: list[float]) -> float:
    """The time that a quarter of the calls stays below: other work on the machine only adds."""
    return sorted(times)[int(_QUARTER * (len(times) - 1))]


def _log_spread(times: list[float]) -> float:
    ordered = sorted(times)
    low, high = ordered[int(0.16 * (len(times) - 1))], ordered[int(0.84 * (len(times) - 1))]
    return math.log(high / low) / 2


def _describe(device: torch.device, n_ranks: int) -> dict[str, Any]:
    """Name, memory per rank in bytes, multiprocessors and capability of the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "name": properties.name, "memory_bytes": properties.total_memory,
            "sms": properties.multi_processor_count, "capability": properties.major,
        }  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": _cpu_name(), "memory_bytes": memory // n_ranks, "sms": 1, "capability": 0,
    }  # fmt: skip


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
