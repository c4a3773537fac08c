"""Builds the index of the evaluation examples, and keeps it in a folder that workers share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from puna.core.fsio import hash_file, hash_json, write_json
from puna.data.decontaminate.examples import Example
from puna.data.decontaminate.kernels import (
    Index,
    count_different,
    hash_grams,
    key_table,
    split_all,
)
from puna.data.kernels.buffers import fixed, texts_from

_NAMES_FILE = "examples.json"
_COMMON_FILE = "common.npy"
_TOO_SHORT, _SAME = 1, 2


@dataclass(frozen=True)
class NgramRule:
    """What is looked for.

    Attributes:
        ngram: Words of an n-gram.
        short_words: Examples and fields with at least so many words, but fewer than ``ngram``, are
            looked for as a whole.
        max_shared: N-grams that more examples share are instructions or templates ("Choose the best
            answer ..."), no evidence: they are left out.
        min_different: N-grams with fewer different words ("0 0 0 ...") are left out, too.
    """

    ngram: int
    short_words: int
    max_shared: int
    min_different: int


@dataclass(frozen=True)
class LoadedIndex:
    """An index and what its numbers stand for.

    Attributes:
        index: The index.
        sets: Names of the sets.
        owners: int64 [n_examples, 2]: number of the set, number of the record in it.
        is_common: bool per posting: stands in too many documents to be evidence.
    """

    index: Index
    sets: list[str]
    owners: np.ndarray
    is_common: np.ndarray


def build_index(
    examples: Iterable[Example], rule: NgramRule, folder: Path
) -> dict[str, dict[str, int]]:
    """Index the examples of all sets and write the index to a folder.

    A record with the words of an earlier one of its set is counted, not indexed again.

    Args:
        examples: The records of all sets.
        rule: What is looked for.
        folder: Gets the files.

    Returns:
        Per set: ``examples``; ``same`` (as an earlier one); ``too_short`` (fewer words than
        ``short_words``: not looked for); ``unspecific`` (nothing but n-grams that are left out: not
        looked for); ``indexed``, the rest.
    """
    given = list(examples)
    parts = [part for example in given for part in example.parts]
    words, bounds, hashes, part_words = split_all(texts_from(parts))
    part_of = np.concatenate([[0], np.cumsum([len(one.parts) for one in given])]).astype(np.int64)
    example_words = part_words[part_of]
    sets = list(dict.fromkeys(example.set_name for example in given))
    numbers = {name: number for number, name in enumerate(sets)}
    owners = np.array([(numbers[one.set_name], one.index) for one in given], np.int64)
    left_out = _left_out(words, bounds, example_words, owners, rule)
    postings = _postings(example_words, part_words, part_of, left_out, rule)
    postings = _specific(postings, hashes, rule)
    is_short = postings[:, 2] < rule.ngram
    sizes = np.where(is_short, rule.short_words, postings[:, 2])
    keys = hash_grams(hashes, postings[:, 1], sizes)
    order = np.argsort(keys, kind="stable")
    different, starts = np.unique(keys[order], return_index=True)
    arrays = Index(
        words, bounds, example_words, *key_table(different)[:2],
        np.append(starts, len(keys)).astype(np.int64), postings[order], key_table(different)[2],
        np.array([rule.ngram * (not is_short.all()), rule.short_words * bool(is_short.any())]),
    )  # fmt: skip
    for name, array in arrays._asdict().items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    save_common(folder, np.zeros(len(postings), bool))
    write_json(folder / _NAMES_FILE, {"sets": sets, "owners": owners.tolist()})
    indexed = np.zeros(len(given), bool)
    indexed[postings[:, 0]] = True
    return {name: _counts(owners[:, 0] == number, left_out, indexed)
            for name, number in numbers.items()}  # fmt: skip


def _counts(here: np.ndarray, left_out: np.ndarray, indexed: np.ndarray) -> dict[str, int]:
    counts = {
        "examples": here,
        "same": here & (left_out == _SAME),
        "too_short": here & (left_out == _TOO_SHORT),
        "unspecific": here & (left_out == 0) & ~indexed,
        "indexed": here & indexed,
    }
    return {name: int(mask.sum()) for name, mask in counts.items()}


def _left_out(
    words: np.ndarray,
    bounds: np.ndarray,
    example_words: np.ndarray,
    owners: np.ndarray,
    rule: NgramRule,
) -> np.ndarray:
    """Tell which examples are too short or the same as an earlier one of their set."""
    left_out = np.zeros(len(owners), np.int64)
    left_out[np.diff(example_words) < min(rule.short_words, rule.ngram)] = _TOO_SHORT
    seen: set[tuple[int, bytes]] = set()
    for number in np.flatnonzero(left_out == 0):
        first, last = bounds[example_words[number]], bounds[example_words[number + 1]]
        key = int(owners[number, 0]), words[first:last].tobytes()
        if key in seen:
            left_out[number] = _SAME
        seen.add(key)
    return left_out


def _postings(
    example_words: np.ndarray,
    part_words: np.ndarray,
    part_of: np.ndarray,
    left_out: np.ndarray,
    rule: NgramRule,
) -> np.ndarray:
    """List what is looked for of every example: int64 [n, 3], see :class:`Index`."""
    found: list[np.ndarray] = [np.zeros((0, 3), np.int64)]
    for number in np.flatnonzero(left_out == 0):
        start, end = example_words[number], example_words[number + 1]
        firsts = np.arange(start, end - rule.ngram + 1)
        sizes = np.full(len(firsts), rule.ngram)
        fields = part_words[part_of[number] : part_of[number + 1] + 1]
        wholes = {(int(a), int(b)) for a, b in pairwise(fields)}
        wholes |= {(int(start), int(end))}
        short = [(a, b - a) for a, b in sorted(wholes) if rule.short_words <= b - a < rule.ngram]
        firsts = np.concatenate([firsts, [a for a, _ in short]]).astype(np.int64)
        sizes = np.concatenate([sizes, [n for _, n in short]]).astype(np.int64)
        found.append(np.stack([np.full(len(firsts), number), firsts, sizes], 1))
    return np.concatenate(found).astype(np.int64)


def _specific(postings: np.ndarray, hashes: np.ndarray, rule: NgramRule) -> np.ndarray:
    """Leave out what many examples have in common and what has few different words."""
    n_different = count_different(hashes, postings[:, 1], postings[:, 2])
    postings = postings[n_different >= rule.min_different]
    keys = hash_grams(hashes, postings[:, 1], postings[:, 2])
    _, group = np.unique(keys, return_inverse=True)
    order = np.lexsort((postings[:, 0], group))
    pairs = np.stack([group[order], postings[order, 0]], 1)
    is_new = np.ones(len(pairs), bool)
    is_new[1:] = (pairs[1:] != pairs[:-1]).any(1)
    n_sharing = np.bincount(pairs[is_new, 0], minlength=1)
    return postings[n_sharing[group] <= rule.max_shared]


def save_common(folder: Path, is_common: np.ndarray) -> None:
    """Say which postings of an index are too common to be evidence: bool per posting."""
    np.save(folder / _COMMON_FILE, is_common, allow_pickle=False)


def hash_index(folder: Path) -> str:
    """Return a digest of an index's files."""
    names = [*(f"{name}.npy" for name in Index._fields), _COMMON_FILE, _NAMES_FILE]
    return hash_json({name: hash_file(folder / name) for name in names})


@lru_cache(maxsize=1)
def load_index(folder: Path, index_hash: str) -> LoadedIndex:
    """Open an index; its arrays are mapped into memory, so that worker processes share them.

    Args:
        folder: Where :func:`build_index` wrote it.
        index_hash: Its digest; a change is not missed by the cache.
    """
    names = json.loads((folder / _NAMES_FILE).read_text(encoding="utf-8"))
    arrays = [fixed(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in Index._fields]
    owners = np.array(names["owners"], np.int64)
    return LoadedIndex(Index(*arrays), names["sets"], owners, np.load(folder / _COMMON_FILE))
