"""What a classifier sees of a text: one line of tokens, the same in training and in use.

Scheme ``words`` (ours): words in lower case, every run of digits becomes ``0``, every run of one
punctuation mark becomes a token of at most three of them, line ends and paragraph ends are tokens.
So the layout of tables, menus and logs is visible, and no token of a document can be mistaken for
a label. Scheme ``plain``: line ends become spaces and nothing else changes, as DCLM and datatrove
feed fastText; for models that were trained so.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, fixed, kernel

Preparation = Literal["words", "plain"]

_SPACE, _NEWLINE, _DIGIT, _LETTER, _MARK = 0, 1, 2, 3, 4
_LINE_END = 0x1F
"""One of these is a line end, two are the end of a paragraph; no byte up to 0x20 is ever copied."""
_MAX_RUN = 3


def _class_table() -> np.ndarray:
    table = np.zeros(256, np.uint8)
    for byte in range(33, 256):
        char = chr(byte)
        if byte == 127:
            continue
        if byte >= 128 or char.isalpha():
            table[byte] = _LETTER
        else:
            table[byte] = _DIGIT if char.isdigit() else _MARK
    table[10] = _NEWLINE
    return table


_CLASSES = _class_table()


@kernel
def head_end(data: Array, start: Int, end: Int, max_bytes: Int) -> Int:
    """Return where the looked-at part of a text ends, never inside a code point."""
    if end - start <= max_bytes:
        return end
    end = start + max_bytes
    while end > start and data[end] & 0xC0 == 0x80:
        end -= 1
    return end


@kernel
def _end_token(out: Array, first: Int, at: Int) -> Int:
    """Write a space unless one is there or nothing is; return where the next byte goes."""
    if at > first and out[at - 1] != 32:
        out[at] = 32
        at += 1
    return at


@kernel
def _words_of(data: Array, start: Int, end: Int, classes: Array, out: Array, at: Int) -> Int:
    """Write the tokens of one text to ``out`` from ``at``, parted by spaces; return the end."""
    i, first = start, at
    while i < end:
        kind, byte = classes[data[i]], data[i]
        if kind == _LETTER:
            out[at] = byte | 0x20 if 65 <= byte <= 90 else byte
            at += 1
            i += 1
            continue
        run = i
        if kind == _DIGIT:
            while i < end and classes[data[i]] == _DIGIT:
                i += 1
            out[at] = 48
            at += 1
            continue
        at = _end_token(out, first, at)
        if kind == _MARK:
            while i < end and data[i] == byte:
                i += 1
            n = min(i - run, _MAX_RUN)
        else:
            n = 0
            while i < end and classes[data[i]] <= _NEWLINE:
                n += classes[data[i]]
                i += 1
            n, byte = min(n, 2), np.uint8(_LINE_END)
        out[at : at + n] = byte
        at = _end_token(out, first, at + n)
    return at


@kernel
def _plain_of(data: Array, start: Int, end: Int, out: Array, at: Int) -> Int:
    for i in range(start, end):
        out[at] = 32 if data[i] == 10 or data[i] == 13 else data[i]
        at += 1
    return at


@kernel
def _prepare(
    data: Array, offsets: Array, classes: Array, max_bytes: Int, words: bool, out: Array
) -> Array:
    n = len(offsets) - 1
    ends = np.zeros(n + 1, np.int64)
    at = 0
    for d in range(n):
        end = head_end(data, offsets[d], offsets[d + 1], max_bytes)
        if words:
            at = _words_of(data, offsets[d], end, classes, out, at)
        else:
            at = _plain_of(data, offsets[d], end, out, at)
        ends[d + 1] = at
    return ends


def prepare(texts: Texts, preparation: Preparation, max_bytes: int) -> Texts:
    """Turn texts into lines of tokens.

    Args:
        texts: The batch.
        preparation: The scheme.
        max_bytes: Only the first bytes of each text are looked at.
    """
    n_bytes = int(texts.offsets[-1] - texts.offsets[0])
    out = np.empty(2 * n_bytes + 2, np.uint8)
    ends = _prepare(texts.data, texts.offsets, _CLASSES, max_bytes, preparation == "words", out)
    return Texts(fixed(out[: ends[-1]]), fixed(ends))
