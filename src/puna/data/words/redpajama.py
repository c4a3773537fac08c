"""What RedPajama-V2's quality signals count in a text; compiled.

Definitions of ``app/src/core`` of https://github.com/togethercomputer/RedPajama-Data: normalised
words are those between white space after punctuation (ASCII) is taken out, in lower case, NFD; raw
words are runs of letters, digits and ``_`` or of other signs.
"""

from __future__ import annotations

import math
import string
import unicodedata
from functools import lru_cache

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, kernel, power_of_two, texts_from
from puna.data.words.affixes import look_up, part_hash
from puna.data.words.breaks import ASCII_LETTER, NOT_UPPER, NUMBER, UPPER, WORD, kinds
from puna.data.words.columns import REDPAJAMA_COLUMNS
from puna.data.words.grams import (
    all_places,
    count_grams,
    fill_grams,
    gram_key,
    list_words,
    longer_places,
)
from puna.data.words.rules import SPACE, classes, hash_of, hash_table
from puna.data.words.split import Work, decode, work_for

BULLETS = "\u2022\u2023\u25b6\u25c0\u25e6\u25a0\u25a1\u25aa\u25ab\u2013"
ENDS = ".!?\u201d"
_SPACE, _WORD, _UPPER, _NOT_UPPER, _NUMBER, _ASCII_LETTER = (
    SPACE, WORD, UPPER, NOT_UPPER, NUMBER, ASCII_LETTER,
)  # fmt: skip
_NEWLINE, _DOT, _ELLIPSIS = 10, 46, 0x2026
_BULLETS, _ENDS = np.array([*map(ord, BULLETS)]), np.array([*map(ord, ENDS)])
_SENTENCE_ENDS = np.array([*map(ord, ".!?")])
_JAVASCRIPT = np.uint64(hash_of("javascript"))
_N_COLUMNS = len(REDPAJAMA_COLUMNS)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Take out punctuation, make lower case, decompose; white space stays as it is."""
    text = text.translate(_PUNCTUATION).lower()
    return text if text.isascii() else unicodedata.normalize("NFD", text)


@lru_cache(maxsize=16)
def phrase_table(phrases: frozenset[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of phrases, each word with a space after it, and their numbers of words."""
    keys, values = hash_table({hash_of(f"{phrase} "): 1 for phrase in sorted(phrases)})
    sizes = sorted({1 + phrase.count(" ") for phrase in phrases})
    return keys, values, np.array(sizes, np.int64)


@lru_cache(maxsize=16)
def word_table(words: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of words."""
    return hash_table({hash_of(word): 1 for word in sorted(words)})


@kernel
def _is_in(code: Int, codes: Array) -> bool:
    found = False
    for k in range(len(codes)):
        found |= codes[k] == code
    return found


@kernel
def _raw_words(
    spaces: Array, table: Array, work: Work, n_codes: Int, keys: Array, values: Array, row: Array
) -> None:
    """Fill: raw words; with an ASCII letter; all capitals; stop words."""
    codes, at, i = work.codes, work.at, 0
    while i < n_codes:
        if spaces[codes[i]] & _SPACE:
            i += 1
            continue
        first, is_word = i, table[codes[i]] & _WORD != 0
        has_letter, has_upper, has_lower = False, False, False
        while i < n_codes and not spaces[codes[i]] & _SPACE:
            kind = table[codes[i]]
            if (kind & _WORD != 0) != is_word:
                break
            has_letter |= kind & _ASCII_LETTER != 0
            has_upper |= kind & _UPPER != 0
            has_lower |= kind & _NOT_UPPER != 0
            i += 1
        row[0] += 1
        row[1] += has_letter
        row[2] += has_upper and not has_lower
        key = part_hash(work.sums, work.inverses, at[first], at[i])
        row[3] += look_up(keys, values, key) >= 0


@kernel
def _sentences(table: Array, codes: Array, n_codes: Int, ends: Array) -> Int:
    r"""Count the matches of ``\b[^.!?]+[.!?]*``: runs without these signs that hold a word."""
    n, has_word = 0, False
    for i in range(n_codes):
        if _is_in(codes[i], ends):
            n += has_word
            has_word = False
        else:
            has_word |= table[codes[i]] & _WORD != 0
    return n + has_word


@kernel
def _raw_lines(
    spaces: Array, table: Array, codes: Array, n_codes: Int, bullets: Array, ends: Array, row: Array
) -> None:
    """Fill: lines; that end with an ellipsis; with a full stop; with a bullet; sum of capitals.

    The last is a sum over lines of the share of capitals; the newline is a character of its line.
    """
    start = 0
    while start < n_codes:
        i, n_upper = start, 0
        while i < n_codes and codes[i] != _NEWLINE:
            n_upper += table[codes[i]] & _UPPER != 0
            i += 1
        end = min(i + 1, n_codes)
        first, last = start, i
        while first < last and spaces[codes[first]] & _SPACE:
            first += 1
        while last > first and spaces[codes[last - 1]] & _SPACE:
            last -= 1
        row[0] += 1
        row[4] += n_upper / (end - start)
        if last > first:
            code, n = codes[last - 1], last - first
            dots = n > 2 and code == _DOT and codes[last - 2] == _DOT and codes[last - 3] == _DOT
            row[1] += dots or code == _ELLIPSIS
            row[2] += _is_in(code, ends)
            row[3] += _is_in(codes[first], bullets)
        start = end


@kernel
def _normal_words(
    spaces: Array, table: Array, work: Work, n_codes: Int, javascript: Int, row: Array
) -> Int:
    """List the words; fill: sum over lines of the share of numbers; words "javascript"."""
    codes, at, n, i = work.codes, work.at, 0, 0
    line_chars = line_numbers = 0
    while i <= n_codes:
        if i == n_codes or codes[i] == _NEWLINE:
            row[0] += line_numbers / (line_chars - 1) if line_chars else 0.0
            line_chars = line_numbers = 0
            i += 1
            continue
        if spaces[codes[i]] & _SPACE:
            i += 1
            continue
        first = i
        while i < n_codes and not spaces[codes[i]] & _SPACE:
            line_numbers += table[codes[i]] & _NUMBER != 0
            i += 1
        line_chars += i - first + 1  # with a space
        row[1] += part_hash(work.sums, work.inverses, at[first], at[i]) == javascript
        work.words[n, 0], work.words[n, 1] = first, i
        n += 1
    return n


@kernel
def _unigrams(n: Int, counts: Array, slots: Array) -> tuple[Int, float]:
    """Return the number of different words and the entropy of their distribution, in nats."""
    n_unique, entropy = 0, 0.0
    for i in range(n):
        count = counts[slots[i]]
        if count > 0:
            n_unique += 1
            entropy += -(count / n) * math.log(count / n)
            counts[slots[i]] = -count  # the first occurrence
    for i in range(n):
        counts[slots[i]] = abs(counts[slots[i]])
    return n_unique, entropy


@kernel
def _phrases(work: Work, n: Int, keys: Array, values: Array, sizes: Array) -> Int:
    found = 0
    for size in sizes:
        for i in range(n - size + 1):
            found += look_up(keys, values, gram_key(work, i, size)) >= 0
    return found


@kernel
def _measure_raw(
    spaces: Array, table: Array, work: Work, data: Array, offsets: Array, alive: Array,
    stop_keys: Array, stop_values: Array, signs: tuple[Array, Array, Array], rows: Array,
) -> None:  # fmt: skip
    bullets, ends, sentence_ends = signs
    for d in range(len(offsets) - 1):
        if alive[d]:
            row = rows[d]
            n = decode(data, offsets[d], offsets[d + 1], work)
            _raw_words(spaces, table, work, n, stop_keys, stop_values, row[0:4])
            row[4] = _sentences(table, work.codes, n, sentence_ends)
            _raw_lines(spaces, table, work.codes, n, bullets, ends, row[5:10])


@kernel
def _measure_normal(
    spaces: Array, table: Array, work: Work, data: Array, offsets: Array, alive: Array,
    javascript: Int, phrase_keys: Array, phrase_values: Array, phrase_sizes: Array, rows: Array,
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
        n = _normal_words(spaces, table, work, n_codes, javascript, row[0:2])
        list_words(work, n)
        row[2], row[3] = n, work.other[0, n]
        n_places = all_places(where, n, 1)
        count_grams(work, where, n_places, 1, keys, stamps, stamp, counts, slots)
        row[4], row[5] = _unigrams(n, counts, slots)
        row[6] = _phrases(work, n, phrase_keys, phrase_values, phrase_sizes)
        n_places = longer_places(where, n_places, 1, n, counts, slots)
        fill_grams(
            work, n, where, n_places, keys, stamps, stamp + 2, counts, slots, False, row[7:16]
        )  # fmt: skip
        stamp += 11


def measure_redpajama(
    texts: Texts, alive: np.ndarray, normal: list[str], stop_words: frozenset[str],
    bad_words: frozenset[str],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Measure texts.

    Args:
        texts: The batch.
        alive: bool [n_texts]; the others have zeros.
        normal: The normalised texts (:func:`normalise`).
        stop_words: Looked up among raw words.
        bad_words: Words or phrases, looked up among normalised words.

    Returns:
        Name of :data:`REDPAJAMA_COLUMNS` -> float64 [n_texts].
    """
    rows = np.zeros((len(texts), _N_COLUMNS))
    given, spaces, table = texts_from(normal), classes(), kinds()
    _measure_raw(
        spaces, table, work_for(texts), texts.data, texts.offsets, alive, *word_table(stop_words),
        (_BULLETS, _ENDS, _SENTENCE_ENDS), rows[:, :10],
    )  # fmt: skip
    _measure_normal(
        spaces, table, work_for(given), given.data, given.offsets, alive, _JAVASCRIPT,
        *phrase_table(bad_words), rows[:, 10:],
    )  # fmt: skip
    return {name: rows[:, index] for index, name in enumerate(REDPAJAMA_COLUMNS)}
