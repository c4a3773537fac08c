"""Killed processes: the ingest is continued with the same bytes; a dead worker is named."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.ingest import IngestConfig, ingest_documents
from puna.data.sources.files import FilesConfig

pytestmark = pytest.mark.distributed

CHILD = """
import os, signal, sys
from pathlib import Path
import puna.data.ingest_publish, puna.data.ingest_unit
from puna.core.ledger import Ledger
from puna.data.ingest import IngestConfig, ingest_documents
from puna.data.sources.files import FilesConfig

module, name, before, after = sys.argv[1:5]
calls = 0
original = getattr(sys.modules[module], name)

def dying(*arguments):
    global calls
    calls += 1
    if calls == int(before):
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments)
    if calls == int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(sys.modules[module], name, dying)
source = FilesConfig(name="x", paths=(sys.argv[5],))
cfg = IngestConfig(sources=(source,), shard_bytes=400, workers=1)
ingest_documents(cfg, {}, Path(sys.argv[6]), Ledger(None))
"""


def make_corpus(folder: Path) -> None:
    folder.mkdir()
    for n in range(12):
        lines = [json.dumps({"text": f"file {n} line {i}"}) for i in range(12)]
        lines[n] = "damaged"
        (folder / f"{n:02d}.jsonl").write_text("\n".join(lines))


def ingest(folder: Path, out: Path, n_workers: int) -> dict:
    source = FilesConfig(name="x", paths=(f"{folder}/*.jsonl",))
    cfg = IngestConfig(sources=(source,), shard_bytes=400, workers=n_workers)
    return ingest_documents(cfg, {}, out, Ledger(None))


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("function", "before", "after", "resumed", "n_workers"),
    [
        ("puna.data.ingest_unit.write_json", 0, 5, 5, 2),  # just after a unit
        ("puna.data.ingest_unit.write_json", 5, 0, 4, 1),  # shard written, its state not
        ("puna.data.ingest_unit.write_documents", 3, 0, 2, 1),  # before a shard
        ("puna.data.ingest_publish._publish_part", 0, 4, 8, 2),  # some shards have their names
        ("puna.data.ingest_publish._check_conservation", 1, 0, 0, 1),  # all have
    ],
)
def test_a_killed_ingest_ends_with_the_same_bytes(
    tmp_path, function, before, after, resumed, n_workers
):
    make_corpus(tmp_path / "in")
    reference, out = tmp_path / "reference", tmp_path / "out"
    reference.mkdir()
    out.mkdir()
    ingest(tmp_path / "in", reference, 1)
    module, _, name = function.rpartition(".")
    arguments = [module, name, str(before), str(after), f"{tmp_path}/in/*.jsonl", str(out)]
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    metrics = ingest(tmp_path / "in", out, n_workers)
    assert metrics["units"] == 12
    assert metrics["units_resumed"] == resumed
    assert content(out) == content(reference)


def test_a_killed_worker_is_a_clear_error(tmp_path):
    make_corpus(tmp_path / "in")
    (tmp_path / "out").mkdir()
    caught: list[BaseException] = []

    def work() -> None:
        try:
            ingest(tmp_path / "in", tmp_path / "out", 2)
        except PunaError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() and not multiprocessing.active_children():
        thread.join(0.05)
    for process in multiprocessing.active_children()[:1]:  # it is still starting
        process.kill()
    thread.join(60)
    assert not thread.is_alive()
    (error,) = caught
    assert "a worker process was killed" in str(error)
    assert "workers" in str(error)
