"""Character classes per text: letters, digits, spaces, controls, scripts without spaces."""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, kernel

COLUMNS = ("n_chars", "n_alpha_chars", "n_digits", "n_spaces", "n_nontext_chars", "n_hashes",
           "n_unspaced_chars")  # fmt: skip
"""Code points; letters; ASCII digits; ASCII white space; controls, private use and U+FFFD; ``#``;
letters of scripts that write no spaces between words."""

_FIELD_BITS = 10
_FIELD_MASK = (1 << _FIELD_BITS) - 1
_BLOCK_BYTES = _FIELD_MASK
_N_FIELDS = 6


def _packed_table() -> np.ndarray:
    """One number per byte that adds 1 to each of its classes' counters, ten bits per counter."""
    table = np.zeros(256, np.uint64)
    for byte in range(256):
        char = chr(byte)
        classes = (
            not 0x80 <= byte < 0xC0,  # a code point begins here
            byte < 128 and char.isalpha(),
            byte < 128 and char.isdigit(),
            byte in b" \t\n\r\f\v",
            (byte < 32 and byte not in b" \t\n\r\f\v") or byte == 127,
            char == "#",
        )
        for field, is_in in enumerate(classes):
            table[byte] |= np.uint64(int(is_in) << (field * _FIELD_BITS))
    return table


_PACKED = _packed_table()
_MASK = np.uint64(_FIELD_MASK)


@kernel
def code_point(data: Array, i: Int, end: Int) -> Int:
    """Decode the code point of two to four bytes that begins at ``i``."""
    lead = np.int64(data[i])
    if lead < 0xE0:
        n, value = 1, lead & 0x1F
    elif lead < 0xF0:
        n, value = 2, lead & 0x0F
    else:
        n, value = 3, lead & 0x07
    for k in range(1, n + 1):
        if i + k < end:
            value = (value << 6) | (np.int64(data[i + k]) & 0x3F)
    return value


@kernel
def is_unspaced(point: Int) -> bool:
    """Tell whether a code point belongs to a script without spaces between words.

    Thai, Lao, Burmese, Khmer; Kana and Han (Hangul is written with spaces).
    """
    if point < 0x3040:
        return (0x0E00 <= point < 0x0F00) or (0x1000 <= point < 0x10A0) or 0x1780 <= point < 0x1800
    return (point < 0xA000 and point >= 0x3040) or (0xF900 <= point < 0xFB00) or point >= 0x20000


@kernel
def wide_class(point: Int) -> Int:
    """Class of a code point above ASCII: 0 symbol or punctuation, 1 letter, 2 non-text."""
    if point < 0xC0:
        if point < 0xA0:
            return 2  # C1 controls
        return 1 if point == 0xAA or point == 0xB5 or point == 0xBA else 0
    if 0x2000 <= point < 0x2C00 or 0x3000 <= point < 0x3040:
        return 0  # general punctuation, arrows, mathematics, boxes; CJK punctuation
    if 0xE000 <= point < 0xF900 or point == 0xFFFD:
        return 2  # private use; what a failed decoding leaves behind
    if 0xFE00 <= point < 0xFE70 or 0xFF00 <= point < 0xFF21 or 0x1F000 <= point < 0x20000:
        return 0  # variation selectors, small and full-width punctuation, emoji
    return 1


@kernel
def _count_wide(data: Array, start: Int, end: Int, row: Array) -> None:
    for i in range(start, end):
        if data[i] >= 0xC0:
            point = code_point(data, i, end)
            kind = wide_class(point)
            if kind == 1:
                row[1] += 1
                if is_unspaced(point):
                    row[6] += 1
            elif kind == 2:
                row[4] += 1


@kernel
def _count(data: Array, offsets: Array, alive: Array, packed: Array) -> Array:
    n = len(offsets) - 1
    rows = np.zeros((n, 7), np.int64)
    for d in range(n):
        if not alive[d]:
            continue
        start, end = offsets[d], offsets[d + 1]
        row = rows[d]
        i = start
        while i < end:
            stop = min(end, i + _BLOCK_BYTES)  # no counter of the block can overflow
            total = np.uint64(0)
            for k in range(i, stop):
                total += packed[data[k]]
            for field in range(_N_FIELDS):
                row[field] += np.int64((total >> np.uint64(field * _FIELD_BITS)) & _MASK)
            i = stop
        if row[0] < end - start:
            _count_wide(data, start, end, row)
    return rows


def count_chars(texts: Texts, alive: np.ndarray) -> np.ndarray:
    """Count character classes.

    Args:
        texts: The batch.
        alive: bool per text; others get zeros.

    Returns:
        int64 [n_texts, len(COLUMNS)].
    """
    return _count(texts.data, texts.offsets, alive, _PACKED)
