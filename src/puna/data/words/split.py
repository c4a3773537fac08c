"""Splitting a text into words, as spaCy's English tokenizer does.

White space cuts a text into chunks. A chunk that has a rule becomes its pieces; of the others
prefixes and suffixes are cut off in turns, until a rule fits or nothing is left to cut, and what is
between is cut at infixes unless it is a URL. At last the rules of inner strings (``:)``) are looked
for in the sequence of words. Single spaces are no words; other white space is, and whoever counts
words leaves it out.

Positions are code points of the text. Running sums over its bytes (``sums[i + 1] = sums[i] +
BYTES[byte] * BASE**i``) give the hash of any part.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from puna.data.kernels.buffers import MIX, Array, Int, Texts, kernel
from puna.data.words.affixes import (
    infix_length,
    look_up,
    may_be_url,
    part_hash,
    prefix_length,
    rule_of,
    suffix_length,
)
from puna.data.words.rules import (
    BASE,
    BASE_INVERSE,
    BYTES,
    CURRENCY,
    ICON,
    LETTER,
    MAX_SPECIAL_CHARS,
    PREFIX,
    SPACE,
    SUFFIX,
    Rules,
    load_rules,
)
from puna.data.words.urls import Urls

MOST_NESTED = 4
"""Inner strings that begin at one word, at most."""
_SPACE, _LETTER, _BYTES, _MIX, _MAX_KNOWN = SPACE, LETTER, BYTES, MIX, MAX_SPECIAL_CHARS
_PLAIN_OR_NOT = LETTER | ICON | PREFIX | SUFFIX | CURRENCY
_FIRST, _LAST, _SPACED, _KNOWN, _BLANK = 0, 1, 2, 3, 32


class Work(NamedTuple):
    """Room for one text; see :func:`work_for`.

    Attributes:
        powers: ``BASE**i``.
        inverses: ``BASE**-i``.
        sums: Running sums of the text's bytes.
        codes: Its code points.
        at: Byte at which each begins; one more entry.
        words: Per word its first code point, the one after its last, whether a single space
            follows, and its number among the known words of :class:`Rules` or -1.
        other: Room for three rows of words, or of matches.
        stack: Suffixes of a chunk.
        urls: First and last byte of the chunks that only the expression for URLs decides about.
        close: Running hash sums of the words side by side.
        apart: The same with a space after each.
    """

    powers: np.ndarray
    inverses: np.ndarray
    sums: np.ndarray
    codes: np.ndarray
    at: np.ndarray
    words: np.ndarray
    other: np.ndarray
    stack: np.ndarray
    urls: np.ndarray
    close: np.ndarray
    apart: np.ndarray


@kernel
def _fill_powers(powers: Array, inverses: Array, base: Int, inverse: Int) -> None:
    powers[0] = inverses[0] = np.uint64(1)
    for i in range(1, len(powers)):
        powers[i] = powers[i - 1] * base
        inverses[i] = inverses[i - 1] * inverse


def work_for(texts: Texts) -> Work:
    """Make room for the longest of some texts."""
    n = int(np.diff(texts.offsets).max(initial=0)) + 2
    # words put side by side, each with a space, may be longer than the text
    powers, inverses = np.empty(2 * n, np.uint64), np.empty(2 * n, np.uint64)
    _fill_powers(powers, inverses, BASE, BASE_INVERSE)
    return Work(
        powers, inverses, np.empty(n, np.uint64), np.empty(n, np.int32), np.empty(n, np.int64),
        np.empty((n, 4), np.int64), np.empty((3, MOST_NESTED * n), np.int64),
        np.empty((2, n), np.int64), np.empty((2, n), np.int64), np.empty(n, np.uint64),
        np.empty(n, np.uint64),
    )  # fmt: skip


@kernel
def decode(data: Array, start: Int, end: Int, work: Work) -> Int:
    """Read a text's code points and sums; return how many code points there are."""
    sums, codes, at, powers = work.sums, work.codes, work.at, work.powers
    sums[0] = np.uint64(0)
    n, i = 0, start
    for k in range(end - start):
        sums[k + 1] = sums[k] + _BYTES[data[start + k]] * powers[k]
    while i < end:
        lead = data[i]
        at[n] = i - start
        if lead < 0x80:
            codes[n] = lead
            i += 1
        elif lead < 0xE0:
            codes[n] = (np.int32(lead & 31) << 6) | (data[i + 1] & 63)
            i += 2
        elif lead < 0xF0:
            high = np.int32(lead & 15) << 12
            codes[n] = high | (np.int32(data[i + 1] & 63) << 6) | (data[i + 2] & 63)
            i += 3
        else:
            high = (np.int32(lead & 7) << 18) | (np.int32(data[i + 1] & 63) << 12)
            codes[n] = high | (np.int32(data[i + 2] & 63) << 6) | (data[i + 3] & 63)
            i += 4
        n += 1
    at[n] = end - start
    return n


@kernel
def _put(words: Array, n: Int, first: Int, last: Int) -> Int:
    words[n, _FIRST], words[n, _LAST], words[n, _SPACED] = first, last, 0
    return n + 1


@kernel
def _put_rule(starts: Array, chars: Array, words: Array, n: Int, first: Int, rule: Int) -> Int:
    for piece in range(starts[rule], starts[rule + 1]):
        n = _put(words, n, first, first + chars[piece])
        first += chars[piece]
    return n


@kernel
def _cut(
    rules: Rules, work: Work, url_keys: Array, url_values: Array, s: Int, e: Int, n: Int,
    n_urls: Int,
) -> tuple[Int, Int]:  # fmt: skip
    """Cut a chunk; return the numbers of words and of chunks that may be URLs."""
    codes, at, sums, inverses, words = work.codes, work.at, work.sums, work.inverses, work.words
    classes, keys, values, stack = (
        rules.classes, rules.special_keys, rules.special_rules, work.stack,
    )  # fmt: skip
    units, ones = rules.unit_keys, rules.unit_values
    n_suffixes, before, rule = 0, -1, rule_of(keys, values, at, s, e, sums, inverses)
    while rule < 0 and e > s and e - s != before:
        before = e - s
        pre = prefix_length(classes, codes, s, e)
        if pre:
            rule = rule_of(keys, values, at, s + pre, e, sums, inverses)
            if rule >= 0:
                n = _put(words, n, s, s + pre)
                s += pre
                break
        suf = suffix_length(classes, units, ones, codes, at, s + pre, e, sums, inverses)
        if suf:
            stack[0, n_suffixes], stack[1, n_suffixes] = e - suf, e
            n_suffixes += 1
            rule = rule_of(keys, values, at, s, e - suf, sums, inverses)
            if rule >= 0:
                e -= suf
                break
        if pre:
            n = _put(words, n, s, s + pre)
        s += pre
        e -= suf
        if pre or suf:
            rule = rule_of(keys, values, at, s, e, sums, inverses)
    if rule >= 0:
        n = _put_rule(rules.rule_starts, rules.piece_chars, words, n, s, rule)
    elif e > s:
        n, n_urls = _cut_inside(
            classes, codes, at, sums, inverses, words, url_keys, url_values, work.urls, s, e, n,
            n_urls,
        )  # fmt: skip
    for i in range(n_suffixes - 1, -1, -1):
        n = _put(words, n, stack[0, i], stack[1, i])
    return n, n_urls


@kernel
def _cut_inside(
    classes: Array, codes: Array, at: Array, sums: Array, inverses: Array, words: Array,
    url_keys: Array, url_values: Array, urls: Array, s: Int, e: Int, n: Int, n_urls: Int,
) -> tuple[Int, Int]:  # fmt: skip
    """Cut what has neither rule nor prefix nor suffix at its infixes, unless it is a URL."""
    start, i, is_checked = s, s, False
    while i < e:
        length = infix_length(classes, codes, i, s, e)
        if length == 0:
            i += 1
            continue
        if i == s:
            i += length
            continue
        if not is_checked:
            is_checked = True
            if may_be_url(classes, codes, s, e):
                is_url = look_up(url_keys, url_values, part_hash(sums, inverses, at[s], at[e]))
                if is_url < 0:
                    urls[0, n_urls], urls[1, n_urls] = at[s], at[e]
                    n_urls += 1
                elif is_url == 1:
                    break
        if i != start:
            n = _put(words, n, start, i)
        n = _put(words, n, i, i + length)
        start = i = i + length
    if start < e:
        n = _put(words, n, start, e)
    return n, n_urls


@kernel
def _find_known(
    keys: Array, ids: Array, sums: Array, inverses: Array, at: Array, words: Array, n: Int
) -> Int:
    """Number the words that occur inside inner rules; return how many there are."""
    n_known = 0
    for i in range(n):
        first, last = words[i, _FIRST], words[i, _LAST]
        known = -1
        if last - first <= _MAX_KNOWN:
            known = look_up(keys, ids, part_hash(sums, inverses, at[first], at[last]))
        words[i, _KNOWN] = known
        n_known += known >= 0
    return n_known


@kernel
def _is_change(starts: Array, chars: Array, words: Array, rule: Int, i: Int, j: Int) -> bool:
    """Tell whether a rule cuts words ``i`` to ``j`` otherwise than they are."""
    pieces = starts[rule]
    if starts[rule + 1] - pieces != j - i:
        return True
    for k in range(j - i):
        if words[i + k, _LAST] - words[i + k, _FIRST] != chars[pieces + k]:
            return True
    return False


@kernel
def _find_inner(rules: Rules, words: Array, other: Array, n: Int) -> tuple[Int, bool]:
    """Find inner strings: first and last word and rule (-1: words with a space between them).

    Returns:
        Their number, and whether any changes something.
    """
    steps, states, ends = rules.step_keys, rules.step_states, rules.state_rules
    n_found, changes = 0, False
    for i in range(n):
        if words[i, _KNOWN] < 0:
            continue
        state, has_space, j = 0, False, i
        while j < n and words[j, _KNOWN] >= 0:
            state = look_up(steps, states, np.uint64((state << 16 | words[j, _KNOWN]) + 1) * _MIX)
            if state < 0:
                break
            rule = ends[state]
            if rule >= 0:
                if has_space:
                    rule = -1
                elif not changes:
                    changes = _is_change(
                        rules.rule_starts, rules.piece_chars, words, rule, i, j + 1
                    )  # fmt: skip
                other[0, n_found], other[1, n_found], other[2, n_found] = i, j + 1, rule
                n_found += 1
            has_space = has_space or words[j, _SPACED] == 1
            j += 1
    return n_found, changes


@kernel
def _apply_inner(
    starts: Array, chars: Array, words: Array, other: Array, n: Int, n_found: Int
) -> Int:
    """Put in the inner strings: the longest first, none that overlaps an earlier one's ends."""
    keys = np.empty(n_found, np.int64)
    for k in range(n_found):
        keys[k] = ((64 - (other[1, k] - other[0, k])) << 40) | other[0, k]
    rule_at, size_at = np.full(n, -2, np.int64), np.zeros(n, np.int64)
    seen = np.zeros(n, np.bool_)
    for k in np.argsort(keys):
        i, j = other[0, k], other[1, k]
        if not seen[i] and not seen[j - 1]:
            rule_at[i], size_at[i] = other[2, k], j - i
        seen[i:j] = True
    old = words[:n].copy()
    i = m = 0
    while i < n:
        rule, size = rule_at[i], max(1, size_at[i])
        if rule >= 0:
            m = _put_rule(starts, chars, words, m, old[i, _FIRST], rule)
            words[m - 1, _SPACED] = old[i + size - 1, _SPACED]
        else:
            words[m : m + size] = old[i : i + size]
            m += size
        i += size
    return m


@kernel
def split_text(
    rules: Rules, work: Work, url_keys: Array, url_values: Array, n_codes: Int
) -> tuple[Int, Int]:
    """Split a decoded text.

    Returns:
        The number of words, white space among them, and of chunks that may be URLs but are not
        known; those have been taken for none.
    """
    n = n_urls = 0
    if n_codes == 0:
        return n, n_urls
    codes, classes, words = work.codes, rules.classes, work.words
    keys, values = rules.special_keys, rules.special_rules
    in_space = classes[codes[0]] & _SPACE != 0
    start, is_plain = 0, True
    for i in range(n_codes + 1):
        kinds = np.uint16(0) if i == n_codes else classes[codes[i]]
        is_space = not in_space if i == n_codes else kinds & _SPACE != 0
        if is_space == in_space:
            is_plain &= kinds & _PLAIN_OR_NOT == _LETTER
            continue
        if start < i:
            if in_space:
                n = _put(words, n, start, i)
            elif is_plain and (
                rule_of(keys, values, work.at, start, i, work.sums, work.inverses) < 0
            ):
                n = _put(words, n, start, i)  # letters only: there is nothing to cut
            else:
                n, n_urls = _cut(rules, work, url_keys, url_values, start, i, n, n_urls)
        if i == n_codes:
            break
        start = i
        is_plain = kinds & _PLAIN_OR_NOT == _LETTER
        if codes[i] == _BLANK:
            words[n - 1, _SPACED] = 1
            start = i + 1
        in_space = is_space
    if _find_known(rules.known_keys, rules.known_ids, work.sums, work.inverses, work.at, words, n):
        n_found, changes = _find_inner(rules, words, work.other, n)
        if changes:
            n = _apply_inner(
                rules.rule_starts, rules.piece_chars, words, work.other, n, n_found
            )  # fmt: skip
    return n, n_urls


@kernel
def _split_one(
    rules: Rules, work: Work, url_keys: Array, url_values: Array, data: Array, start: Int, end: Int
) -> tuple[Int, Int, Int]:
    n_codes = decode(data, start, end, work)
    n, n_urls = split_text(rules, work, url_keys, url_values, n_codes)
    return n_codes, n, n_urls


def split_words(text: str, urls: Urls | None = None) -> list[str]:
    """Split one text into words, white space left out: what datatrove calls its words."""
    from puna.data.kernels.buffers import texts_from

    texts, urls = texts_from([text]), urls or Urls()
    work, rules = work_for(texts), load_rules()
    while True:
        start, end = int(texts.offsets[0]), int(texts.offsets[1])
        _, n, n_urls = _split_one(rules, work, urls.keys, urls.values, texts.data, start, end)
        if not n_urls:
            break
        spans = work.urls[:, :n_urls].T.tolist()
        urls.learn({bytes(texts.data[start + a : start + b]).decode() for a, b in spans})
    words = (text[first:last].strip() for first, last in work.words[:n, :2].tolist())
    return [word for word in words if word]
