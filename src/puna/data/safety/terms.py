"""Weighted terms in texts: where they stand, and what they add up to per 1,000 words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from puna.core.errors import PunaError
from puna.data.kernels.buffers import Array, Texts, fixed, kernel
from puna.data.kernels.phrases import Automaton, compile_phrases
from puna.data.kernels.words import count_words
from puna.data.safety.lists import read_list

EXCUSABLE_BELOW = 1.0
"""Terms with a smaller weight count nothing near a context word (ours)."""
WINDOW_BYTES = 100
"""How near, on both sides (ours)."""

_WORDS = re.compile(r"\w+")
_FINAL, _CLASS = np.uint32(1 << 31), 0xFF


class TermScores(NamedTuple):
    """What the terms of each text add up to.

    Attributes:
        per_1000: float64 [n_texts], sum of weights per 1,000 words.
        n_terms: int64 [n_texts], occurrences of terms that counted.
        n_distinct: int64 [n_texts], distinct terms that counted.
        top: The terms that added most, for the detail of a rejection.
    """

    per_1000: np.ndarray
    n_terms: np.ndarray
    n_distinct: np.ndarray
    top: list[str]


@dataclass(frozen=True)
class TermList:
    """Terms and the words that excuse them.

    Attributes:
        weights: (term, weight) pairs, lower case, in order.
        context: Words that excuse terms with a weight below :data:`EXCUSABLE_BELOW`.
    """

    weights: tuple[tuple[str, float], ...]
    context: tuple[str, ...]

    @classmethod
    def of(cls, weights: Mapping[str, float], context: Iterable[str]) -> TermList:
        """Make a list.

        Raises:
            PunaError: More than 65,535 bytes of terms.
        """
        if sum(len(term.encode()) for term in weights) > 65_535:
            raise PunaError(
                f"{len(weights)} terms have more than 65,535 bytes",
                "use fewer terms, or train a classifier",
            )
        return cls(tuple(sorted(weights.items())), tuple(sorted(context)))

    def measure(self, texts: Texts) -> TermScores:
        """Add up the terms of each text."""
        n = len(texts)
        sums = np.zeros(n)
        counts, distinct, top = np.zeros(n, np.int64), np.zeros(n, np.int64), [""] * n
        if not self.weights:
            return TermScores(sums, counts, distinct, top)
        machine, begins, weights, lengths, context = _compiled(self)
        docs, ends = _find_ends(
            texts.data, texts.offsets, machine.classes, machine.moves, begins, _INSIDE
        )
        bounds = np.flatnonzero(np.diff(docs, prepend=-1, append=-1))
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            doc = int(docs[low])
            view = texts.bytes_of(doc)
            totals: dict[bytes, float] = {}
            for start, end, term in _terms_at(view, ends[low:high].tolist(), weights, lengths):
                weight = weights[term]
                if weight < EXCUSABLE_BELOW and _excused(view, start, end, context):
                    continue
                totals[term] = totals.get(term, 0.0) + weight
                counts[doc] += 1
            sums[doc] = sum(totals.values())
            distinct[doc] = len(totals)
            best = sorted(totals, key=lambda term: (-totals[term], term))[:3]
            top[doc] = ", ".join(term.decode() for term in best)
        n_words = count_words(texts, sums > 0)[:, 0]
        return TermScores(1000 * sums / np.maximum(n_words, 1), counts, distinct, top)


@lru_cache(maxsize=8)
def _compiled(
    terms: TermList,
) -> tuple[Automaton, np.ndarray, dict[bytes, float], tuple[int, ...], frozenset[str]]:
    weights = {term.encode(): weight for term, weight in terms.weights}
    lengths = tuple(sorted({len(term) for term in weights}, reverse=True))
    machine = compile_phrases(tuple(term for term, _ in terms.weights))
    return machine, _first_bytes(weights), weights, lengths, frozenset(terms.context)


def _first_bytes(terms: Iterable[bytes]) -> np.ndarray:
    """Tell how terms begin: bool [32768], by the low five bits of their first three bytes.

    Five bits fold letter case; that they fold more costs a look at the automaton now and then.
    """
    table = np.zeros((32, 32, 32), bool)
    for term in terms:
        table[tuple(byte & 31 for byte in term[:3])] = True  # short terms: whatever follows
    return fixed(table.ravel())


def _word_bytes() -> np.ndarray:
    inside = np.zeros(256, bool)
    inside[0x80:] = True
    inside[[byte for byte in range(128) if chr(byte).isalnum() or byte == ord("_")]] = True
    return fixed(inside)


_INSIDE = _word_bytes()


@kernel
def _find_ends(
    data: Array, offsets: Array, classes: Array, moves: Array, begins: Array, inside: Array
) -> tuple[Array, Array]:
    """Return text and byte offset of every place where a term and a word end.

    The automaton starts only at words that may begin a term.
    """
    docs, ends = np.empty(256, np.int64), np.empty(256, np.int64)
    n = 0
    for d in range(len(offsets) - 1):
        start, end = offsets[d], offsets[d + 1]
        i = start
        while i < end:
            if not inside[data[i]]:
                i += 1
                continue
            key = 0
            for k in range(i, i + 3):
                key = (key << 5) | (np.int64(data[k]) & 31 if k < end else 0)
            if not begins[key]:
                while i < end and inside[data[i]]:
                    i += 1
                continue
            state = np.uint32(0)
            while i < end:
                state = moves[np.int64(state) + (classes[data[i]] & _CLASS)]
                i += 1
                if state & _FINAL:
                    state ^= _FINAL
                    if i == end or not inside[data[i]]:
                        if n == len(docs):
                            docs = np.concatenate((docs, np.empty(n, np.int64)))
                            ends = np.concatenate((ends, np.empty(n, np.int64)))
                        docs[n], ends[n] = d, i - start
                        n += 1
                if state == 0 and (i == end or not inside[data[i]]):
                    break
    return docs[:n], ends[:n]


def _terms_at(
    view: memoryview, ends: list[int], weights: Mapping[bytes, float], lengths: tuple[int, ...]
) -> list[tuple[int, int, bytes]]:
    """Name the longest term that ends at each place and begins a word; none inside another."""
    found: list[tuple[int, int, bytes]] = []
    for end in ends:
        tail = bytes(view[max(0, end - lengths[0] - 1) : end]).lower()
        for length in lengths:
            term = tail[len(tail) - length :]
            edge = tail[len(tail) - length - 1 : len(tail) - length]
            if length <= len(tail) and term in weights and not (edge and _INSIDE[edge[0]]):
                start = end - length
                while found and found[-1][0] >= start:
                    found.pop()
                found.append((start, end, term))
                break
    return found


def _excused(view: memoryview, start: int, end: int, context: frozenset[str]) -> bool:
    near = bytes(view[max(0, start - WINDOW_BYTES) : end + WINDOW_BYTES]).decode(errors="ignore")
    return not context.isdisjoint(_WORDS.findall(near.lower()))


def read_terms(path: Path) -> dict[str, float]:
    """Read a list: a term per line, and after a tab its weight (1 when there is none).

    Empty lines and lines that begin with ``#`` are ignored. Letter case is ignored; outside of
    ASCII write terms in lower case.

    Raises:
        PunaError: The file is missing, not UTF-8, or a weight is no positive number.
    """
    terms: dict[str, float] = {}
    for number, line in enumerate(read_list(path, "word list", "files"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        term, _, weight = line.partition("\t")
        term = " ".join(term.lower().split())
        try:
            value = float(weight) if weight.strip() else 1.0
        except ValueError:
            value = 0.0
        if not term or not 0 < value < float("inf"):
            raise PunaError(
                f"word list {path}, line {number}: {line!r} is no term with a positive weight",
                "write `term<TAB>weight`, or the term alone",
            )
        terms[term] = value
    return terms
