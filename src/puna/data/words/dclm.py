"""What dclm's filters after RefinedWeb count in a text; compiled.

Definitions of ``baselines/mappers`` of https://github.com/mlfoundations/dclm: tokens as fastText
makes them, words between white space, n-grams of the words of uniseg; all occurrences of what is
repeated count, the first among them.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, kernel, power_of_two
from puna.data.kernels.words import STOP_KEYS
from puna.data.words.affixes import part_hash
from puna.data.words.breaks import ALNUM, DIGIT, UPPER, break_words, kinds
from puna.data.words.columns import DCLM_COLUMNS
from puna.data.words.grams import all_places, fill_grams, list_words
from puna.data.words.rules import LETTER, SPACE, Rules, load_rules
from puna.data.words.split import Work, decode, work_for

_SPACE, _LETTER, _ALNUM, _UPPER, _DIGIT = SPACE, LETTER, ALNUM, UPPER, DIGIT
_N_COLUMNS = len(DCLM_COLUMNS)
_NEWLINE, _BLANK, _HASH, _STAR, _MINUS, _DOT, _ELLIPSIS = 10, 32, 35, 42, 45, 46, 0x2026
_BULLET, _CIRCLE = 0x2022, 0x25CF


@kernel
def _count_tokens(table: Array, codes: Array, n_codes: Int) -> Int:
    """Count fastText's tokens that begin with a letter or a digit."""
    n, inside = 0, False
    for i in range(n_codes):
        code = codes[i]
        is_space = code == _BLANK or 9 <= code <= 13 or code == 0
        if not is_space and not inside:
            n += table[code] & _ALNUM != 0
        inside = not is_space
    return n


@kernel
def _count_words(rules: Rules, work: Work, n_codes: Int, stop_keys: Array, row: Array) -> None:
    """Fill: words between white space, their characters, those without a letter, stop words."""
    codes, i = work.codes, 0
    while i < n_codes:
        if rules.classes[codes[i]] & _SPACE:
            i += 1
            continue
        first, has_letter = i, False
        while i < n_codes and not rules.classes[codes[i]] & _SPACE:
            has_letter |= rules.classes[codes[i]] & _LETTER != 0
            i += 1
        row[0] += 1
        row[1] += i - first
        row[2] += not has_letter
        if i - first <= 4 and work.at[i] - work.at[first] == i - first:
            row[3] += _is_stop_word(codes, first, i, stop_keys)


@kernel
def _is_stop_word(codes: Array, first: Int, last: Int, stop_keys: Array) -> bool:
    """Look up a word, letter case ignored; ``| 32`` makes lower case of letters only."""
    key = np.uint64(0)
    for k in range(first, last):
        key = (key << np.uint64(8)) | np.uint64(codes[k] | 32)
    found = False
    for k in range(len(stop_keys)):
        found |= stop_keys[k] == key
    return found


@kernel
def _count_symbols(codes: Array, n_codes: Int) -> Int:
    """Count ``#``, ``…``, ``...`` and ``. . .``, each without overlap."""
    n, run, spaced, i = 0, 0, 0, 0
    for i in range(n_codes):
        code = codes[i]
        n += code in (_HASH, _ELLIPSIS)
        run = run + 1 if code == _DOT else 0
        n += run > 0 and run % 3 == 0
        if i >= spaced and i + 4 < n_codes and code == _DOT and codes[i + 1] == _BLANK and (
            codes[i + 2] == _DOT and codes[i + 3] == _BLANK and codes[i + 4] == _DOT
        ):  # fmt: skip
            n += 1
            spaced = i + 5
    return n


@kernel
def _marks(codes: Array, first: Int, last: Int) -> tuple[bool, bool]:
    """Tell whether a line begins with a bullet and ends with an ellipsis."""
    code, end, n = codes[first], codes[last - 1], last - first
    bullet = code in (_CIRCLE, _BULLET, _STAR, _MINUS)
    dots = n > 2 and end == _DOT and codes[last - 2] == _DOT and codes[last - 3] == _DOT
    if not dots and n > 4 and end == _DOT and codes[last - 2] == _BLANK:
        dots = codes[last - 3] == _DOT and codes[last - 4] == _BLANK and codes[last - 5] == _DOT
    return bullet, dots or end == _ELLIPSIS


@kernel
def _count_parts(
    classes: Array, work: Work, n_codes: Int, n_newlines: Int, keys: Array, stamps: Array,
    stamp: Int, counts: Array, row: Array, marked: Array,
) -> None:  # fmt: skip
    """Fill: parts that are not blank, those that repeat, characters of all and of these.

    Parts are separated by one or two newlines; ``marked`` becomes the numbers of bullets and of
    ellipses.
    """
    codes, mask = work.codes, np.uint64(len(keys) - 1)
    for again in range(2):
        start = 0
        while start <= n_codes:
            end = start
            while end < n_codes and not (
                codes[end] == _NEWLINE
                and (n_newlines == 1 or (end + 1 < n_codes and codes[end + 1] == _NEWLINE))
            ):
                end += 1
            first, last = start, end
            while first < last and classes[codes[first]] & _SPACE:
                first += 1
            while last > first and classes[codes[last - 1]] & _SPACE:
                last -= 1
            start = end + n_newlines
            if first == last:
                continue
            key = part_hash(work.sums, work.inverses, work.at[first], work.at[last])
            slot = (key ^ (key >> np.uint64(29))) & mask
            while stamps[slot] == stamp and keys[slot] != key:
                slot = (slot + np.uint64(1)) & mask
            if again:
                row[1] += counts[slot] > 1
                row[3] += last - first if counts[slot] > 1 else 0
                continue
            if stamps[slot] != stamp:
                stamps[slot], keys[slot], counts[slot] = stamp, key, 0
            counts[slot] += 1
            row[0] += 1
            row[2] += last - first
            bullet, ellipsis = _marks(codes, first, last)
            marked[0] += bullet
            marked[1] += ellipsis


@kernel
def _odd_lines(classes: Array, table: Array, codes: Array, n_codes: Int, row: Array) -> None:
    """Fill: bounds above, in thousandths, of the shares of capitals and of digits of every line.

    And whether a line has fewer than two words.
    """
    start = 0
    while start <= n_codes:
        n_upper = n_digits = n_words = n_spaces = 0
        inside, i = False, start
        while i < n_codes and codes[i] != _NEWLINE:
            kind = table[codes[i]]
            n_upper += kind & _UPPER != 0
            n_digits += kind & _DIGIT != 0
            is_space = classes[codes[i]] & _SPACE != 0
            n_spaces += is_space
            n_words += not is_space and not inside
            inside = not is_space
            i += 1
        n_visible = i - start - n_spaces
        if n_visible:
            row[0] = max(row[0], 1 + 1000 * n_upper // n_visible)
            row[1] = max(row[1], 1 + 1000 * n_digits // n_visible)
        row[2] |= i > start and n_words < 2
        start = i + 1


@kernel
def _measure(
    rules: Rules, table: Array, stop_keys: Array, work: Work, data: Array, offsets: Array,
    alive: Array, rows: Array,
) -> None:  # fmt: skip
    stamp = 1
    keys = np.empty(0, np.uint64)
    stamps = counts = where = slots = np.zeros(0, np.int64)
    for d in range(len(offsets) - 1):
        if not alive[d]:
            continue
        row = rows[d]
        n_codes = decode(data, offsets[d], offsets[d + 1], work)
        size = power_of_two(2 * n_codes + 4)
        if size > len(keys):
            keys = np.empty(size, np.uint64)
            stamps, counts, where, slots = (
                np.zeros(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64),
                np.empty(size, np.int64),
            )  # fmt: skip
        row[0] = _count_tokens(table, work.codes, n_codes)
        _count_words(rules, work, n_codes, stop_keys, row[1:5])
        row[5] = _count_symbols(work.codes, n_codes)
        marked = np.zeros(2, np.int64)
        _count_parts(
            rules.classes, work, n_codes, 2, keys, stamps, stamp, counts, row[12:16], marked
        )  # fmt: skip
        marked[:] = 0
        _count_parts(
            rules.classes, work, n_codes, 1, keys, stamps, stamp + 1, counts, row[8:12], marked
        )  # fmt: skip
        row[6:8] = marked
        _odd_lines(rules.classes, table, work.codes, n_codes, row[16:19])
        m = break_words(table, work, n_codes)
        list_words(work, m)
        row[19] = work.other[0, m]
        fill_grams(
            work, m, where, all_places(where, m, 2), keys, stamps, stamp + 2, counts, slots, True,
            row[20:29],
        )  # fmt: skip
        stamp += 11


@kernel
def _tokens(table: Array, work: Work, data: Array, offsets: Array, alive: Array) -> Array:
    counts = np.zeros(len(offsets) - 1, np.int64)
    for d in range(len(offsets) - 1):
        if alive[d]:
            counts[d] = _count_tokens(
                table, work.codes, decode(data, offsets[d], offsets[d + 1], work)
            )  # fmt: skip
    return counts


def measure_dclm(texts: Texts, alive: np.ndarray) -> np.ndarray:
    """Measure texts: int64 [n_texts, len(DCLM_COLUMNS)]; zeros where not alive."""
    rows = np.zeros((len(texts), _N_COLUMNS), np.int64)
    _measure(
        load_rules(), kinds(), STOP_KEYS, work_for(texts), texts.data, texts.offsets, alive, rows
    )  # fmt: skip
    return rows


def count_tokens(texts: Texts, alive: np.ndarray) -> np.ndarray:
    """Count the tokens alone: int64 [n_texts]."""
    return _tokens(kinds(), work_for(texts), texts.data, texts.offsets, alive)
