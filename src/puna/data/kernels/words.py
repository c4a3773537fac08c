"""Words and lines per text: lengths, bullets, ellipses, stop words, data-like words.

A word is a maximal run of bytes above 0x20, a line ends at a newline.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, kernel
from puna.data.kernels.chars import code_point, wide_class
from puna.data.words.columns import STOP_WORDS

WORD_COLUMNS = ("n_words", "n_word_chars", "n_alpha_words", "max_word_chars", "n_data_bytes",
                "n_ellipses", "n_stop_words")  # fmt: skip
"""Words; their code points; words with a letter; longest word; bytes in data-like words; ``...``
and ``…``; how many of :data:`STOP_WORDS` occur."""

LINE_COLUMNS = ("n_all_lines", "n_lines", "n_line_chars", "max_line_chars", "n_bullet_lines",
                "n_ellipsis_lines")  # fmt: skip
"""Lines; lines that are not blank; code points in lines; longest line; lines that begin with a
bullet; lines that end with an ellipsis."""

ENCODED_WORD_BYTES = 64
"""A run of this many base64 characters is data, not a word (after StarCoder2's filter)."""

_LETTER, _DIGIT, _DOT, _WIDE, _NOT_BASE64, _NOT_LITERAL = 1, 2, 4, 8, 16, 32


def _flag_table() -> np.ndarray:
    table = np.zeros(256, np.uint8)
    base64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=_-"
    literal = b"0123456789abcdefABCDEFxXuUL+-.,:;()[]{}\\'\"#$%/"
    for byte in range(256):
        flags = 0
        if byte < 128 and chr(byte).isalpha():
            flags |= _LETTER
        if byte >= 0xC2:
            flags |= _WIDE
        if chr(byte).isdigit() and byte < 128:
            flags |= _DIGIT
        if byte == ord("."):
            flags |= _DOT
        if byte not in base64:
            flags |= _NOT_BASE64
        if byte not in literal:
            flags |= _NOT_LITERAL
        table[byte] = flags
    return table


_FLAGS = _flag_table()
STOP_KEYS = np.array([int.from_bytes(word.encode(), "big") for word in STOP_WORDS], np.uint64)
"""A stop word's bytes as one number."""


@kernel
def _ellipses(data: Array, start: Int, end: Int) -> Int:
    """Count ``...`` (not overlapping) and ``…`` in a word."""
    n, i = 0, start
    while i + 2 < end:
        dots = data[i] == 46 and data[i + 1] == 46 and data[i + 2] == 46
        if dots or (data[i] == 0xE2 and data[i + 1] == 0x80 and data[i + 2] == 0xA6):
            n += 1
            i += 3
        else:
            i += 1
    return n


@kernel
def _has_wide_letter(data: Array, start: Int, end: Int) -> bool:
    for i in range(start, end):
        if data[i] >= 0xC2 and wide_class(code_point(data, i, end)) == 1:
            return True
    return False


@kernel
def _is_data(flags: Int, n_bytes: Int) -> bool:
    """Tell whether a word is a number, a hex literal or a long run of base64."""
    if flags & _NOT_LITERAL == 0 and flags & _DIGIT:
        return True
    return n_bytes >= ENCODED_WORD_BYTES and flags & _NOT_BASE64 == 0


@kernel
def _stop_word(data: Array, start: Int, end: Int, keys: Array) -> Int:
    key = np.uint64(0)
    for i in range(start, end):
        key = (key << np.uint64(8)) | np.uint64(data[i] | 0x20)
    for k in range(len(keys)):
        if keys[k] == key:
            return 1 << k
    return 0


@kernel
def _end_word(data: Array, start: Int, end: Int, flags: Int, row: Array) -> None:
    n_chars = end - start
    if flags & _WIDE:
        for i in range(start, end):
            n_chars -= (data[i] & 0xC0) == 0x80
    row[0] += 1
    row[1] += n_chars
    if flags & _LETTER or (flags & _WIDE and _has_wide_letter(data, start, end)):
        row[2] += 1
    row[3] = max(row[3], n_chars)
    if _is_data(flags, end - start):
        row[4] += end - start
    if flags & (_DOT | _WIDE) and end - start > 2:
        row[5] += _ellipses(data, start, end)


@kernel
def _bits(mask: Int) -> Int:
    n = 0
    while mask:
        n += mask & 1
        mask >>= 1
    return n


@kernel
def _count_words(
    data: Array, offsets: Array, alive: Array, table: Array, stop_keys: Array
) -> Array:
    n = len(offsets) - 1
    rows = np.zeros((n, 7), np.int64)
    for d in range(n):
        if not alive[d]:
            continue
        i, end = offsets[d], offsets[d + 1]
        row = rows[d]
        stops = 0
        while i < end:
            if data[i] <= 32:
                i += 1
                continue
            start, flags = i, np.uint8(0)
            while i < end and data[i] > 32:
                flags |= table[data[i]]
                i += 1
            if i - start <= 4:
                stops |= _stop_word(data, start, i, stop_keys)
            _end_word(data, start, i, flags, row)
        row[6] = _bits(stops)
    return rows


@kernel
def _is_bullet(data: Array, i: Int, end: Int) -> bool:
    """Tell whether a line whose first visible byte is ``i`` begins with ``-``, ``*`` or ``•``."""
    if data[i] == 45 or data[i] == 42:
        return True
    return i + 2 < end and data[i] == 0xE2 and data[i + 1] == 0x80 and data[i + 2] == 0xA2


@kernel
def _ends_in_ellipsis(data: Array, start: Int, last: Int) -> bool:
    """Tell whether a line whose last visible byte is ``last`` ends with ``...`` or ``…``."""
    if last - start < 2:
        return False
    a, b, c = data[last - 2], data[last - 1], data[last]
    return (a == 46 and b == 46 and c == 46) or (a == 0xE2 and b == 0x80 and c == 0xA6)


@kernel
def _end_line(data: Array, start: Int, end: Int, n_chars: Int, row: Array) -> None:
    row[0] += 1
    row[2] += n_chars
    row[3] = max(row[3], n_chars)
    first, last = start, end - 1
    while first <= last and data[first] <= 32:
        first += 1
    if first > last:
        return
    while data[last] <= 32:
        last -= 1
    row[1] += 1
    row[4] += _is_bullet(data, first, end)
    row[5] += _ends_in_ellipsis(data, first, last)


@kernel
def _count_lines(data: Array, offsets: Array, alive: Array) -> Array:
    n = len(offsets) - 1
    rows = np.zeros((n, 6), np.int64)
    for d in range(n):
        if not alive[d]:
            continue
        start, end = offsets[d], offsets[d + 1]
        row = rows[d]
        while start < end:
            i = start
            n_chars = 0
            while i < end and data[i] != 10:
                n_chars += (data[i] & 0xC0) != 0x80
                i += 1
            _end_line(data, start, i, n_chars, row)
            start = i + 1
    return rows


def count_words(texts: Texts, alive: np.ndarray) -> np.ndarray:
    """Count words and their kinds: int64 [n_texts, len(WORD_COLUMNS)]; zeros where not alive."""
    return _count_words(texts.data, texts.offsets, alive, _FLAGS, STOP_KEYS)


def count_lines(texts: Texts, alive: np.ndarray) -> np.ndarray:
    """Count lines and their kinds: int64 [n_texts, len(LINE_COLUMNS)]; zeros where not alive."""
    return _count_lines(texts.data, texts.offsets, alive)
