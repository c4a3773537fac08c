"""Ledger, files, units, pool, registry, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from puna.core import progress
from puna.core.errors import PunaError, explain_environment_error
from puna.core.fsio import atomic_path, hash_json, write_json
from puna.core.ledger import Ledger, read_events
from puna.core.pool import WorkerPool
from puna.core.registry import Registry
from puna.core.units import format_bytes, format_count, format_duration, format_rate


def test_ledger_skips_a_torn_line_and_goes_on_after_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Ledger(path).bind(stage="a").emit("x", value=float("nan"))
    with path.open("a") as file:
        file.write('{"kind": "torn", "val')
    Ledger(path).emit("y")
    events = list(read_events(path))
    assert [event["kind"] for event in events] == ["x", "y"]
    assert events[0]["stage"] == "a"
    assert events[0]["value"] == "nan"
    assert list(read_events(tmp_path / "none")) == []


def _emit_many(path: str) -> int:
    ledger = Ledger(Path(path))
    for index in range(200):
        ledger.emit("n", index=index, filler="x" * 500)
    return 200


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with WorkerPool(2) as pool:
        assert sum(pool.map(_emit_many, [str(path)] * 3)) == 600
    assert len(list(read_events(path))) == 600


def test_atomic_write_keeps_the_old_file_on_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"v": 1})
    with pytest.raises(TypeError), atomic_path(path) as temporary:
        temporary.write_text(b"half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"v": float("nan")})
    assert json.loads(path.read_text()) == {"v": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@given(st.dictionaries(st.text(), st.integers()))
def test_hash_of_json_ignores_the_order_of_keys(value: dict[str, int]) -> None:
    assert hash_json(value) == hash_json(dict(reversed(value.items())))


def test_units() -> None:
    assert format_bytes(788_529_152) == "752 MiB"
    assert format_bytes(1000) == "1000 B"
    assert format_bytes(1023 * 1024) == "1023 KiB"
    assert format_count(1_234_567) == "1.23 M"
    assert format_count(12) == "12"
    assert format_rate(1234.5, "docs") == "1.23 kdocs/s"
    assert format_duration(3725.2) == "1 h 02 min"
    assert format_duration(75) == "1 min 15 s"
    assert format_duration(0.0123) == "12.3 ms"


def _square(n: int) -> int:
    time.sleep(0.02 * (n % 3))
    return n * n


def _fail(n: int) -> int:
    if n == 3:
        raise PunaError("three", "use four")
    return n


def _die(n: int) -> int:
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


@pytest.mark.parametrize("workers", [1, 2])
def test_map_keeps_the_order(workers: int) -> None:
    with WorkerPool(workers) as pool:
        assert list(pool.map(_square, range(10))) == [n * n for n in range(10)]


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_back_whole(workers: int) -> None:
    with pytest.raises(PunaError, match="three") as caught, WorkerPool(workers) as pool:
        list(pool.map(_fail, range(10)))
    assert caught.value.fix == "use four"


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(PunaError, match="was killed"), WorkerPool(2) as pool:
        list(pool.map(_die, range(10)))


def _write_pid_and_sleep(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from puna.core.pool import WorkerPool
        sys.path.insert(0, sys.argv[2])
        from test_core_parts import _write_pid_and_sleep
        if __name__ == "__main__":
            with WorkerPool(2) as pool:
                list(pool.map(_write_pid_and_sleep, [sys.argv[1]] * 2))
        """)
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(pids), str(Path(__file__).parent)])
    deadline_s = time.monotonic() + 60
    while len(os.listdir(pids)) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    workers = [int(name) for name in os.listdir(pids)]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_registry_proposes_the_nearest_name() -> None:
    registry: Registry[int] = Registry("thing")
    registry.register("apple", 1)
    assert registry.get("apple") == 1
    assert "apple" in registry
    with pytest.raises(PunaError, match="did you mean 'apple'"):
        registry.get("aple")
    with pytest.raises(ValueError, match="twice"):
        registry.register("apple", 2)


def test_a_full_disk_is_recognised_inside_other_errors() -> None:
    try:
        try:
            raise OSError(28, "No space left on device", "x.bin")
        except OSError as error:
            raise RuntimeError("write failed") from error
    except RuntimeError as error:
        explained = explain_environment_error(error)
    assert explained is not None
    assert "x.bin: the disk is full" in str(explained)
    wrapped = explain_environment_error(RuntimeError("IO Error: No space left on device"))
    assert wrapped is not None
    assert "disk is full" in str(wrapped)
    assert explain_environment_error(ValueError("a bug")) is None


def test_a_message_may_hold_brackets(capsys, monkeypatch):
    """gloo's errors begin with a path in brackets, which rich would take for a tag."""
    monkeypatch.setattr(progress, "console", Console(stderr=True, highlight=False))
    progress.say(("  fault", "yellow"), ": rank 1: [/a/pair.cc:53] Connection closed [bold]")
    assert capsys.readouterr().err == "  fault: rank 1: [/a/pair.cc:53] Connection closed [bold]\n"
