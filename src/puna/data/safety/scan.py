"""One compiled pass over the UTF-8 bytes that finds where personal data or a key could stand.

The pass is generous: it must not miss what the detectors of :mod:`puna.data.safety.pii` accept, and
it must skip ordinary text at the speed of memory. The detectors look only at what it reports.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, fixed, kernel

EMAIL, NUMBER, LETTERED, IPV6, ASSIGNMENT, PREFIX = range(6)
"""Classes of candidates: an ``@`` inside a word; digits with separators; digits after capital
letters (IBAN, ids); groups with colons; ``name = value``; the prefix of a known kind of key."""

KEY_PREFIXES: tuple[tuple[bytes, int], ...] = (
    (b"AKIA", 1),
    (b"ASIA", 1),
    (b"ghp_", 3),
    (b"gho_", 3),
    (b"ghu_", 3),
    (b"ghs_", 3),
    (b"ghr_", 3),
    (b"github_pat_", 6),
    (b"xoxa-", 4),
    (b"xoxb-", 4),
    (b"xoxe-", 4),
    (b"xoxp-", 4),
    (b"xoxr-", 4),
    (b"xoxs-", 4),
    (b"hooks.slack.com/services/", 15),
    (b"AIza", 2),
    (b"GOCSPX-", 5),
    (b"sk-", 2),
    (b"sk_live_", 2),
    (b"rk_live_", 2),
    (b"glpat-", 5),
    (b"hf_", 2),
    (b"npm_", 3),
    (b"pypi-", 4),
    (b"SG.", 1),
    (b"eyJ", 2),
    (b"-----BEGIN ", 5),
)
"""Prefix and the place of its rarest byte, at which the pass stops to compare."""

MIN_DIGITS = 7
"""Digits that a candidate of class NUMBER needs (an IPv4 address needs three dots instead)."""
MAX_DIGITS = 64
"""Runs with more digits are tables of numbers (ours)."""
MIN_SECRET, MAX_SECRET = 8, 512
"""Bytes of an assigned value that could be a secret (ours)."""

_DIGIT, _AT, _COLON, _EQUALS, _ANCHOR = 1, 2, 4, 8, 16
_WORD, _UPPER, _HEX, _SECRET = 1, 2, 4, 8
_NAME_ENDS = ("ord", "swd", "pwd", "ase", "ret", "ken", "key", "als", "ial")
"""What stands before ``=`` must end like password, passwd, pwd, passphrase, secret, token, key,
credentials or credential."""


def _action_table() -> np.ndarray:
    table = np.zeros(256, np.uint8)
    table[48:58] = _DIGIT
    table[ord("@")] = _AT
    table[ord(":")] = _COLON
    table[ord("=")] = _EQUALS
    for prefix, at in KEY_PREFIXES:
        table[prefix[at]] |= _ANCHOR
    return table


def _kind_table() -> np.ndarray:
    table = np.zeros(256, np.uint8)
    for byte in range(33, 127):
        char = chr(byte)
        kinds = _SECRET if char not in "\"'`,;<>()[]" else 0
        kinds |= _WORD if char.isalnum() or char == "_" else 0
        kinds |= _UPPER if char.isupper() else 0
        kinds |= _HEX if char in "0123456789abcdefABCDEF" else 0
        table[byte] = kinds
    return table


def _prefix_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the prefixes by rarest byte: bytes [n, width], lengths, anchors, first row [257]."""
    ordered = sorted(KEY_PREFIXES, key=lambda item: item[0][item[1]])
    chars = np.zeros((len(ordered), max(len(prefix) for prefix, _ in ordered)), np.uint8)
    for row, (prefix, _) in enumerate(ordered):
        chars[row, : len(prefix)] = np.frombuffer(prefix, np.uint8)
    lengths = np.array([len(prefix) for prefix, _ in ordered], np.int64)
    anchors = np.array([at for _, at in ordered], np.int64)
    rarest = [prefix[at] for prefix, at in ordered]
    return chars, lengths, anchors, np.searchsorted(rarest, np.arange(257)).astype(np.int64)


_ACTIONS, _KINDS = fixed(_action_table()), fixed(_kind_table())
_PREFIXES, _LENGTHS, _ANCHORS, _FIRST = (fixed(table) for table in _prefix_tables())
_NAME_KEYS = fixed(np.array([int.from_bytes(end.encode(), "big") for end in _NAME_ENDS], np.int64))


class Candidates(NamedTuple):
    """Places to look at, in the order of documents and positions.

    Attributes:
        doc: int64, index of the text.
        kind: int64, one of the classes of this module.
        start: int64, byte offset in the text.
        end: int64, byte offset in the text; where the run ends (NUMBER), else ``start + 1``.
        n_digits: int64, digits of a NUMBER.
        n_dots: int64, dots of a NUMBER.
    """

    doc: np.ndarray
    kind: np.ndarray
    start: np.ndarray
    end: np.ndarray
    n_digits: np.ndarray
    n_dots: np.ndarray


@kernel
def _separator(data: Array, i: Int, end: Int) -> Int:
    """Return the number of bytes of the separator between digits at ``i``; 0 when it is none."""
    c = data[i]
    if c == 32 or c == 45 or c == 46 or c == 47 or c == 40 or c == 41:  # space - . / ( )
        return 1
    if c == 0xC2 and i + 1 < end and data[i + 1] == 0xA0:  # no-break space
        return 2
    if c == 0xE2 and i + 2 < end and data[i + 1] == 0x80:
        last = data[i + 2]
        if last == 0xAF or last == 0x91 or last == 0x93:  # narrow space, two hyphens
            return 3
    return 0


@kernel
def _number_end(data: Array, i: Int, end: Int, counts: Array) -> Int:
    """Return the end of the digits with at most two separators in a row that begin at ``i``."""
    last, gaps = i, 0
    counts[0], counts[1], counts[2] = 0, 0, 0
    dots = 0
    while i < end:
        c = data[i]
        if 48 <= c <= 57:
            counts[0] += 1
            counts[1] += dots
            counts[2] += gaps
            i += 1
            last, gaps, dots = i, 0, 0
            continue
        width = _separator(data, i, end)
        if width == 0 or gaps == 2:
            break
        dots = dots + 1 if c == 46 else dots
        gaps += 1
        i += width
    return last


@kernel
def _lettered(data: Array, b: Int, i: Int, end: Int, kinds: Array) -> bool:
    """Tell whether capital letters ``b..i`` and what follows could be an IBAN or an id."""
    n_letters = i - b
    if n_letters == 1:  # NIE: X, Y or Z, seven digits, a letter
        return 88 <= data[b] <= 90
    if n_letters != 2 and n_letters != 6:
        return False
    n, k = 0, b
    while k < end and n < 15:
        c = data[k]
        if 48 <= c <= 57 or kinds[c] & _UPPER:
            n += 1
        elif not (c == 32 and n_letters == 2 and n > 3):
            break
        k += 1
    return n == 15


@kernel
def _is_ipv6(data: Array, i: Int, start: Int, end: Int, kinds: Array) -> bool:
    """Tell whether the colon at ``i`` is the first of a run that could be a public address."""
    b = i
    while b > start and i - b < 5 and kinds[data[b - 1]] & _HEX:
        b -= 1
    # Public addresses are 2000::/3: the first group has four digits and begins with 2 or 3.
    if i - b != 4 or (data[b] != 50 and data[b] != 51):
        return False
    if b > start and (kinds[data[b - 1]] & _WORD or data[b - 1] == 58):
        return False
    colons, k = 0, i
    while k < end and k - i < 36 and (data[k] == 58 or kinds[data[k]] & _HEX):
        colons += data[k] == 58
        k += 1
    return colons >= 2


@kernel
def _ends_a_name(data: Array, j: Int, names: Array) -> bool:
    key = np.int64(0)
    for k in range(j - 2, j + 1):
        key = (key << 8) | np.int64(data[k] | 32)
    found = False
    for n in range(len(names)):
        found |= names[n] == key
    return found


@kernel
def _is_assignment(data: Array, i: Int, start: Int, end: Int, kinds: Array, names: Array) -> bool:
    """Tell whether ``:`` or ``=`` stands between a promising name and a value that is no word."""
    j = i - 1
    if j >= start and data[j] == 58:  # :=
        j -= 1
    while (
        j >= start
        and i - j < 8
        and (data[j] == 32 or data[j] == 34 or data[j] == 39 or data[j] == 93)
    ):  # spaces, quotes, the end of an index
        j -= 1
    if j < start + 2 or not _ends_a_name(data, j, names):
        return False
    k = i + 1
    while k < end and k - i < 8:
        c = data[k]  # the rest of => or ==, spaces, quotes
        if c != 62 and c != 61 and c != 32 and c != 34 and c != 39 and c != 96:
            break
        k += 1
    first, n_digits, n_other = k, 0, 0
    while k < end and k - first <= MAX_SECRET and kinds[data[k]] & _SECRET:
        if 48 <= data[k] <= 57:
            n_digits += 1
        else:
            n_other += 1
        k += 1
    return k - first >= MIN_SECRET and n_digits > 0 and n_other > 0


@kernel
def _prefix_at(
    data: Array, i: Int, start: Int, end: Int, kinds: Array, chars: Array, lengths: Array,
    anchors: Array, firsts: Array,
) -> Int:  # fmt: skip
    """Return where a prefix begins whose rarest byte is at ``i``; -1 when there is none."""
    for p in range(firsts[data[i]], firsts[data[i] + 1]):
        b = i - anchors[p]
        if b < start or b + lengths[p] > end:
            continue
        same = True
        for k in range(lengths[p]):
            if data[b + k] != chars[p, k]:
                same = False
                break
        if same and (b == start or not kinds[data[b - 1]] & _WORD):
            return b
    return -1


@kernel
def _grown(table: Array) -> Array:
    larger = np.empty((2 * len(table), 6), np.int64)
    larger[: len(table)] = table
    return larger


@kernel
def _next_action(data: Array, i: Int, end: Int, actions: Array) -> Int:
    """Return the first place from ``i`` on whose byte needs a look.

    Eight bytes share one branch, because most text is letters and spaces.
    """
    while i + 8 <= end:
        seen = (
            actions[data[i]] | actions[data[i + 1]] | actions[data[i + 2]] | actions[data[i + 3]]
            | actions[data[i + 4]] | actions[data[i + 5]] | actions[data[i + 6]]
            | actions[data[i + 7]]
        )  # fmt: skip
        if seen:
            break
        i += 8
    while i < end and actions[data[i]] == 0:
        i += 1
    return i


@kernel
def _at_digit(
    data: Array, i: Int, start: Int, end: Int, kinds: Array, counts: Array, row: Array
) -> Int:
    """Look at the first digit of a run: write its candidate, if any; return where to go on.

    Args:
        data: UTF-8.
        i: The digit.
        start: First byte of the text.
        end: End of the text.
        kinds: Classes of bytes.
        counts: Room for the numbers of digits, dots and separators (dots among them).
        row: Room for class, start, end, digits and dots; the class is -1 when there is none.
    """
    row[0] = -1
    b = i
    while b > start and i - b < 7 and kinds[data[b - 1]] & _UPPER:
        b -= 1
    is_word = b > start and kinds[data[b - 1]] & _WORD
    if b == i and not is_word:
        stop = _number_end(data, i, end, counts)
        n_digits, n_dots = counts[0], counts[1]
        if n_dots == 1 and counts[2] == 1:
            return stop  # a decimal number
        if (
            MIN_DIGITS <= n_digits <= MAX_DIGITS
            or (n_dots >= 3 and n_digits < MIN_DIGITS)
            # A French number of Corsica: six digits, A or B, more digits.
            or (n_digits == 6 and stop < end and 65 <= data[stop] <= 66)
        ):
            row[0], row[1], row[2], row[3], row[4] = NUMBER, i, stop, n_digits, n_dots
        return stop
    if not is_word and _lettered(data, b, i, end, kinds):
        row[0], row[1], row[2], row[3], row[4] = LETTERED, b, b + 1, 0, 0
    stop = i + 1
    while stop < end and 48 <= data[stop] <= 57:
        stop += 1
    return stop


@kernel
def _add(table: Array, n: Int, d: Int, kind: Int, at: Int) -> Int:
    """Write a candidate without digits; return the number of rows."""
    row = table[n]
    row[0], row[1], row[2], row[3] = d, kind, at, at + 1
    row[4], row[5] = 0, 0
    return n + 1


@kernel
def _scan(
    data: Array, offsets: Array, actions: Array, kinds: Array, chars: Array, lengths: Array,
    anchors: Array, firsts: Array, names: Array,
) -> Array:  # fmt: skip
    table = np.empty((1024, 6), np.int64)
    counts, row = np.zeros(3, np.int64), np.zeros(5, np.int64)
    n = 0
    for d in range(len(offsets) - 1):
        start, end = offsets[d], offsets[d + 1]
        i = start
        while True:
            i = _next_action(data, i, end, actions)
            if i >= end:
                break
            action = actions[data[i]]
            if n + 4 > len(table):
                table = _grown(table)
            if action & _DIGIT:
                i = _at_digit(data, i, start, end, kinds, counts, row)
                if row[0] >= 0:
                    n = _add(table, n, d, row[0], row[1] - start)
                    table[n - 1, 3] = row[2] - start
                    table[n - 1, 4] = row[3]
                    table[n - 1, 5] = row[4]
                continue
            if action & _AT and _is_in_word(data, i, start, end, kinds):
                n = _add(table, n, d, EMAIL, i - start)
            if action & _COLON and _is_ipv6(data, i, start, end, kinds):
                n = _add(table, n, d, IPV6, i - 4 - start)
            if action & (_COLON | _EQUALS) and _is_assignment(data, i, start, end, kinds, names):
                n = _add(table, n, d, ASSIGNMENT, i - start)
            if action & _ANCHOR:
                b = _prefix_at(data, i, start, end, kinds, chars, lengths, anchors, firsts)
                if b >= 0:
                    n = _add(table, n, d, PREFIX, b - start)
            i += 1
    return table[:n].copy()


@kernel
def _is_in_word(data: Array, i: Int, start: Int, end: Int, kinds: Array) -> bool:
    """Tell whether no space stands before ``i`` and a letter or digit behind it."""
    if i == start or i + 1 >= end or data[i - 1] <= 32:
        return False
    return kinds[data[i + 1]] & _WORD != 0 or data[i + 1] >= 0xC2


def find_candidates(texts: Texts) -> Candidates:
    """Find all places of a batch that could hold personal data or a key."""
    table = _scan(
        texts.data, texts.offsets, _ACTIONS, _KINDS, _PREFIXES, _LENGTHS, _ANCHORS, _FIRST,
        _NAME_KEYS,
    )  # fmt: skip
    return Candidates(*np.ascontiguousarray(table.T))
