"""Cutting prefixes, suffixes and infixes off a chunk without white space, as spaCy does.

A chunk is given as its code points and the offset of each in the text. Positions are code points.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import MIX, Array, Int, kernel
from puna.data.words.rules import (
    AFTER_INNER_DOT,
    ALPHA,
    BASE,
    BEFORE_DOT,
    BEFORE_INNER_DOT,
    CURRENCY,
    ICON,
    LOWER,
    MAX_SPECIAL_CHARS,
    MAX_UNIT_CHARS,
    PREFIX,
    SUFFIX,
    UPPER,
)

_ALPHA, _INNER_LEFT, _INNER_RIGHT, _UPPER = ALPHA, BEFORE_INNER_DOT, AFTER_INNER_DOT, UPPER
_BEFORE_DOT, _ICON, _PREFIX, _SUFFIX, _CURRENCY = BEFORE_DOT, ICON, PREFIX, SUFFIX, CURRENCY
_LOWER, _BASE, _MAX_UNIT, _MAX_SPECIAL, _MIX = (
    LOWER, BASE, MAX_UNIT_CHARS, MAX_SPECIAL_CHARS, MIX
)  # fmt: skip
_DOT, _PLUS, _MINUS, _DOLLAR, _QUOTE = ord("."), ord("+"), ord("-"), ord("$"), ord("'")
_DEGREE, _CURLY, _ELLIPSIS, _EN_DASH, _EM_DASH = 0xB0, 0x2019, 0x2026, 0x2013, 0x2014
_TILDE, _COMMA, _SLASH, _COLON = ord("~"), ord(","), ord("/"), ord(":")
_STAR, _CARET = ord("*"), ord("^")


@kernel
def look_up(keys: Array, values: Array, key: Int) -> Int:
    """Return the value of a key in a table of :class:`Rules`, or -1."""
    mask = np.uint64(len(keys) - 1)
    slot = (key ^ (key >> np.uint64(29))) & mask
    while keys[slot] != 0:
        if keys[slot] == key:
            return values[slot]
        slot = (slot + np.uint64(1)) & mask
    return -1


@kernel
def part_hash(sums: Array, inverses: Array, first: Int, last: Int) -> Int:
    """Return the hash of the bytes ``first`` to ``last`` of a text, from its running sums."""
    return (sums[last] - sums[first]) * inverses[first]


@kernel
def _is_digit(code: Int) -> bool:
    return 48 <= code <= 57


@kernel
def prefix_length(classes: Array, codes: Array, s: Int, e: Int) -> Int:
    """Return how many code points of a chunk's beginning are a prefix."""
    code = codes[s]
    if classes[code] & _PREFIX:
        return 1
    if code == _DOT:
        n = 1
        while s + n < e and codes[s + n] == _DOT:
            n += 1
        return n if n > 1 else 0
    if code == _PLUS:
        return 0 if s + 1 < e and _is_digit(codes[s + 1]) else 1
    if code == 85:  # U
        dollar = s + 2 < e and codes[s + 1] == 83 and codes[s + 2] == _DOLLAR
        return 3 if dollar else 0
    if code == 65 or code == 67:  # A, C
        return 2 if s + 1 < e and codes[s + 1] == _DOLLAR else 0
    return 0


@kernel
def _dot_is_suffix(classes: Array, codes: Array, e: Int, n: Int) -> bool:
    """Tell whether the full stop at the end of ``n`` code points is cut off."""
    before = codes[e - 2]
    if classes[before] & _BEFORE_DOT:
        return True
    if n < 3:
        return False
    first = codes[e - 3]
    if classes[before] & _UPPER and classes[first] & _UPPER:
        return True
    before |= 32  # lower case
    return first == _DEGREE and (before == 102 or before == 99 or before == 107)


@kernel
def _dollars(codes: Array, e: Int, n: Int) -> Int:
    """Return the length of ``A$``, ``C$`` or ``US$`` after a digit at the end, else 0."""
    before = codes[e - 2]
    if n > 2 and (before == 65 or before == 67) and _is_digit(codes[e - 3]):
        return 2
    if n > 3 and before == 83 and codes[e - 3] == 85 and _is_digit(codes[e - 4]):
        return 3
    return 0


@kernel
def _unit(
    units: Array, ones: Array, codes: Array, at: Array, s: Int, e: Int, sums: Array, inverses: Array
) -> Int:
    """Return the length of a unit of measurement after a digit at the end, or 0."""
    for k in range(min(_MAX_UNIT, e - s - 1), 0, -1):
        if _is_digit(codes[e - k - 1]):
            key = part_hash(sums, inverses, at[e - k], at[e])
            if look_up(units, ones, key) >= 0:
                return k
    return 0


@kernel
def suffix_length(
    classes: Array, units: Array, ones: Array, codes: Array, at: Array, s: Int, e: Int,
    sums: Array, inverses: Array,
) -> Int:  # fmt: skip
    """Return how many code points of a chunk's end are a suffix: the longest that there is."""
    n = e - s
    if n <= 0:
        return 0
    code = codes[e - 1]
    longest = 1 if classes[code] & _SUFFIX else 0
    if n == 1:
        return longest
    before = codes[e - 2]
    if code == _DOT:
        while longest < n and codes[e - longest - 1] == _DOT:
            longest += 1
        if longest > 1:
            return longest
        return 1 if _dot_is_suffix(classes, codes, e, n) else 0
    if code == before and code == _ELLIPSIS:
        return 2
    if (code | 32) == 115 and (before == _QUOTE or before == _CURLY):  # noqa: SIM109
        return 2
    if _is_digit(before) and (code == _PLUS or classes[code] & _CURRENCY):
        longest = 1
    if code == _DOLLAR:
        longest = max(longest, _dollars(codes, e, n))
    return max(longest, _unit(units, ones, codes, at, s, e, sums, inverses))


@kernel
def _hyphens(classes: Array, codes: Array, i: Int, e: Int) -> Int:
    """Return the length of the hyphens at ``i`` when a letter follows, else 0."""
    code = codes[i]
    most = 3 if code == _MINUS else 2 if code == _EM_DASH else 1
    for k in range(1, most + 1):
        if i + k >= e:
            return 0
        if classes[codes[i + k]] & _ALPHA:
            return k
        if codes[i + k] != code:
            return 0
    return 0


@kernel
def infix_length(classes: Array, codes: Array, i: Int, s: Int, e: Int) -> Int:
    """Return how many code points at ``i`` are an infix of the chunk from ``s`` to ``e``."""
    code = codes[i]
    if code == _ELLIPSIS or classes[code] & _ICON:
        return 1
    if code == _DOT:
        n = 1
        while i + n < e and codes[i + n] == _DOT:
            n += 1
        if n > 1:
            return n
    if i == s or i + 1 >= e:
        return 0
    before, after = classes[codes[i - 1]], classes[codes[i + 1]]
    if code == _DOT:
        return 1 if before & _INNER_LEFT and after & _INNER_RIGHT else 0
    if code == _COMMA:
        return 1 if before & _ALPHA and after & _ALPHA else 0
    is_digit = _is_digit(codes[i - 1])
    if is_digit and _is_operator(code) and (_is_digit(codes[i + 1]) or codes[i + 1] == _MINUS):
        return 1
    if not is_digit and not before & _ALPHA:
        return 0
    if code == _MINUS or code == _EN_DASH or code == _EM_DASH or code == _TILDE:  # noqa: SIM109
        return _hyphens(classes, codes, i, e)
    if code == _COLON or code == _SLASH or 60 <= code <= 62:  # noqa: SIM109
        return 1 if after & _ALPHA else 0
    return 0


@kernel
def _is_operator(code: Int) -> bool:
    return code in (_PLUS, _MINUS, _STAR, _CARET)


@kernel
def may_be_url(classes: Array, codes: Array, s: Int, e: Int) -> bool:
    """Tell whether the expression for URLs has to decide about a chunk; without this it fails."""
    n_dots = 0
    for i in range(s + 1, e - 1):
        if codes[i] != _DOT:
            continue
        n_dots += 1
        if n_dots >= 3 and _is_digit(codes[i + 1]):
            return True
        k = i + 1
        while k < e and classes[codes[k]] & _LOWER:
            k += 1
        if k - i > 2 and (
            k == e or codes[k] == _COLON or codes[k] == _SLASH or codes[k] == 63 or codes[k] == 35
        ):
            return True
    return False


@kernel
def rule_of(
    keys: Array, rules: Array, at: Array, s: Int, e: Int, sums: Array, inverses: Array
) -> Int:
    """Return the rule of a string, or -1."""
    if e <= s or e - s > _MAX_SPECIAL:
        return -1
    return look_up(keys, rules, part_hash(sums, inverses, at[s], at[e]))
