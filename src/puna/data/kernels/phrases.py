"""Many phrases at once: an Aho-Corasick automaton over the bytes, letter case ignored (ASCII).

Finds the blocks of a text (runs of lines with letters or digits) in which a phrase occurs, which
is how licence boilerplate and the marks of generated files are measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, fixed, kernel

COLUMNS = ("n_block_bytes", "n_marked_bytes", "first_match")
"""Bytes in blocks; bytes in blocks with a phrase; byte offset of the first match's end, or -1."""


_WORD, _NEWLINE, _CLASS = 1 << 8, 1 << 9, 0xFF
_FINAL = np.uint32(1 << 31)


@dataclass(frozen=True)
class Automaton:
    """The compiled phrases.

    Attributes:
        classes: uint16 [256]; the low 8 bits of an entry are the byte's column of ``moves`` (bytes
            in no phrase share column 0), bit 8 marks bytes of words, bit 9 the newline.
        moves: uint32, flat table of states times columns; an entry is where the row of the next
            state begins, with the highest bit set if a phrase ends there.
    """

    classes: np.ndarray
    moves: np.ndarray


@lru_cache(maxsize=32)
def compile_phrases(phrases: tuple[str, ...]) -> Automaton:
    """Build the automaton of some phrases (Aho and Corasick 1975).

    Raises:
        ValueError: No phrase, an empty phrase, or more than 65,535 bytes of phrases.
    """
    patterns = [phrase.lower().encode() for phrase in phrases]
    if not patterns or not all(patterns) or sum(map(len, patterns)) > 65_535:
        raise ValueError("give at least one phrase, none empty, at most 65,535 bytes in all")
    alphabet = sorted({byte for pattern in patterns for byte in pattern})
    classes = np.zeros(256, np.uint16)
    for column, byte in enumerate(alphabet, start=1):
        classes[byte] = column
    for byte in range(ord("A"), ord("Z") + 1):
        classes[byte] = classes[byte + 32]
    children: list[dict[int, int]] = [{}]
    final = [False]
    for pattern in patterns:
        state = 0
        for byte in pattern:
            column = int(classes[byte])
            if column not in children[state]:
                children[state][column] = len(children)
                children.append({})
                final.append(False)
            state = children[state][column]
        final[state] = True
    for byte in range(256):
        is_word = byte >= 0x80 or chr(byte).isalnum()
        classes[byte] |= _WORD * is_word + _NEWLINE * (byte == ord("\n"))
    n_classes = len(alphabet) + 1
    moves = _moves(children, final, n_classes)
    flat = moves * np.uint32(n_classes) | np.where(np.array(final)[moves], _FINAL, np.uint32(0))
    return Automaton(fixed(classes), fixed(flat.astype(np.uint32).ravel()))


def _moves(children: Sequence[dict[int, int]], final: list[bool], n_classes: int) -> np.ndarray:
    """Complete the trie to a table without failure links; marks suffixes that end a phrase."""
    moves = np.zeros((len(children), n_classes), np.uint32)
    fail = [0] * len(children)
    queue = deque(children[0].values())
    for column, state in children[0].items():
        moves[0, column] = state
    while queue:
        state = queue.popleft()
        final[state] = final[state] or final[fail[state]]
        moves[state] = moves[fail[state]]
        for column, child in children[state].items():
            fail[child] = int(moves[fail[state], column])
            moves[state, column] = child
            queue.append(child)
    return moves


@kernel
def _end_block(n_bytes: Int, marked: bool, row: Array) -> None:
    row[0] += n_bytes
    if marked:
        row[1] += n_bytes


@kernel
def _scan(
    data: Array, offsets: Array, alive: Array, classes: Array, moves: Array, head: Int
) -> Array:
    n = len(offsets) - 1
    rows = np.zeros((n, 3), np.int64)
    for d in range(n):
        row = rows[d]
        row[2] = -1
        if not alive[d]:
            continue
        start, end = offsets[d], offsets[d + 1]
        if head > 0:
            end = min(end, start + head)
        state, block_bytes, marked = np.uint32(0), 0, False
        line_start, seen = start, 0
        for i in range(start, end):
            info = classes[data[i]]
            state = moves[np.int64(state) + (info & _CLASS)]
            seen |= info
            if state & _FINAL:
                state ^= _FINAL
                marked = True
                if row[2] < 0:
                    row[2] = i + 1 - start
            if info & _NEWLINE:
                if seen & _WORD:
                    block_bytes += i + 1 - line_start
                else:
                    _end_block(block_bytes, marked, row)
                    block_bytes, marked = 0, False
                line_start, seen = i + 1, 0
        if seen & _WORD:
            block_bytes += end - line_start
        _end_block(block_bytes, marked, row)
    return rows


def scan_phrases(
    texts: Texts, alive: np.ndarray, phrases: tuple[str, ...], head_bytes: int = 0
) -> np.ndarray:
    """Look for phrases.

    Args:
        texts: The batch.
        alive: bool per text; others get zeros.
        phrases: What to look for, letter case ignored.
        head_bytes: Look only at the first bytes of each text; 0 looks at all.

    Returns:
        int64 [n_texts, len(COLUMNS)].
    """
    machine = compile_phrases(phrases)
    return _scan(texts.data, texts.offsets, alive, machine.classes, machine.moves, head_bytes)
