"""What datatrove's filters count in a text, compiled; see :mod:`puna.data.filters.datatrove`.

Strings are compared by their hashes of 64 bits.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, kernel, power_of_two
from puna.data.words.affixes import part_hash
from puna.data.words.columns import (
    COLUMNS,
    REPETITION,
    REPETITION_COLUMNS,
    SENTENCES,
    TEXT,
    TEXT_COLUMNS,
    WORD_COLUMNS,
    WORDS,
)
from puna.data.words.rules import (
    BYTES,
    LETTER,
    PUNCTUATION,
    SENTENCE_END,
    SPACE,
    SYMBOL,
    TERMINAL,
    Rules,
    load_rules,
)
from puna.data.words.split import Work, decode, split_text, work_for
from puna.data.words.urls import Urls

SHORT_LINE_CHARS = 30
SEPARATOR = BYTES[32]

_SPACE, _SYMBOL, _LETTER, _TERMINAL = SPACE, SYMBOL, LETTER, TERMINAL
_PUNCTUATION, _SENTENCE_END, _SEPARATOR = PUNCTUATION, SENTENCE_END, SEPARATOR
_WORDS, _TEXT, _REPETITION, _SENTENCES = WORDS, TEXT, REPETITION, SENTENCES
_SHORT = SHORT_LINE_CHARS
_N_WORD, _N_TEXT, _N_REPETITION = len(WORD_COLUMNS), len(TEXT_COLUMNS), len(REPETITION_COLUMNS)
_NEWLINE, _DOT, _ELLIPSIS, _HASH, _MINUS, _BULLET = 10, 46, 0x2026, 35, 45, 0x2022
_URLS_AT_ONCE = 1 << 16


@kernel
def _seen(keys: Array, stamps: Array, stamp: Int, key: Int) -> bool:
    """Put a key into the set of this stamp and tell whether it was there."""
    mask = np.uint64(len(keys) - 1)
    slot = (key ^ (key >> np.uint64(29))) & mask
    while stamps[slot] == stamp:
        if keys[slot] == key:
            return True
        slot = (slot + np.uint64(1)) & mask
    stamps[slot], keys[slot] = stamp, key
    return False


@kernel
def _count_words(rules: Rules, work: Work, n: Int, row: Array) -> None:
    """Fill the counts of words; white space is none."""
    stops = 0
    for i in range(n):
        first, last = work.words[i, 0], work.words[i, 1]
        if rules.classes[work.codes[first]] & _SPACE:
            continue
        is_real, has_letter = False, False
        for k in range(first, last):
            kinds = rules.classes[work.codes[k]]
            is_real |= kinds & _SYMBOL == 0
            has_letter |= kinds & _LETTER != 0
        row[0] += 1
        row[1] += is_real
        row[2] += last - first if is_real else 0
        row[3] += has_letter
        if last - first <= 4:
            key = part_hash(work.sums, work.inverses, work.at[first], work.at[last])
            for k in range(len(rules.stop_hashes)):
                if rules.stop_hashes[k] == key:
                    stops |= 1 << k
    for k in range(len(rules.stop_hashes)):
        row[4] += stops >> k & 1


@kernel
def _count_sentences(rules: Rules, work: Work, n: Int) -> Int:
    """Count the sentences that spaCy's sentencizer finds."""
    n_sentences, is_over = min(n, 1), False
    for i in range(n):
        first, last = work.words[i, 0], work.words[i, 1]
        is_end = last - first == 1 and rules.classes[work.codes[first]] & _SENTENCE_END != 0
        is_punctuation = True
        for k in range(first, last):
            is_punctuation &= rules.classes[work.codes[k]] & _PUNCTUATION != 0
        if is_over and not is_punctuation and not is_end:
            n_sentences += 1
            is_over = False
        elif is_end:
            is_over = True
    return n_sentences


@kernel
def _ends_line(code: Int) -> bool:
    """Tell whether ``str.splitlines`` ends a line at a code point."""
    return 10 <= code <= 13 or 28 <= code <= 30 or code == 0x85 or 0x2028 <= code <= 0x2029


@kernel
def _count_text(
    classes: Array, work: Work, n: Int, keys: Array, stamps: Array, stamp: Int, row: Array
) -> None:
    """Fill the counts of signs and lines."""
    codes = work.codes
    row[0] = n
    run = 0
    for i in range(n):
        row[1] += codes[i] == _HASH
        run = run + 1 if codes[i] == _DOT else 0
        row[2] += codes[i] == _ELLIPSIS or (run > 0 and run % 3 == 0)
        row[10] += codes[i] == _NEWLINE
    start = 0
    while start < n:
        end = start
        while end < n and not _ends_line(codes[end]):
            end += 1
        first, last = _inner(classes, codes, start, end)
        row[3] += 1
        if last > first:
            row[4] += codes[first] == _BULLET or codes[first] == _MINUS
            dots = last - first > 2 and codes[last - 1] == _DOT and codes[last - 2] == _DOT
            row[5] += codes[last - 1] == _ELLIPSIS or (dots and codes[last - 3] == _DOT)
        crlf = end + 1 < n and codes[end] == 13 and codes[end + 1] == _NEWLINE
        start = end + 2 if crlf else end + 1
    start = 0
    while start <= n:
        end = start
        while end < n and codes[end] != _NEWLINE:
            end += 1
        first, last = _inner(classes, codes, start, end)
        if last > first:
            row[6] += 1
            row[7] += classes[codes[end - 1]] & _TERMINAL != 0
            row[8] += end - start <= _SHORT
            key = part_hash(work.sums, work.inverses, work.at[start], work.at[end])
            row[9] += end - start if _seen(keys, stamps, stamp, key) else 0
        start = end + 1


@kernel
def _inner(classes: Array, codes: Array, first: Int, last: Int) -> tuple[Int, Int]:
    """Leave out the white space at both ends."""
    while first < last and classes[codes[first]] & _SPACE:
        first += 1
    while last > first and classes[codes[last - 1]] & _SPACE:
        last -= 1
    return first, last


@kernel
def _count_parts(
    work: Work, first: Int, last: Int, min_newlines: Int, keys: Array, stamps: Array, stamp: Int,
    row: Array,
) -> None:  # fmt: skip
    """Count the parts between runs of newlines, those seen before, and the characters of these."""
    start = first
    while True:
        end = start
        after = last + 1
        while end < last:
            if work.codes[end] != _NEWLINE:
                end += 1
                continue
            after = end
            while after < last and work.codes[after] == _NEWLINE:
                after += 1
            if after - end >= min_newlines:
                break
            end, after = after, last + 1
        row[0] += 1
        key = part_hash(work.sums, work.inverses, work.at[start], work.at[end])
        if _seen(keys, stamps, stamp, key):
            row[1] += 1
            row[2] += end - start
        if after > last:
            return
        start = after


@kernel
def _list_words(rules: Rules, work: Work, n: Int) -> Int:
    """Fill the running sums of the words, in the rows of ``other``.

    Rows: characters before each word; bytes before it; hash sums of the words side by side, and
    with a space after each.
    """
    other, m = work.other, 0
    other[0, 0] = other[1, 0] = 0
    close, spaced = work.close, work.apart
    close[0] = spaced[0] = np.uint64(0)
    for i in range(n):
        first, last = work.words[i, 0], work.words[i, 1]
        if rules.classes[work.codes[first]] & _SPACE:
            continue
        size = work.at[last] - work.at[first]
        key = part_hash(work.sums, work.inverses, work.at[first], work.at[last])
        at = other[1, m]
        close[m + 1] = close[m] + key * work.powers[at]
        ended = key + _SEPARATOR * work.powers[size]
        spaced[m + 1] = spaced[m] + ended * work.powers[at + m]
        m += 1
        other[0, m] = other[0, m - 1] + last - first
        other[1, m] = at + size
    return m


@kernel
def _top_chars(
    work: Work, n_words: Int, n: Int, keys: Array, stamps: Array, stamp: Int, counts: Array,
    firsts: Array,
) -> Int:  # fmt: skip
    """Return the characters in the most frequent n-gram, -1 when there is none.

    Of several the one that came first, spaces between words counted.
    """
    mask = np.uint64(len(keys) - 1)
    best_count, best_first = 0, 0
    for i in range(n_words - n + 1):
        at = work.other[1, i] + i
        key = (work.apart[i + n] - work.apart[i]) * work.inverses[at]
        slot = (key ^ (key >> np.uint64(29))) & mask
        while stamps[slot] == stamp and keys[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        if stamps[slot] != stamp:
            stamps[slot], keys[slot], counts[slot], firsts[slot] = stamp, key, 0, i
        counts[slot] += 1
        count, first = counts[slot], firsts[slot]
        if count > best_count or (count == best_count and first < best_first):
            best_count, best_first = count, first
    if best_count == 0:
        return -1
    chars = work.other[0, best_first + n] - work.other[0, best_first]
    return best_count * (chars + n - 1)


@kernel
def _repeated_chars(
    work: Work, n_words: Int, n: Int, keys: Array, stamps: Array, stamp: Int
) -> Int:
    """Return the characters in n-grams that were seen before; after one, the next n words."""
    i, chars = 0, 0
    while i < n_words - n + 1:
        key = (work.close[i + n] - work.close[i]) * work.inverses[work.other[1, i]]
        if _seen(keys, stamps, stamp, key):
            chars += work.other[0, i + n] - work.other[0, i]
            i += n
        else:
            i += 1
    return chars


@kernel
def _count_repetition(
    rules: Rules, work: Work, n_codes: Int, n: Int, keys: Array, stamps: Array, stamp: Int,
    counts: Array, firsts: Array, row: Array,
) -> None:  # fmt: skip
    first, last = _inner(rules.classes, work.codes, 0, n_codes)
    _count_parts(work, first, last, 2, keys, stamps, stamp, row[0:3])
    _count_parts(work, 0, n_codes, 1, keys, stamps, stamp + 1, row[3:6])
    n_words = _list_words(rules, work, n)
    for k in range(3):
        row[6 + k] = _top_chars(
            work, n_words, 2 + k, keys, stamps, stamp + 2 + k, counts, firsts
        )  # fmt: skip
    for k in range(6):
        row[9 + k] = _repeated_chars(work, n_words, 5 + k, keys, stamps, stamp + 5 + k)


@kernel
def _measure(
    rules: Rules, work: Work, url_keys: Array, url_values: Array, data: Array, offsets: Array,
    todo: Array, what: Int, rows: Array, urls: Array,
) -> Int:  # fmt: skip
    """Measure the texts that are to be done; those with unknown URLs stay so.

    Returns:
        How many chunks of unknown URLs were listed: number of the text, first and last byte.
    """
    n_unknown, stamp = 0, 1
    keys = np.empty(0, np.uint64)
    stamps = counts = firsts = np.zeros(0, np.int64)
    for d in range(len(offsets) - 1):
        if not todo[d]:
            continue
        n_codes = decode(data, offsets[d], offsets[d + 1], work)
        n = n_urls = 0
        if what & (_WORDS | _REPETITION | _SENTENCES):
            n, n_urls = split_text(rules, work, url_keys, url_values, n_codes)
        if n_urls:
            for k in range(min(n_urls, len(urls) - n_unknown)):
                urls[n_unknown, 0], urls[n_unknown, 1] = d, work.urls[0, k]
                urls[n_unknown, 2] = work.urls[1, k]
                n_unknown += 1
            continue
        todo[d] = False
        row = rows[d]
        size = power_of_two(2 * n_codes + 2)
        if size > len(keys):
            keys = np.empty(size, np.uint64)
            stamps, counts, firsts = (
                np.zeros(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
            )  # fmt: skip
        if what & _WORDS:
            _count_words(rules, work, n, row)
        if what & _SENTENCES:
            row[_N_WORD + _N_TEXT + _N_REPETITION] = _count_sentences(rules, work, n)
        if what & _TEXT:
            _count_text(
                rules.classes, work, n_codes, keys, stamps, stamp, row[_N_WORD:]
            )  # fmt: skip
        if what & _REPETITION:
            _count_repetition(
                rules, work, n_codes, n, keys, stamps, stamp + 1, counts, firsts,
                row[_N_WORD + _N_TEXT :],
            )  # fmt: skip
        stamp += 13
    return n_unknown


@cache
def _urls() -> Urls:
    return Urls()


def measure(texts: Texts, alive: np.ndarray, what: int) -> np.ndarray:
    """Measure texts.

    Args:
        texts: UTF-8.
        alive: bool [n_texts]: the others have zeros.
        what: Sum of the constants of :mod:`puna.data.words.columns`.

    Returns:
        int64 [n_texts, len(COLUMNS)]; zeros where it was not asked for.
    """
    rows = np.zeros((len(texts), len(COLUMNS)), np.int64)
    todo, known, rules, work = alive.copy(), _urls(), load_rules(), work_for(texts)
    found = np.empty((_URLS_AT_ONCE, 3), np.int64)
    while True:
        n = _measure(
            rules, work, known.keys, known.values, texts.data, texts.offsets, todo, what, rows,
            found,
        )  # fmt: skip
        if not n:
            return rows
        starts = texts.offsets[found[:n, 0]]
        spans = zip((starts + found[:n, 1]).tolist(), (starts + found[:n, 2]).tolist(), strict=True)
        known.learn({bytes(texts.data[first:last]).decode() for first, last in spans})
