"""Repeated word n-grams: the most frequent one, and the characters that repeated ones cover."""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, kernel
from puna.data.words.affixes import part_hash
from puna.data.words.measure import SEPARATOR
from puna.data.words.split import Work

_SEPARATOR = SEPARATOR


@kernel
def list_words(work: Work, n: Int) -> None:
    """Fill the running sums of the words in ``work.words``.

    ``other[0]``: characters before each word; ``other[1]``: bytes; ``apart``: hash sums of the
    words with a space after each.
    """
    other = work.other
    other[0, 0] = other[1, 0] = 0
    work.apart[0] = np.uint64(0)
    for m in range(n):
        first, last = work.words[m, 0], work.words[m, 1]
        key, at = part_hash(work.sums, work.inverses, work.at[first], work.at[last]), other[1, m]
        size = work.at[last] - work.at[first]
        ended = (key + _SEPARATOR * work.powers[size]) * work.powers[at + m]
        work.apart[m + 1] = work.apart[m] + ended
        other[0, m + 1], other[1, m + 1] = other[0, m] + last - first, at + size


@kernel
def gram_key(work: Work, i: Int, n: Int) -> Int:
    """Return the hash of words ``i`` to ``i + n``, a space after each."""
    return (work.apart[i + n] - work.apart[i]) * work.inverses[work.other[1, i] + i]


@kernel
def count_grams(
    work: Work, n_words: Int, n: Int, keys: Array, stamps: Array, stamp: Int, counts: Array,
    firsts: Array, slots: Array,
) -> Int:  # fmt: skip
    """Count the n-grams: ``slots[i]`` becomes the slot of the one at word ``i``.

    Returns:
        How often the most frequent one occurs.
    """
    mask = np.uint64(len(keys) - 1)
    most = 0
    for i in range(n_words - n + 1):
        key = gram_key(work, i, n)
        slot = (key ^ (key >> np.uint64(29))) & mask
        while stamps[slot] == stamp and keys[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        if stamps[slot] != stamp:
            stamps[slot], keys[slot], counts[slot], firsts[slot] = stamp, key, 0, i
        counts[slot] += 1
        slots[i] = slot
        most = max(most, counts[slot])
    return most


@kernel
def top_chars(
    work: Work, n_words: Int, n: Int, most: Int, counts: Array, slots: Array, longest: bool
) -> Int:
    """Return the characters in all occurrences of the most frequent n-gram, 0 if none repeats.

    Args:
        work: With running sums.
        n_words: Number of words.
        n: Words of an n-gram.
        most: How often the most frequent one occurs.
        counts: Of :func:`count_grams`.
        slots: Of :func:`count_grams`.
        longest: Of several take the longest, else the one that came first.
    """
    best = 0
    if most < 2:
        return best
    for i in range(n_words - n + 1):
        if counts[slots[i]] == most:
            best = max(best, work.other[0, i + n] - work.other[0, i])
            if not longest:
                break
    return best * most


@kernel
def covered_chars(work: Work, n_words: Int, n: Int, counts: Array, slots: Array) -> Int:
    """Return the characters of the words in n-grams that occur twice or more, each once."""
    covered, total = 0, 0
    for i in range(n_words - n + 1):
        if counts[slots[i]] > 1:
            begin = max(i, covered)
            covered = i + n
            total += work.other[0, covered] - work.other[0, begin]
    return total
