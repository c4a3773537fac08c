"""Cutting text into pieces one by one: Llama 3's pattern as a scanner over UTF-8.

The functions are the alternatives of :data:`~puna.tokens.pretokens.LLAMA3_PATTERN`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from puna.data.kernels.buffers import Array, kernel
from puna.tokens.pretokens import MAX_CHARS, MAX_RUN_CHARS

OTHER, LETTER, NUMBER, SPACE, NEWLINE = 0, 1, 2, 3, 4
"""Character classes; letters, numbers and whitespace as in the pattern, newline is CR or LF."""
Word = Any
"""A machine integer inside a compiled kernel: its width matters there, to checkers it is opaque."""


@kernel
def char_at(data: Array, at: int, classes: Array) -> tuple[Word, Word, int]:
    """Return the code point at a byte, its class and its width in bytes (valid UTF-8 assumed)."""
    first = np.int64(data[at])
    if first < 0x80:
        return first, classes[first], 1
    if first < 0xE0:
        code, width = ((first & 0x1F) << 6) | (data[at + 1] & 0x3F), 2
    elif first < 0xF0:
        code = ((first & 0x0F) << 12) | ((data[at + 1] & 0x3F) << 6) | (data[at + 2] & 0x3F)
        width = 3
    else:
        code = ((first & 0x07) << 18) | ((data[at + 1] & 0x3F) << 12)
        code |= ((data[at + 2] & 0x3F) << 6) | (data[at + 3] & 0x3F)
        width = 4
    return code, classes[code] if code < len(classes) else np.uint8(OTHER), width


@kernel
def run_end(data: Array, at: int, end: int, classes: Array, kind: int, limit: int) -> int:
    """Return the end of a run of at most ``limit`` characters of one class."""
    while at < end and limit > 0:
        byte = data[at]
        if byte < 0x80:
            found, width = classes[byte], 1
        else:
            _, found, width = char_at(data, at, classes)
        if found != kind:
            break
        at += width
        limit -= 1
    return at


@kernel
def contraction(data: Array, at: int, end: int) -> int:
    """Return the length of 's 't 're 've 'm 'll 'd after the quote at ``at``, or 0."""
    if end - at < 2:
        return 0
    one = data[at + 1] | 0x20  # ASCII lower case
    if one == 0x73 or one == 0x74 or one == 0x6D or one == 0x64:
        return 2
    if end - at < 3:
        return 0
    if data[at + 1] == 0xC5 and data[at + 2] == 0xBF:  # long s folds to s
        return 3
    two = data[at + 2] | 0x20
    if (one == 0x72 or one == 0x76) and two == 0x65:
        return 3
    return 3 if one == 0x6C and two == 0x6C else 0


@kernel
def _space_end(data: Array, at: int, end: int, classes: Array) -> int:
    """Return where a piece of whitespace ends: the pattern's last three alternatives."""
    stop, last, after_newline = at, at, at
    while stop < end:
        _, kind, width = char_at(data, stop, classes)
        if kind < SPACE:
            break
        last = stop
        stop += width
        if kind == NEWLINE:
            after_newline = stop
    if after_newline > at:
        return after_newline
    return stop if stop == end or last == at else last


@kernel
def piece_end(data: Array, at: int, end: int, classes: Array) -> int:
    """Return where the piece that starts at ``at`` ends."""
    code, kind, width = char_at(data, at, classes)
    if code == 0x27:
        length = contraction(data, at, end)
        if length:
            return at + length
    if kind == LETTER:
        return run_end(data, at + width, end, classes, LETTER, end)
    if kind == NUMBER:
        return run_end(data, at + width, end, classes, NUMBER, 2)
    follower = np.int64(NEWLINE)
    if at + width < end:
        follower = np.int64(char_at(data, at + width, classes)[1])
    if follower == LETTER and kind != NEWLINE:
        return run_end(data, at + width, end, classes, LETTER, end)
    if kind == OTHER or (code == 0x20 and follower == OTHER):
        stop = run_end(data, at + width, end, classes, OTHER, end)
        return run_end(data, stop, end, classes, NEWLINE, end)
    return _space_end(data, at, end, classes)


@kernel
def part_end(data: Array, at: int, end: int, classes: Array, chars_left: int) -> tuple[int, int]:
    """Return where a part of a huge text ends (see ``split_huge``), and its block's rest."""
    run_chars, run_space = 0, False
    while at < end:
        if chars_left == 0:
            return at, MAX_CHARS
        code, kind, width = char_at(data, at, classes)
        space = kind >= SPACE or 0x1C <= code <= 0x1F  # as str.isspace
        if space == run_space and run_chars:
            run_chars += 1
            if run_chars > MAX_RUN_CHARS:
                return at, chars_left
        else:
            run_chars, run_space = 1, space
        chars_left -= 1
        at += width
    return end, chars_left
