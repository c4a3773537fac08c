"""The facts about spaCy's English tokenizer, as the arrays that the kernels read.

A string is known by its hash: the sum of a random number per byte times a power of an odd base,
modulo 2^64. Hashes of parts follow from those of the whole, and that of strings put side by side
from theirs (:mod:`puna.data.words.split`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from puna.data.words.columns import STOP_WORDS

N_CODES = 0x110000
ALPHA, BEFORE_INNER_DOT, AFTER_INNER_DOT, UPPER, BEFORE_DOT, ICON, PREFIX, SUFFIX = (
    1 << bit for bit in range(8)
)
CURRENCY, SPACE, SYMBOL, LETTER, PUNCTUATION, SENTENCE_END, TERMINAL, LOWER = (
    1 << bit for bit in range(8, 16)
)
"""Classes of code points; ALPHA, UPPER and LOWER are spaCy's lists, LETTER is ``str.isalpha``."""

MAX_SPECIAL_CHARS = 12
MAX_UNIT_CHARS = 5
BASE = np.uint64(0x9E3779B97F4A7C55)
BASE_INVERSE = np.uint64(pow(int(BASE), -1, 1 << 64))
BYTES = np.random.default_rng(20240418).integers(1, 2**63, 256, np.int64).astype(np.uint64)
BYTES = (BYTES << np.uint64(1)) ^ (BYTES >> np.uint64(7)) ^ np.uint64(1)
"""A number per byte."""
_MASK = (1 << 64) - 1
_URL_BEFORE_TLD = (
    r"(?:(?:[\w\+\-\.]{2,})://)?(?:\S+(?::\S*)?@)?(?:"
    r"(?!(?:10|127)(?:\.\d{1,3}){3})(?!(?:169\.254|192\.168)(?:\.\d{1,3}){2})"
    r"(?!172\.(?:1[6-9]|2\d|3[0-1])(?:\.\d{1,3}){2})"
    r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}"
    r"(?:\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4]))"
    r"|(?:(?:[A-Za-z0-9\u00a1-\uffff][A-Za-z0-9\u00a1-\uffff_-]{0,62})?"
    r"[A-Za-z0-9\u00a1-\uffff]\.)+"
)


class Rules(NamedTuple):
    """Arrays of the kernels; tables by hash are open-addressing, 0 is a free slot.

    Attributes:
        classes: uint16 [0x110000], the classes of each code point.
        special_keys: Hashes of the strings that have a rule.
        special_rules: Number of the rule.
        rule_starts: First piece of each rule; one more entry at the end.
        piece_chars: Code points of each piece.
        unit_keys: Hashes of the units of measurement.
        unit_values: 1 each.
        known_keys: Hashes of the words that occur inside inner rules.
        known_ids: Number of the word, from 0.
        step_keys: State << 16 | word + 1 of the trie of inner rules, mixed; state 0 is its root.
        step_states: The next state.
        state_rules: Per state the rule whose words end there, or -1.
        stop_hashes: Of the stop words.
    """

    classes: np.ndarray
    special_keys: np.ndarray
    special_rules: np.ndarray
    rule_starts: np.ndarray
    piece_chars: np.ndarray
    unit_keys: np.ndarray
    unit_values: np.ndarray
    known_keys: np.ndarray
    known_ids: np.ndarray
    step_keys: np.ndarray
    step_states: np.ndarray
    state_rules: np.ndarray
    stop_hashes: np.ndarray


def hash_of(text: str) -> int:
    """Return the hash of a string."""
    total, power = 0, 1
    for byte in text.encode():
        total += int(BYTES[byte]) * power
        power = power * int(BASE) & _MASK
    return total & _MASK


@cache
def _facts() -> dict[str, Any]:
    return json.loads(files("puna.data.words").joinpath("english.json").read_text("utf-8"))


@cache
def url_pattern() -> re.Pattern[str]:
    """Return what spaCy takes for a URL (after Diego Perini's expression)."""
    pairs = _pairs(_facts()["classes"]["lower"])
    lower = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in pairs)
    return re.compile(
        f"(?u)^{_URL_BEFORE_TLD}(?:[{lower}]{{2,63}}))(?::\\d{{2,5}})?(?:[/?#]\\S*)?$"
    )


def _pairs(flat: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip(flat[::2], flat[1::2], strict=True)


@cache
def classes() -> np.ndarray:
    """Return the classes of each code point."""
    table = np.zeros(N_CODES, np.uint16)
    given = _facts()["classes"]
    for name, bits in (
        ("alpha", ALPHA), ("lower", BEFORE_INNER_DOT | LOWER), ("upper", AFTER_INNER_DOT | UPPER),
        ("quote", BEFORE_INNER_DOT | AFTER_INNER_DOT), ("before_dot", BEFORE_DOT), ("icon", ICON),
        ("prefix", PREFIX), ("suffix", SUFFIX), ("currency", CURRENCY), ("symbol", SYMBOL),
        ("terminal", TERMINAL), ("sentence_end", SENTENCE_END),
    ):  # fmt: skip
        for first, last in _pairs(given[name]):
            table[first : last + 1] |= bits
    table[ord("+")] &= ~np.uint16(PREFIX)  # unless a digit follows
    for code in range(N_CODES):
        char = chr(code)
        if char.isspace():
            table[code] |= SPACE
        if char.isalpha():
            table[code] |= LETTER
        if unicodedata.category(char)[0] == "P":
            table[code] |= PUNCTUATION
    return table


@cache
def load_rules() -> Rules:
    """Build the arrays."""
    facts = _facts()
    specials: list[list[str]] = facts["specials"]
    numbers = {"".join(pieces): number for number, pieces in enumerate(specials)}
    known: dict[str, int] = {}
    steps: dict[tuple[int, int], int] = {}
    ends = [-1]
    for text, words in facts["inner"].items():
        state = 0
        for word in words:
            id_ = known.setdefault(word, len(known))
            if (state, id_) not in steps:
                steps[state, id_] = len(ends)
                ends.append(-1)
            state = steps[state, id_]
        ends[state] = numbers[text]
    special_keys, special_rules = hash_table({hash_of(t): n for t, n in numbers.items()})
    unit_keys, unit_values = hash_table({hash_of(unit): 1 for unit in facts["units"]})
    known_keys, known_ids = hash_table({hash_of(word): id_ for word, id_ in known.items()})
    step_keys, step_states = hash_table({
        mix_step(state, id_): to for (state, id_), to in steps.items()
    })  # fmt: skip
    return Rules(
        classes(), special_keys, special_rules,
        np.cumsum([0, *map(len, specials)]),
        np.array([len(piece) for pieces in specials for piece in pieces], np.int64),
        unit_keys, unit_values, known_keys, known_ids, step_keys, step_states,
        np.array(ends, np.int64), np.array([hash_of(word) for word in STOP_WORDS], np.uint64),
    )  # fmt: skip


def mix_step(state: int, word: int) -> int:
    """Return the key of a step of the trie."""
    return ((state << 16 | word) + 1) * 0x9E3779B97F4A7C15 & _MASK


def hash_table(entries: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return an open-addressing table, half full at most; keys are well mixed and not 0."""
    size = 1 << max(4, (2 * len(entries)).bit_length())
    keys, values = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    for key, value in entries.items():
        slot = (key ^ key >> 29) & (size - 1)
        while keys[slot]:
            slot = (slot + 1) % size
        keys[slot], values[slot] = key, value
    return keys, values
