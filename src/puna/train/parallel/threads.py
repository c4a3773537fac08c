"""The one rule for threads; imports no torch."""

from __future__ import annotations

from puna.core.pool import usable_cores


def threads_per_rank(n_ranks: int) -> int:
    """Threads of a rank: the usable cores of a machine divided among its ranks."""
    return max(1, usable_cores() // n_ranks)
