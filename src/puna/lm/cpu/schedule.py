"""How threads share the pieces of a stage.

A stage is cut into pieces. A thread takes the next piece until there are none left, then waits
until all of them are done, spinning. Nobody waits for a thread that has taken nothing: a thread
that the operating system lets run late, or never, costs its help and no more. Which thread computes
a piece changes no bit, because no sum crosses pieces.
"""

from __future__ import annotations

from numba import types

from puna.data.kernels.buffers import Int, kernel
from puna.lm.cpu.intrinsics import atomic_add, atomic_load, pause
from puna.lm.cpu.structures import DONE, NEXT, PROGRESS_COLUMNS

_NEXT_BYTES, _DONE_BYTES, _STAGE_BYTES = 8 * NEXT, 8 * DONE, 8 * PROGRESS_COLUMNS
_SPINS_BEFORE_YIELD = 2000
_PIECES_PER_THREAD = 8
_LARGEST_PIECE_BYTES = 256 << 10
_yield_processor = types.ExternalFunction("sched_yield", types.int32())


@kernel
def take(progress: Int, stage: Int, n_pieces: Int) -> Int:
    """Return the number of the next piece of a stage, or ``n_pieces`` when all are taken."""
    place = progress + stage * _STAGE_BYTES + _NEXT_BYTES
    if atomic_load(place) >= n_pieces:
        return n_pieces
    return min(atomic_add(place, 1), n_pieces)


@kernel
def finish(progress: Int, stage: Int) -> None:
    """Count a piece as done; others then see what was written."""
    atomic_add(progress + stage * _STAGE_BYTES + _DONE_BYTES, 1)


@kernel
def wait(progress: Int, stage: Int, n_pieces: Int) -> None:
    """Wait until all pieces of a stage are done.

    A thread that spins for long gives its processor away: the one it waits for may need it.
    """
    place = progress + stage * _STAGE_BYTES + _DONE_BYTES
    spins = 0
    while atomic_load(place) < n_pieces:
        spins += 1
        if spins < _SPINS_BEFORE_YIELD:
            pause()
        else:
            _yield_processor()


@kernel
def rows_per_piece(n_rows: Int, row_bytes: Int, n_threads: Int) -> Int:
    """Return how many rows of a matrix are a piece.

    Few enough for the threads to finish together and for the second-level cache; an even number,
    for whole tiles.
    """
    pieces = n_threads * _PIECES_PER_THREAD
    rows = min((n_rows + pieces - 1) // pieces, max(1, _LARGEST_PIECE_BYTES // row_bytes))
    return rows + rows % 2
