"""What dolma's Gopher tagger counts in a text, on words between white space; compiled.

Definitions of ``python/dolma/taggers/gopher.py`` (``gopher_v1``) of
https://github.com/allenai/dolma: the median of the word lengths; required words counted with
repeats; all occurrences of what is repeated counted, the first among them; characters without
spaces.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, kernel, power_of_two
from puna.data.words.affixes import part_hash
from puna.data.words.columns import DOLMA_COLUMNS
from puna.data.words.measure import SEPARATOR
from puna.data.words.rules import LETTER, SPACE, Rules, load_rules
from puna.data.words.split import Work, decode, work_for

_SPACE, _LETTER, _SEPARATOR = SPACE, LETTER, SEPARATOR
_N_COLUMNS = len(DOLMA_COLUMNS)
_NEWLINE, _HASH, _ELLIPSIS, _STAR, _MINUS = 10, 35, 0x2026, 42, 45


@kernel
def _list_words(rules: Rules, work: Work, n_codes: Int, row: Array) -> Int:
    """Find the words, their sums and counts; lengths go to ``words``, positions to ``other``."""
    codes, at, words, other = work.codes, work.at, work.words, work.other
    other[0, 0] = other[1, 0] = 0
    work.apart[0] = np.uint64(0)
    m = i = 0
    while i < n_codes:
        if rules.classes[codes[i]] & _SPACE:
            i += 1
            continue
        first, has_sign, has_letter = i, False, False
        while i < n_codes and not rules.classes[codes[i]] & _SPACE:
            has_sign |= codes[i] == _HASH or codes[i] == _ELLIPSIS
            has_letter |= rules.classes[codes[i]] & _LETTER != 0
            i += 1
        key, start = part_hash(work.sums, work.inverses, at[first], at[i]), other[1, m]
        size = at[i] - at[first]
        ended = (key + _SEPARATOR * work.powers[size]) * work.powers[start + m]
        work.apart[m + 1] = work.apart[m] + ended
        words[m, 0] = i - first
        m += 1
        other[0, m], other[1, m] = other[0, m - 1] + i - first, start + size
        row[4] += has_sign
        row[5] += has_letter
        for k in range(len(rules.stop_hashes)):
            row[6] += rules.stop_hashes[k] == key
    row[0], row[1] = m, other[0, m]
    return m


@kernel
def _count_ngrams(
    work: Work, n_words: Int, n: Int, keys: Array, stamps: Array, stamp: Int, counts: Array,
    firsts: Array, row: Array,
) -> None:  # fmt: skip
    """Fill: characters in the most frequent n-gram; in those that repeat; in all n-grams."""
    mask = np.uint64(len(keys) - 1)
    chars = work.other[0]
    best, best_first = 0, 0
    for again in range(2):
        for i in range(n_words - n + 1):
            key = (work.apart[i + n] - work.apart[i]) * work.inverses[work.other[1, i] + i]
            slot = (key ^ (key >> np.uint64(29))) & mask
            while stamps[slot] == stamp and keys[slot] != key:
                slot = (slot + np.uint64(1)) & mask
            if again:
                row[1] += chars[i + n] - chars[i] if counts[slot] > 1 else 0
                continue
            if stamps[slot] != stamp:
                stamps[slot], keys[slot], counts[slot], firsts[slot] = stamp, key, 0, i
            counts[slot] += 1
            row[2] += chars[i + n] - chars[i]
            if counts[slot] > best or (counts[slot] == best and firsts[slot] < best_first):
                best, best_first = counts[slot], firsts[slot]
    row[0] = best * (chars[best_first + n] - chars[best_first]) if best else 0


@kernel
def _count_lines(
    work: Work, n_codes: Int, keys: Array, stamps: Array, stamp: Int, counts: Array, row: Array
) -> None:
    """Fill: lines, those with a bullet, with an ellipsis, repeated ones and their characters."""
    codes, mask = work.codes, np.uint64(len(keys) - 1)
    for again in range(2):
        start = 0
        while start <= n_codes:
            end = start
            while end < n_codes and codes[end] != _NEWLINE:
                end += 1
            key = part_hash(work.sums, work.inverses, work.at[start], work.at[end])
            slot = (key ^ (key >> np.uint64(29))) & mask
            while stamps[slot] == stamp and keys[slot] != key:
                slot = (slot + np.uint64(1)) & mask
            if again:
                row[3] += counts[slot] > 1
                row[4] += end - start if counts[slot] > 1 else 0
            else:
                if stamps[slot] != stamp:
                    stamps[slot], keys[slot], counts[slot] = stamp, key, 0
                counts[slot] += 1
                row[0] += 1
                if end > start:
                    row[1] += codes[start] == _STAR or codes[start] == _MINUS
                    row[2] += codes[end - 1] == _ELLIPSIS
            start = end + 1


@kernel
def _measure(
    rules: Rules, work: Work, data: Array, offsets: Array, alive: Array, rows: Array
) -> None:
    stamp = 1
    keys = np.empty(0, np.uint64)
    stamps = counts = firsts = np.zeros(0, np.int64)
    for d in range(len(offsets) - 1):
        if not alive[d]:
            continue
        row = rows[d]
        n_codes = decode(data, offsets[d], offsets[d + 1], work)
        size = power_of_two(2 * n_codes + 4)
        if size > len(keys):
            keys = np.empty(size, np.uint64)
            stamps, counts, firsts = (
                np.zeros(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
            )  # fmt: skip
        m = _list_words(rules, work, n_codes, row)
        if m:
            lengths = np.sort(work.words[:m, 0])
            row[2], row[3] = lengths[(m - 1) // 2], lengths[m // 2]
        _count_lines(work, n_codes, keys, stamps, stamp, counts, row[7:12])
        for n in range(2, 11):
            column = 12 + 3 * (n - 2)
            _count_ngrams(
                work, m, n, keys, stamps, stamp + n, counts, firsts, row[column : column + 3]
            )  # fmt: skip
        stamp += 11


def measure_plain(texts: Texts, alive: np.ndarray) -> np.ndarray:
    """Measure texts: int64 [n_texts, len(DOLMA_COLUMNS)]; zeros where not alive."""
    rows = np.zeros((len(texts), _N_COLUMNS), np.int64)
    _measure(load_rules(), work_for(texts), texts.data, texts.offsets, alive, rows)
    return rows
