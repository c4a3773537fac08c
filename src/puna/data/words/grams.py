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
def all_places(where: Array, n_words: Int, n: Int) -> Int:
    """Fill in every word at which an n-gram begins; return their number."""
    n_places = max(n_words - n + 1, 0)
    for i in range(n_places):
        where[i] = i
    return n_places


@kernel
def count_grams(
    work: Work, where: Array, n_places: Int, n: Int, keys: Array, stamps: Array, stamp: Int,
    counts: Array, slots: Array,
) -> Int:  # fmt: skip
    """Count the n-grams that begin at some words: ``slots[j]`` becomes the slot of the one there.

    Returns:
        How often the most frequent one occurs.
    """
    mask = np.uint64(len(keys) - 1)
    most = 0
    for j in range(n_places):
        key = gram_key(work, where[j], n)
        slot = (key ^ (key >> np.uint64(29))) & mask
        while stamps[slot] == stamp and keys[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        if stamps[slot] != stamp:
            stamps[slot], keys[slot], counts[slot] = stamp, key, 0
        counts[slot] += 1
        slots[j] = slot
        most = max(most, counts[slot])
    return most


@kernel
def longer_places(
    where: Array, n_places: Int, n: Int, n_words: Int, counts: Array, slots: Array
) -> Int:
    """Keep, in place, the words at which an n-gram of one word more may repeat: both its parts do.

    Returns:
        Their number.
    """
    kept = 0
    for j in range(n_places - 1):
        here = where[j]
        if (
            here + n < n_words and where[j + 1] == here + 1
            and counts[slots[j]] > 1 and counts[slots[j + 1]] > 1
        ):  # fmt: skip
            where[kept] = here
            kept += 1
    return kept


@kernel
def top_chars(
    work: Work, where: Array, n_places: Int, n: Int, most: Int, counts: Array, slots: Array,
    longest: bool,
) -> Int:  # fmt: skip
    """Return the characters in all occurrences of the most frequent n-gram, 0 if none repeats.

    Args:
        work: With running sums.
        where: Words at which n-grams begin, those that repeat among them.
        n_places: Their number.
        n: Words of an n-gram.
        most: How often the most frequent one occurs.
        counts: Of :func:`count_grams`.
        slots: Of :func:`count_grams`.
        longest: Of several take the longest, else the one that came first.
    """
    best = 0
    if most < 2:
        return best
    for j in range(n_places):
        if counts[slots[j]] == most:
            i = where[j]
            best = max(best, work.other[0, i + n] - work.other[0, i])
            if not longest:
                break
    return best * most


@kernel
def covered_chars(
    work: Work, where: Array, n_places: Int, n: Int, counts: Array, slots: Array
) -> Int:
    """Return the characters of the words in n-grams that occur twice or more, each once."""
    covered, total = 0, 0
    for j in range(n_places):
        if counts[slots[j]] > 1:
            begin = max(where[j], covered)
            covered = where[j] + n
            total += work.other[0, covered] - work.other[0, begin]
    return total


@kernel
def fill_grams(
    work: Work, n_words: Int, where: Array, n_places: Int, keys: Array, stamps: Array, stamp: Int,
    counts: Array, slots: Array, longest: bool, row: Array,
) -> None:  # fmt: skip
    """Fill: characters in the top 2- to 4-grams, characters that repeated 5- to 10-grams cover.

    Args:
        work: With running sums.
        n_words: Number of words.
        where: The words at which repeated 2-grams may begin; overwritten.
        n_places: Their number.
        keys: Hash table.
        stamps: Marks of the slots in use.
        stamp: The first of nine marks not in use.
        counts: Room for the counts.
        slots: Room for a slot per word.
        longest: See :func:`top_chars`.
        row: [9].
    """
    for n in range(2, 11):
        most = count_grams(work, where, n_places, n, keys, stamps, stamp + n - 2, counts, slots)
        if most < 2:
            break
        if n < 5:
            row[n - 2] = top_chars(work, where, n_places, n, most, counts, slots, longest)
        else:
            row[n - 2] = covered_chars(work, where, n_places, n, counts, slots)
        n_places = longer_places(where, n_places, n, n_words, counts, slots)
