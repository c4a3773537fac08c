"""Faults that change a process for good: each is tried in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import socket, sys
from pathlib import Path
from puna.core.ledger import Ledger
from puna.resilience.faults import FaultInjector, PlannedFault

def hit(what):
    injector = FaultInjector(PlannedFault(0, 2, what), 0, "j", Ledger(None, job="j"))
    assert injector.take(1) is None
    injector.strike(injector.take(2))
    return injector
"""
FULL = """
injector, path = hit("full-disk"), Path(sys.argv[1]) / "file"
for step in range(3, 7):
    injector.take(step)
    try:
        path.write_bytes(bytes(1 << 17))
        print(step, "written")
    except OSError:
        print(step, "too large")
    path.write_bytes(bytes(1 << 10))
"""
MEMORY = """
try:
    hit("memory")
except MemoryError:
    print("no more")
"""
CUT = """
server = socket.create_server(("127.0.0.1", 0))
ours = socket.create_connection(server.getsockname())
theirs, _ = server.accept()
ours.sendall(b"a")
print(theirs.recv(1))
hit("cut")
print(theirs.recv(1), ours.recv(1))
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (FULL, "3 too large\n4 too large\n5 too large\n6 written\n"),
        (MEMORY, "no more\n"),
        (CUT, "b'a'\nb'' b''\n"),
    ],
    ids=["full disk", "memory", "cut"],
)
def test_what_a_fault_does_to_a_process(tmp_path: Path, script: str, said: str):
    command = [sys.executable, "-c", HEAD + script, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == said
