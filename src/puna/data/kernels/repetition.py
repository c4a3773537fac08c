"""Repetition inside a text, after Gopher (Rae et al. 2021, appendix A, table A1).

Lines and paragraphs that occurred before; the share of characters in the most frequent 2-, 3- and
4-word sequences; the share of characters inside 5- to 10-word sequences that occurred before.
Definitions where the paper leaves a choice:

- words are separated by white space; characters are the code points of words, spaces not counted;
- lines and paragraphs (runs of lines that are not blank) are equal when their words are;
- the first occurrence of a line, paragraph or 5- to 10-gram is not a repetition, and overlapping
  repetitions are counted once;
- a 2- to 4-gram counts as *top* only if it occurs at least twice.

One table pass over the words costs most of the time. A longer sequence can only be repeated where
the shorter one is, so later passes look at few positions of ordinary text.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import (
    FNV_PRIME,
    FNV_SEED,
    MIX,
    Array,
    Float,
    Int,
    Texts,
    find_slot,
    kernel,
    power_of_two,
)

COLUMNS = (
    "dup_line_share", "dup_line_char_share", "dup_paragraph_share", "dup_paragraph_char_share",
    "top_2gram_share", "top_3gram_share", "top_4gram_share",
    "dup_5gram_share", "dup_6gram_share", "dup_7gram_share", "dup_8gram_share", "dup_9gram_share",
    "dup_10gram_share",
)  # fmt: skip

_LAST_N = 10


@kernel
def _mix(value: Int) -> Int:
    value ^= value >> np.uint64(32)
    value *= MIX
    return value ^ (value >> np.uint64(29))


@kernel
def _split(
    data: Array, start: Int, end: Int, hashes: Array, chars: Array, ends: Array
) -> tuple[Int, Int]:
    """Hash the words of a text and find its lines.

    ``chars[w + 1]`` becomes the code points of words 0..w. ``ends[k]`` becomes the number of words
    up to the end of the k-th line that is not blank, negative if a paragraph ends there.

    Returns:
        The numbers of words and of lines that are not blank.
    """
    n, n_lines, i = 0, 0, start
    chars[0] = 0
    done = 0  # words of complete lines
    while i < end:
        if data[i] <= 32:
            if data[i] == 10:
                if n > done:
                    ends[n_lines] = n
                    n_lines += 1
                    done = n
                elif n_lines:
                    ends[n_lines - 1] = -done
            i += 1
            continue
        value, n_chars = FNV_SEED, 0
        while i < end and data[i] > 32:
            value = (value ^ np.uint64(data[i])) * FNV_PRIME
            n_chars += (data[i] & 0xC0) != 0x80
            i += 1
        hashes[n] = _mix(value)
        chars[n + 1] = chars[n] + n_chars
        n += 1
    if n > done:
        ends[n_lines] = n
        n_lines += 1
    if n_lines:
        ends[n_lines - 1] = -n
    return n, n_lines


@kernel
def _n_words(data: Array, start: Int, end: Int) -> Int:
    n, before = 0, 0
    for i in range(start, end):
        n += data[i] > 32 and before <= 32
        before = data[i]
    return n


@kernel
def _seen(keys: Array, used: Array, mask: Int, key: Int) -> bool:
    """Insert a key and tell whether it was there."""
    slot = find_slot(keys, used, mask, key)
    if used[slot]:
        return True
    keys[slot], used[slot] = key, 1
    return False


@kernel
def _blocks(
    hashes: Array, chars: Array, ends: Array, n_lines: Int, keys: Array, used: Array, row: Array
) -> None:
    """Fill the four shares of repeated lines and paragraphs."""
    mask = len(keys) - 1
    n = np.zeros(5, np.int64)  # repeated lines, their chars, paragraphs, repeated ones, their chars
    word, first, block = 0, 0, FNV_SEED
    for k in range(n_lines):
        end, line = abs(ends[k]), FNV_SEED
        n_chars = chars[end] - chars[word]
        for w in range(word, end):
            line = (line ^ hashes[w]) * FNV_PRIME
            line ^= line >> np.uint64(31)
        word = end
        if _seen(keys, used, mask, _mix(line)):
            n[0] += 1
            n[1] += n_chars
        block = (block ^ line) * FNV_PRIME
        block ^= block >> np.uint64(31)
        if ends[k] < 0:
            n[2] += 1
            if _seen(keys, used, mask, _mix(block ^ MIX)):  # other keys than those of lines
                n[3] += 1
                n[4] += chars[end] - chars[first]
            first, block = end, FNV_SEED
    total = chars[word]
    row[0], row[1] = n[0] / n_lines, n[1] / total
    row[2], row[3] = n[3] / n[2], n[4] / total


@kernel
def _insert(keys: Array, counts: Array, mask: Int, grams: Array, n: Int, slots: Array) -> None:
    """Count the first ``n`` grams; ``slots[i]`` becomes the slot of gram ``i``."""
    for i in range(n):
        slot = find_slot(keys, counts, mask, grams[i])
        keys[slot] = grams[i]
        counts[slot] += 1
        slots[i] = slot


@kernel
def _top(where: Array, n: Int, size: Int, slots: Array, counts: Array, chars: Array) -> Float:
    """Code points in the most frequent gram times its count; ties go to the longest."""
    best_count, best_chars = 1, 0
    for i in range(n):
        count = counts[slots[i]]
        n_chars = chars[where[i] + size] - chars[where[i]]
        if count > best_count or (count == best_count and count > 1 and n_chars > best_chars):
            best_count, best_chars = count, n_chars
    return best_count * best_chars


@kernel
def _repeated(where: Array, n: Int, size: Int, slots: Array, counts: Array, chars: Array) -> Float:
    """Code points inside grams that occurred before, each counted once; marks counts negative."""
    covered, total = 0, 0
    for i in range(n):
        slot = slots[i]
        if counts[slot] > 0:
            counts[slot] = -counts[slot]  # the first occurrence
            continue
        begin, end = max(where[i], covered), where[i] + size
        total += chars[end] - chars[begin]
        covered = end
    return total


@kernel
def _next_grams(
    where: Array,
    grams: Array,
    n: Int,
    size: Int,
    slots: Array,
    counts: Array,
    hashes: Array,
    n_words: Int,
) -> Int:
    """Keep, in place, the positions whose gram and whose next gram are repeated; lengthen them."""
    kept = 0
    for i in range(n):
        here = where[i]
        if here + size >= n_words or abs(counts[slots[i]]) < 2:
            continue
        if i + 1 < n and where[i + 1] == here + 1 and abs(counts[slots[i + 1]]) > 1:
            grams[kept] = _mix((grams[i] * FNV_PRIME) ^ hashes[here + size])
            where[kept] = here
            kept += 1
    return kept


@kernel
def _ngrams(
    hashes: Array,
    chars: Array,
    n_words: Int,
    where: Array,
    grams: Array,
    slots: Array,
    keys: Array,
    counts: Array,
    row: Array,
) -> None:
    """Fill the shares of top 2- to 4-grams and repeated 5- to 10-grams."""
    n = n_words - 1
    for i in range(n):
        where[i] = i
        grams[i] = _mix((hashes[i] * FNV_PRIME) ^ hashes[i + 1])
    total = chars[n_words]
    for size in range(2, _LAST_N + 1):
        if n < 2:
            break
        used = power_of_two(2 * n)
        counts[:used] = 0
        _insert(keys, counts, used - 1, grams, n, slots)
        if size <= 4:
            row[2 + size] = _top(where, n, size, slots, counts, chars) / total
        else:
            row[2 + size] = _repeated(where, n, size, slots, counts, chars) / total
        n = _next_grams(where, grams, n, size, slots, counts, hashes, n_words)


@kernel
def _measure(data: Array, offsets: Array, alive: Array) -> Array:
    n = len(offsets) - 1
    most = 1  # words of the longest text
    for d in range(n):
        if alive[d] and (offsets[d + 1] - offsets[d]) // 2 + 1 > most:
            most = max(most, _n_words(data, offsets[d], offsets[d + 1]))
    hashes, grams = np.empty(most, np.uint64), np.empty(most, np.uint64)
    chars, where = np.empty(most + 1, np.int64), np.empty(most, np.int64)
    slots, ends = np.empty(most, np.int64), np.empty(most, np.int64)
    table = power_of_two(4 * (most + 1))
    keys, counts = np.empty(table, np.uint64), np.zeros(table, np.int32)
    rows = np.zeros((n, 13), np.float64)
    for d in range(n):
        if not alive[d]:
            continue
        start, end = offsets[d], offsets[d + 1]
        n_words, n_lines = _split(data, start, end, hashes, chars, ends)
        if n_words == 0:
            continue
        small = power_of_two(4 * (n_words + 1))  # at most one line and one paragraph per word
        counts[:small] = 0
        _blocks(hashes, chars, ends, n_lines, keys[:small], counts[:small], rows[d])
        _ngrams(hashes, chars, n_words, where, grams, slots, keys, counts, rows[d])
    return rows


def measure_repetition(texts: Texts, alive: np.ndarray) -> np.ndarray:
    """Measure repetition.

    Args:
        texts: The batch.
        alive: bool per text; others get zeros.

    Returns:
        float64 [n_texts, len(COLUMNS)], shares between 0 and 1.
    """
    return _measure(texts.data, texts.offsets, alive)
