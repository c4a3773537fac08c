"""Words by Unicode's default word boundaries (UAX #29), compiled.

Only words that begin with a letter or a digit are of interest; rules that decide about others (runs
of spaces, flags) are left out. The boundaries are those of uniseg.
"""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from importlib.resources import files

import numpy as np

from puna.data.kernels.buffers import Array, Int, kernel
from puna.data.words.rules import N_CODES
from puna.data.words.split import Work

(
    OTHER, NEWLINE, EXTEND, ZWJ, KATAKANA, HEBREW, LETTER, SINGLE_QUOTE, DOUBLE_QUOTE, MID_NUM_LET,
    MID_LETTER, MID_NUM, NUMERIC, EXTEND_NUM_LET,
) = range(14)  # fmt: skip
CLASS = 15
PICTOGRAPH, ALNUM, UPPER, DIGIT, WORD, NOT_UPPER, NUMBER, ASCII_LETTER = (
    1 << bit for bit in range(4, 12)
)
"""Bits above the class: ``Extended_Pictographic``, ``str.isalnum``, ``str.isupper``,
``str.isdigit``, ``\\w``, a letter of lower or title case, ``str.isnumeric``, ``[A-Za-z]``."""
_CLASSES = {
    "CR": NEWLINE, "LF": NEWLINE, "Newline": NEWLINE, "Extend": EXTEND, "Format": EXTEND,
    "ZWJ": ZWJ, "Katakana": KATAKANA, "Hebrew_Letter": HEBREW, "ALetter": LETTER,
    "Single_Quote": SINGLE_QUOTE, "Double_Quote": DOUBLE_QUOTE, "MidNumLet": MID_NUM_LET,
    "MidLetter": MID_LETTER, "MidNum": MID_NUM, "Numeric": NUMERIC, "ExtendNumLet": EXTEND_NUM_LET,
    "Extended_Pictographic": PICTOGRAPH,
}  # fmt: skip
_C, _OTHER, _NEWLINE, _EXTEND, _ZWJ, _KATAKANA, _HEBREW, _LETTER = (
    CLASS, OTHER, NEWLINE, EXTEND, ZWJ, KATAKANA, HEBREW, LETTER,
)  # fmt: skip
_SINGLE, _DOUBLE, _MID_NUM_LET, _MID_LETTER, _MID_NUM, _NUMERIC, _CONNECTOR = (
    SINGLE_QUOTE, DOUBLE_QUOTE, MID_NUM_LET, MID_LETTER, MID_NUM, NUMERIC, EXTEND_NUM_LET,
)  # fmt: skip
_PICTOGRAPH, _ALNUM = PICTOGRAPH, ALNUM


@cache
def kinds() -> np.ndarray:
    """Return class and bits of each code point: uint16 [0x110000]."""
    table = np.zeros(N_CODES, np.uint16)
    facts = json.loads(files("puna.data.words").joinpath("breaks.json").read_text("utf-8"))
    for name, flat in facts["classes"].items():
        for first, last in zip(flat[::2], flat[1::2], strict=True):
            table[first : last + 1] |= _CLASSES[name]
    for code in range(N_CODES):
        char = chr(code)
        is_alnum = char.isalnum()
        bits = ALNUM * is_alnum | UPPER * char.isupper() | DIGIT * char.isdigit()
        bits |= WORD * (is_alnum or char == "_") | NUMBER * char.isnumeric()
        bits |= NOT_UPPER * (char.islower() or unicodedata.category(char) == "Lt")
        table[code] |= bits | ASCII_LETTER * (char.isascii() and char.isalpha())
    return table


@kernel
def _is_letter(c: Int) -> bool:
    return c in (_LETTER, _HEBREW)


@kernel
def _joins(before: Int, last: Int, c: Int, after: Int) -> bool:
    """Tell whether there is no boundary between ``last`` and ``c`` (WB5 to WB13b)."""
    if c == _CONNECTOR:
        return _is_letter(last) or last in (_NUMERIC, _KATAKANA, _CONNECTOR)
    if _is_letter(c):
        return (
            _is_letter(last) or last in (_NUMERIC, _CONNECTOR)
            or (_is_letter(before) and last in (_MID_LETTER, _MID_NUM_LET, _SINGLE))
            or (before == _HEBREW and last == _DOUBLE and c == _HEBREW)
        )  # fmt: skip
    if c == _NUMERIC:
        return _is_letter(last) or last in (_NUMERIC, _CONNECTOR) or (
            before == _NUMERIC and last in (_MID_NUM, _MID_NUM_LET, _SINGLE)
        )  # fmt: skip
    if _is_letter(last) and _is_letter(after) and c in (_MID_LETTER, _MID_NUM_LET, _SINGLE):
        return True
    return _joins_sign(last, c, after)


@kernel
def _joins_sign(last: Int, c: Int, after: Int) -> bool:
    """WB7a, 7b, 12, 13 and 13b."""
    if last == _HEBREW:
        return c == _SINGLE or (c == _DOUBLE and after == _HEBREW)
    if last == _NUMERIC:
        return after == _NUMERIC and c in (_MID_NUM, _MID_NUM_LET, _SINGLE)
    return c == _KATAKANA and last in (_KATAKANA, _CONNECTOR)


@kernel
def break_words(table: Array, work: Work, n_codes: Int) -> Int:
    """Write the words that begin with a letter or a digit to ``work.words``; return their number.

    Args:
        table: :func:`kinds`.
        work: With the decoded text.
        n_codes: Its code points.
    """
    codes, words = work.codes, work.words
    before = last = raw = _OTHER
    n, start = 0, 0
    for i in range(n_codes + 1):
        kind = table[codes[i]] if i < n_codes else table[10]
        c = kind & _C
        is_break = i == n_codes or raw == _NEWLINE or c == _NEWLINE
        skipped = c in (_EXTEND, _ZWJ)
        if not is_break and not (raw == _ZWJ and kind & _PICTOGRAPH) and not skipped:
            after = _OTHER
            if _SINGLE <= c <= _MID_NUM:
                k = i + 1
                while k < n_codes:
                    after = table[codes[k]] & _C
                    if after != _EXTEND and after != _ZWJ:
                        break
                    after = _OTHER
                    k += 1
            is_break = not _joins(before, last, c, after)
        if is_break:
            if start < i and table[codes[start]] & _ALNUM:
                words[n, 0], words[n, 1] = start, i
                n += 1
            start = i
        if not skipped:
            before, last = last, c
        raw = c
    return n
