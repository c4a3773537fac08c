"""The health of a host, on made-up files of a kernel and a made-up driver."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from puna.cli.main import cli
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.resilience.gpu_health import Driver
from puna.resilience.health import LIMITS, HealthWatch, HostHealth
from puna.train import follow
from puna.train.nodes import Call
from puna.ui.report.collect.training import _incidents
from tests.unit.test_train_loop import job

Usage = namedtuple("Usage", "total used free")
GIB = 1 << 30


class Host:
    """A machine whose files and clocks are set by hand."""

    def __init__(self, root: Path) -> None:
        self.root, self.wall_s, self.mono_s = root, 1e9, 100.0
        self.gpu: dict[str, float] = {}
        self.memory(free_kib=60_000_000)
        self.write("proc/vmstat", "nr_free_pages 5\noom_kill 2\n")
        self.write("proc/stat", "cpu  100 0 50 800 0 0 0 10 0 0\ncpu0 1 1 1\n")
        self.write("sys/fs/cgroup/cpu.stat", "usage_usec 9\nnr_periods 10\nnr_throttled 9\n")
        self.write("sys/class/net/eth0/statistics/rx_errors", "70\n")
        self.write("sys/class/net/eth0/statistics/tx_errors", "7\n")
        self.write("sys/devices/system/edac/mc/mc0/ce_count", "5\n")
        self.write("sys/devices/system/edac/mc/mc1/ue_count", "1\n")
        self.write("sys/devices/system/cpu/cpu3/thermal_throttle/core_throttle_count", "4\n")
        self.health = HostHealth(
            root, root, wall=lambda: self.wall_s, monotonic=lambda: self.mono_s,
            gpus=lambda: self.gpu,
        )  # fmt: skip

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def memory(self, free_kib: int) -> None:
        self.write("proc/meminfo", f"MemTotal: 64000000 kB\nMemAvailable: {free_kib} kB\n")

    def bad(self) -> dict[str, float]:
        return {reading.kind: reading.value for reading in self.health.read() if reading.is_bad}


@pytest.fixture
def host(tmp_path: Path, monkeypatch) -> Host:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 0, 50 * GIB))
    return Host(tmp_path)


def test_errors_of_the_past_are_not_new(host: Host):
    assert host.bad() == {}
    assert host.bad() == {}
    totals = {reading.kind: reading.total for reading in host.health.read()}
    assert (totals["network"], totals["ecc_uncorrected"], totals["out_of_memory"]) == (77, 1, 2)
    assert list(totals) == [kind for kind in LIMITS if not kind.startswith("gpu")]


@pytest.mark.parametrize(("kind", "name", "text", "value"), [
    ("out_of_memory", "proc/vmstat", "oom_kill 3\n", 1),
    ("steal", "proc/stat", "cpu  140 0 50 830 0 0 0 40 0 0\n", 0.3),
    ("cpu_quota", "sys/fs/cgroup/cpu.stat", "nr_periods 20\nnr_throttled 14\n", 0.5),
    ("cpu_heat", "sys/devices/system/cpu/cpu3/thermal_throttle/core_throttle_count", "5", 1),
    ("network", "sys/class/net/eth0/statistics/rx_errors", "90\n", 20),
    ("ecc_corrected", "sys/devices/system/edac/mc/mc0/ce_count", "205\n", 200),
    ("ecc_uncorrected", "sys/devices/system/edac/mc/mc1/ue_count", "2\n", 1),
])  # fmt: skip
def test_what_grows_too_fast_is_bad_once(host: Host, kind: str, name: str, text: str, value: float):
    assert host.bad() == {}
    host.write(name, text)
    assert host.bad() == {kind: pytest.approx(value)}
    assert host.bad() == {}


def test_levels_and_clock(host: Host, monkeypatch):
    assert host.bad() == {}
    host.mono_s, host.wall_s = 110.0, host.wall_s + 10.5  # half a second in ten is no jump
    assert host.bad() == {}
    host.mono_s, host.wall_s = 120.0, host.wall_s - 3590
    assert host.bad() == {"clock": pytest.approx(3600)}
    host.memory(free_kib=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 0, 4 * GIB))
    host.gpu = {"gpu_slowed": 2.0}
    assert host.bad() == {"memory": 1024e6, "disk": 4 * GIB, "gpu_slowed": 2}


def test_a_training_is_told_once_per_kind(host: Host, tmp_path: Path):
    watch = HealthWatch(
        host.health, Ledger(tmp_path / LEDGER_FILE), node=3, monotonic=lambda: host.mono_s
    )
    for turn in range(5):
        watch.tick()
        host.mono_s, host.wall_s = host.mono_s + 6, host.wall_s + 6
        host.write("proc/vmstat", f"oom_kill {3 + turn}\n")
    (event,) = read_events(tmp_path / LEDGER_FILE, "health.warning")
    assert (event["what"], event["value"], event["limit"], event["node"]) == (
        "out_of_memory", 2, 0, 3,
    )  # fmt: skip
    assert event["message"] == "processes killed for want of memory: 2 (at most 0)"


def test_other_nodes_look_at_themselves(host: Host, tmp_path: Path, monkeypatch):
    spec = job(tmp_path / "out")
    monkeypatch.setattr(follow, "start_ranks", lambda *_: None)
    monkeypatch.setattr(follow, "HostHealth", lambda folder: host.health)
    share = follow._Share(2)
    share.look_at_health()
    share.obey(Call("leader", 1, "start", nodes=3, job=str(spec.write()), attempt=0))
    host.memory(free_kib=1000)
    share.look_at_health()
    (event,) = read_events(spec.ledger, "health.warning")
    assert (event["node"], event["what"], event["job"]) == (2, "memory", "j")
    assert _incidents([event], [])[0]["message"].startswith("node 2: free memory: 1000 KiB")


class NoSuchThingError(Exception):
    pass


def test_gpus_are_asked_what_they_support():
    xids = [79, 48]

    def wait(events: object, timeout_ms: int) -> int:
        if not xids:
            raise NoSuchThingError
        return xids.pop()

    def ecc(gpu: int, kind: int, counter: int) -> int:
        if gpu == 0:
            raise NoSuchThingError
        return 4

    nvml = SimpleNamespace(
        NVMLError=NoSuchThingError, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlEventSetCreate=lambda: "set",
        nvmlDeviceRegisterEvents=lambda *_: None, nvmlEventTypeXidCriticalError=8,
        nvmlEventSetWait_v2=wait, nvmlDeviceGetTotalEccErrors=ecc,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1, NVML_VOLATILE_ECC=0,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: (0x04, 0x40)[gpu],
    )  # fmt: skip
    assert Driver(nvml).read() == {"gpu_ecc": 4.0, "gpu_slowed": 1.0, "gpu_xid": 2.0}


def test_the_command_tells_of_this_machine():
    result = CliRunner().invoke(cli, ["resilience", "health", "--seconds", "0", "--json"])
    found = {one["kind"]: one for one in json.loads(result.stdout)}
    assert {"disk", "clock"} <= set(found)
    assert found["disk"]["value"] > 0
