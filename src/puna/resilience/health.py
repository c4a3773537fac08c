"""The health of this host: what runs out, and what counts errors, read from the kernel.

Levels (free memory, free disk) are compared with a limit as they are, counters (errors of memory
and network, throttling) by how much they grew since the last look. Most hardware tells before it
fails: corrected errors come before uncorrected ones (Llama 3, section 3.3.4: 78 % of its unexpected
interruptions were hardware). What a machine has not is left out.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from puna.core.ledger import Ledger
from puna.core.units import format_bytes
from puna.resilience.gpu_health import read_gpus

SAMPLE_S = 10.0
_GIB = 1 << 30
Unit = Literal["bytes", "share", "seconds", "events"]


@dataclass(frozen=True)
class Limit:
    """From where on a value is bad.

    Attributes:
        meaning: Of the value, in words.
        unit: Of the value.
        most: It is bad above this; None where it must not be low, and the limit is read.
        is_counter: What counts is how much it grew since the last look.
    """

    meaning: str
    unit: Unit
    most: float | None = None
    is_counter: bool = False


LIMITS: Mapping[str, Limit] = {
    "memory": Limit("free memory", "bytes"),
    "disk": Limit("free disk in the folder of the run", "bytes"),
    "out_of_memory": Limit("processes killed for want of memory", "events", 0, True),
    "clock": Limit("jump of the wall clock", "seconds", 1.0),
    "steal": Limit("time that other virtual machines took from this one", "share", 0.1),
    "cpu_quota": Limit("share of periods in which the CPU quota was used up", "share", 0.25),
    "cpu_heat": Limit("times that a core was slowed for heat", "events", 0, True),
    "network": Limit("errors of network interfaces", "events", 10, True),
    "ecc_corrected": Limit("corrected errors of memory", "events", 100, True),
    "ecc_uncorrected": Limit("uncorrected errors of memory", "events", 0, True),
    "gpu_ecc": Limit("uncorrected errors of GPU memory", "events", 0, True),
    "gpu_slowed": Limit("GPUs slowed for heat or power", "events", 0),
    "gpu_xid": Limit("critical errors (XID) of GPUs", "events", 0, True),
}
"""Kinds of values; also the order in which they are shown."""


@dataclass(frozen=True)
class Reading:
    """One value and its limit.

    Attributes:
        kind: Of :data:`LIMITS`.
        value: Level, or growth since the last look.
        limit: Where it begins to be bad.
        total: Of a counter, since the machine was started.
    """

    kind: str
    value: float
    limit: float
    total: float | None = None

    @property
    def is_bad(self) -> bool:
        """Whether the value is beyond its limit."""
        return (
            self.value < self.limit if LIMITS[self.kind].most is None else self.value > self.limit
        )

    def __str__(self) -> str:
        limit = LIMITS[self.kind]
        side = "at least" if limit.most is None else "at most"
        return (
            f"{limit.meaning}: {show(self.value, limit.unit)} ({side} "
            f"{show(self.limit, limit.unit)})"
        )


def show(value: float, unit: Unit) -> str:
    """Return a value in words."""
    if unit == "bytes":
        return format_bytes(value)
    return {"share": f"{value:.0%}", "seconds": f"{value:.2f} s", "events": f"{value:g}"}[unit]


class HostHealth:
    """Reads the counters of this host.

    Args:
        folder: Of the run.
        root: Of ``/proc`` and ``/sys``.
        wall: Wall clock, in seconds.
        monotonic: Monotonic clock, in seconds.
        gpus: Reads the values of GPUs, by kind.
    """

    def __init__(
        self,
        folder: Path,
        root: Path = Path("/"),
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        gpus: Callable[[], Mapping[str, float]] = read_gpus,
    ) -> None:
        self._folder, self._root, self._gpus = folder, root, gpus
        self._wall, self._monotonic = wall, monotonic
        self._last: dict[str, float] = {}

    def read(self) -> list[Reading]:
        """Return what can be read; growth and shares are since the last call."""
        now = dict(self._raw())
        last, self._last = self._last or now, now
        grown = {name: value - last.get(name, value) for name, value in now.items()}
        values: dict[str, float] = {
            kind: (grown if limit.is_counter else now)[kind]
            for kind, limit in LIMITS.items()
            if kind in now and limit.most is not None
        }
        if "cpu_ticks" in now:
            values["steal"] = _share(grown["steal_ticks"], grown["cpu_ticks"])
        if "quota_periods" in now:
            values["cpu_quota"] = _share(grown["quota_used_up"], grown["quota_periods"])
        values["clock"] = abs(grown["clock_offset_s"])
        found = [
            Reading(kind, value, LIMITS[kind].most or 0.0,
                    now[kind] if LIMITS[kind].is_counter else None)
            for kind, value in values.items()
        ]  # fmt: skip
        levels = (kind for kind in ("memory", "disk") if kind in now)
        found += [Reading(kind, now[kind], now[f"{kind}_limit"]) for kind in levels]
        order = list(LIMITS)
        return sorted(found, key=lambda reading: order.index(reading.kind))

    def _raw(self) -> Iterator[tuple[str, float]]:
        yield "clock_offset_s", self._wall() - self._monotonic()
        memory = self._words("proc/meminfo")
        if "MemAvailable:" in memory:
            yield "memory", 1024.0 * memory["MemAvailable:"]
            yield "memory_limit", min(0.05 * 1024 * memory["MemTotal:"], 4.0 * _GIB)
        if self._folder.exists():
            disk = shutil.disk_usage(self._folder)
            yield "disk", disk.free
            yield "disk_limit", min(0.05 * disk.total, 20.0 * _GIB)
        killed = self._words("proc/vmstat").get("oom_kill")
        if killed is not None:
            yield "out_of_memory", killed
        yield from self._processor()
        for kind, pattern in (
            ("network", "sys/class/net/*/statistics/[rt]x_errors"),
            ("ecc_corrected", "sys/devices/system/edac/mc/mc*/ce_count"),
            ("ecc_uncorrected", "sys/devices/system/edac/mc/mc*/ue_count"),
            ("cpu_heat", "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"),
        ):
            counts = [n for path in self._root.glob(pattern) for n in _numbers_in(path)]
            if counts:
                yield kind, sum(counts)
        yield from self._gpus().items()

    def _processor(self) -> Iterator[tuple[str, float]]:
        stat = self._root / "proc/stat"
        if stat.exists():
            ticks = [float(word) for word in stat.read_text().splitlines()[0].split()[1:9]]
            yield "cpu_ticks", sum(ticks)
            yield "steal_ticks", ticks[7]
        for place in ("sys/fs/cgroup/cpu.stat", "sys/fs/cgroup/cpu/cpu.stat"):
            quota = self._words(place)
            if "nr_periods" in quota:
                yield "quota_periods", quota["nr_periods"]
                yield "quota_used_up", quota["nr_throttled"]
                return

    def _words(self, name: str) -> dict[str, float]:
        """Read lines of a name and a number."""
        path = self._root / name
        if not path.exists():
            return {}
        lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
        return {line[0]: float(line[1]) for line in lines if len(line) > 1}


def _numbers_in(path: Path) -> list[float]:
    try:
        return [float(path.read_text())]
    except OSError:  # the interface or the core is gone since it was listed
        return []


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


class HealthWatch:
    """Looks at this host now and then while a training runs, and tells what is bad, once per kind.

    Args:
        health: Of this host.
        events: Ledger of the training.
        node: Number of this machine.
        every_s: Seconds between two looks.
        monotonic: Monotonic clock, in seconds.
    """

    def __init__(
        self,
        health: HostHealth,
        events: Ledger,
        node: int = 0,
        every_s: float = SAMPLE_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._health, self._events, self._node, self._every_s = health, events, node, every_s
        self._monotonic = monotonic
        self._next_s = -float("inf")
        self._told: set[str] = set()

    def tick(self) -> None:
        """Look, when it is time to; cheap otherwise."""
        now_s = self._monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + self._every_s
        for reading in self._health.read():
            if reading.is_bad and reading.kind not in self._told:
                self._told.add(reading.kind)
                self._events.emit(
                    "health.warning", node=self._node, host=socket.gethostname(),
                    message=str(reading), unit=LIMITS[reading.kind].unit, what=reading.kind,
                    value=reading.value, limit=reading.limit,
                )  # fmt: skip


def to_json(reading: Reading) -> dict[str, Any]:
    """Return JSON values of a reading."""
    limit = LIMITS[reading.kind]
    return {**asdict(reading), "meaning": limit.meaning, "unit": limit.unit, "bad": reading.is_bad}
