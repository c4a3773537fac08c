"""The rules for threads and for memory that a step frees; imports no torch."""

from __future__ import annotations

import ctypes

from puna.core.pool import usable_cores

LARGE_BYTES = 1 << 27
"""Pieces of this size and more are the system's again once they are freed."""


def is_large(n_floats: int) -> bool:
    """Tell whether so many float32 are a piece of at least :data:`LARGE_BYTES`."""
    return 4 * n_floats >= LARGE_BYTES


def threads_per_rank(n_ranks: int) -> int:
    """Threads of a rank: the usable cores of a machine divided among its ranks."""
    return max(1, usable_cores() // n_ranks)


def thread_env(n_ranks: int) -> dict[str, str]:
    """Environment of a rank, to be set before torch is loaded.

    Waiting threads sleep instead of spinning. Spinning saves microseconds on an idle machine, but
    when anything else runs, the threads take the cores from each other: on 2 busy cores a step took
    up to 8 times as long as with ``PASSIVE``.

    Memory that a step has freed stays with the process (glibc): the next step takes the same again.
    Given back and asked for anew, every page of it is a fault, in all 8 % of a step's time. Pieces
    of 128 MiB and more are given back all the same: keeping them cost 0.4 GiB of peak memory with a
    vocabulary of 128,256. See :func:`give_back_memory`, too.
    """
    kept = {"MALLOC_MMAP_THRESHOLD_": LARGE_BYTES, "MALLOC_TRIM_THRESHOLD_": 1 << 40}
    return {
        "OMP_NUM_THREADS": str(threads_per_rank(n_ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",
        **{name: str(value) for name, value in (kept | {"MALLOC_TOP_PAD_": 1 << 26}).items()},
    }


def give_back_memory() -> None:
    """Return to the system what this process has freed and glibc keeps; nothing elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
