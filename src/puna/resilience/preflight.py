"""Before a training begins: is this machine sound, and do all ranks run the same thing?

What is tested here takes tens of milliseconds: known answers, patterns in memory, a file written
and read back, and a comparison of what each rank is about to run. A rank that starts with another
version, or a machine that computes wrongly, is noticed before it can do harm (of the 419 unexpected
interruptions of Llama 3, table 5, 268 came from GPUs).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import xxhash

import puna
from puna.core.errors import PunaError
from puna.core.fsio import hash_file, hash_json
from puna.core.units import format_bytes
from puna.core.version import VERSION
from puna.resilience.protocols import PreflightError
from puna.resilience.sdc.known import run_known

_TURN_S = 5.0
_MOST_SHOWN = 48
_MOST_RANKS_NAMED = 8


@dataclass(frozen=True)
class DiskTimes:
    """How fast a folder took a file and gave it back.

    Attributes:
        n_bytes: Size of the file.
        write_s: Writing it durably.
        read_s: Reading it, past the system's cache where it can be told so.
    """

    n_bytes: int
    write_s: float
    read_s: float


def check_answers(
    device: torch.device, seconds: float = 0.0, on_turn: Callable[[], None] = lambda: None
) -> None:
    """Compute what has known answers, and write patterns into memory.

    Args:
        device: Where.
        seconds: Repeat it for so long (burn-in); 0 does it once.
        on_turn: Called at least every few seconds.

    Raises:
        PreflightError: An answer was wrong.
    """
    end_s = time.monotonic() + seconds
    while True:
        failed = run_known(device, seconds=min(_TURN_S, max(0.0, end_s - time.monotonic())))
        if failed:
            raise PreflightError(f"known answers on {device} came out wrong: {', '.join(failed)}")
        on_turn()
        if time.monotonic() >= end_s:
            return


def check_disk(folder: Path, n_bytes: int, name: str) -> DiskTimes:
    """Write a file durably, read it back, compare the hashes and remove it.

    Args:
        folder: Must exist.
        n_bytes: Size of the file.
        name: Tells the files of several processes apart.

    Raises:
        PreflightError: What was read is not what was written.
        OSError: The folder does not take the file.
    """
    path = folder / f".preflight-{name}.tmp"
    content = xxhash.xxh3_64_digest(name.encode()) * (n_bytes // 8 + 1)
    content = content[:n_bytes]
    wanted = xxhash.xxh3_128_hexdigest(content)
    try:
        begin_s = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # else the cache would answer, and not the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written_s = time.perf_counter()
        found = hash_file(path)
        read_s = time.perf_counter() - written_s
    finally:
        path.unlink(missing_ok=True)
    if found != wanted:
        raise PreflightError(f"{folder}: a file of {format_bytes(n_bytes)} was read back changed")
    return DiskTimes(n_bytes, written_s - begin_s, read_s)


def find_shortage(folder: Path, n_bytes: int) -> str | None:
    """Say what is missing when a folder's disk has no room for so many bytes."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= n_bytes:
        return None
    return (
        f"{folder}: {format_bytes(free_bytes)} are free, and a checkpoint takes about "
        f"{format_bytes(n_bytes)}"
    )


def handshake(settings: Mapping[str, object]) -> dict[str, str]:
    """Say what this rank is about to run, in short strings.

    Args:
        settings: JSON values of what must be the same on all ranks, by name; of long ones the hash
            is taken.
    """
    return {
        "puna": VERSION,
        "puna's code": code_hash(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "byte order": sys.byteorder,
        **{name: _short(value) for name, value in settings.items()},
    }


@cache
def code_hash() -> str:
    """Hash of the source files of puna: a stale copy has the same version and another hash."""
    digest = xxhash.xxh3_64()
    root = Path(puna.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_handshakes(shown: Sequence[Mapping[str, str]]) -> None:
    """Compare what the ranks are about to run.

    Args:
        shown: Of each rank, see :func:`handshake`.

    Raises:
        PunaError: They differ; names what differs, and on which ranks.
    """
    differences = []
    for name in dict.fromkeys(name for one in shown for name in one):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(shown):
            ranks.setdefault(one.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            by_size = sorted(ranks.items(), key=lambda item: -len(item[1]))
            parts = (f"{value} on {_name_ranks(of)}" for value, of in by_size)
            differences.append(f"{name} is {', '.join(parts)}")
    if differences:
        raise PunaError(
            f"the ranks do not run the same: {'; '.join(differences)}",
            "bring the same code, packages and recipe to all nodes, then run the same command "
            "again",
        )


def _name_ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_MOST_RANKS_NAMED]))
    more = len(ranks) - _MOST_RANKS_NAMED
    return f"rank {named}" + (f" and {more} more" if more > 0 else "")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else hash_json(value)[:16]
