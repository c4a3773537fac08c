"""RefinedWeb's rules as dclm publishes them for DCLM-Baseline, decision for decision.

Addresses are cut out of the text, Gopher's rules judge it, then lines that are no prose (capitals,
numbers, counters, single words, "items in cart") are cut out, and a document that loses too much by
this is dropped. The text of what is kept is what is left.

Sources: Penedo et al. 2023 (RefinedWeb), Li et al. 2024 (DCLM);
``baselines/baselines_configs/dclm_baseline_refinedweb.yaml`` and ``baselines/mappers`` of
https://github.com/mlfoundations/dclm at 361714b. Not here: its lists of URLs (``data.safety``
blocks domains) and its language model (filter ``language``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from puna.core.errors import PunaError
from puna.data.filters.base import FilterConfig, Finding, above, below, register, share
from puna.data.filters.batch import TextBatch
from puna.data.safety.lists import read_list

_NEWLINES = re.compile(r"\n{3,}")
_IP_HINT = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_IP = re.compile(
    r"\s{0,10}\b((https?|ftp)://)?(?:[0-2]?[0-9]{1,2}\.){3}[0-2]?[0-9]{1,2}"
    r"[-a-zA-Z0-9()@:%_+.~#?&/=]*"
)
_COUNTED = "likes|shares|comments|retweets|reposts|quotes|bookmarks|upvotes|downvotes|downloads"
_COUNTED += "|views|followers"
_COUNTER_HINT = re.compile(rf"\d[\d,.]*[kmb]?\s+(?:{_COUNTED})", re.IGNORECASE)
_COUNTER = re.compile(rf"^\W*\d[\d,.]*[kmb]?\s+(?:{_COUNTED})\W*$")
_PHRASES = (
    re.compile(r"\s?items in cart", re.IGNORECASE),
    re.compile(r"\s?read more...$", re.IGNORECASE),  # any three characters, as there
    re.compile(r"^sign-in\s?", re.IGNORECASE),
)
_PHRASE_HINT = re.compile(r"items in cart|read more|sign-in", re.IGNORECASE)
_PHRASE_WORDS = ("items in cart", "read more", "sign-in")
_SEGMENTS = (
    ("line_share", "dup_lines", "lines"),
    ("paragraph_share", "dup_paragraphs", "paragraphs"),
    ("line_char_share", "dup_line_chars", "line_chars"),
    ("paragraph_char_share", "dup_paragraph_chars", "paragraph_chars"),
)
"""In the order of ``massive_web_repetition_filters``."""


@cache
def _patterns(tlds: Path) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Compile what a text must begin with, what it must hold, and what is cut out."""
    names = [line.strip() for line in read_list(tlds, "list of top-level domains", "tlds")]
    if not names:
        raise PunaError(f"{tlds} names no top-level domain", "give a file with one name per line")
    # names with a hyphen are escaped twice there and never match
    any_of = "|".join(sorted((name for name in names if name.isalnum()), key=len, reverse=True))
    address = (
        rf"\s{{0,10}}(?:((https?|ftp)://))?[-a-zA-Z0-9@:%._+~#=]{{1,256}}\.(?:{any_of})\b"
        r"[-a-zA-Z0-9()@:%_+.~#?&/=]*"
    )
    begins = re.compile(f"(?:{any_of})", re.IGNORECASE)
    return begins, re.compile(rf"\.(?:{any_of})\b"), re.compile(address)


@register("refinedweb")
class RefinedWeb(FilterConfig):
    """RefinedWeb's rules for English pages as dclm implements them; rewrites what it keeps."""

    rewrites: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {
        f"refinedweb.{name}": meaning
        for name, meaning in (
            ("page_length", "fewer words than `min_words` or more than `max_words`, signs not "
             "counted"),
            ("word_length", "mean word length outside the limits"),
            ("symbol_ratio", "more `#` and ellipses per word than `max_symbols`"),
            ("bullet_count", "more lines than `max_bullet_lines` begin with a bullet"),
            ("ellipsis_count", "more lines than `max_ellipsis_lines` end with an ellipsis"),
            ("alphabetic_word_ratio", "more words than `max_letterless_words` hold no letter"),
            ("stop_word", "fewer than `min_stop_words` of the, be, to, of, and, that, have, with; "
             "repeats counted"),
            ("line_share", "share of lines that occur more than once"),
            ("paragraph_share", "share of paragraphs that occur more than once"),
            ("line_char_share", "share of characters in such lines"),
            ("paragraph_char_share", "share of characters in such paragraphs"),
            *((f"top_{n}_gram", f"share of characters in the top {n}-gram") for n in range(2, 5)),
            *((f"duplicated_{n}_grams", f"share of characters in repeated {n}-grams")
              for n in range(5, 11)),
            ("emptied", "no text is left after addresses or lines were cut out"),
            ("word_removal_ratio", "more of the words than `max_removed` were in lines that were "
             "cut out"),
        )
    }  # fmt: skip
    tlds: Path | None = None
    """File of top-level domains, one per line (IANA publishes the list). With it addresses are cut
    out where dclm does it: in texts that begin with the name of a top-level domain. IP addresses
    are cut out always."""
    min_words: int = Field(default=50, ge=0)
    """Smallest number of words that begin with a letter or digit."""
    max_words: int = Field(default=100_000, ge=1)
    """Largest number of such words."""
    min_word_length: float = Field(default=3, ge=0)
    """Smallest mean number of characters per word."""
    max_word_length: float = Field(default=10, ge=0)
    """Largest mean number of characters per word."""
    max_symbols: float = Field(default=0.1, ge=0)
    """Largest number of `#`, `...`, `. . .` and `…` per word."""
    max_bullet_lines: float = Field(default=0.9, ge=0, le=1)
    """Largest share of lines that begin with `●`, `•`, `*` or `-`."""
    max_ellipsis_lines: float = Field(default=0.3, ge=0, le=1)
    """Largest share of lines that end with an ellipsis."""
    max_letterless_words: float = Field(default=0.2, ge=0, le=1)
    """Largest share of words without a letter."""
    min_stop_words: int = Field(default=2, ge=0)
    """Smallest number of stop words, repeats counted."""
    max_segments: tuple[float, float, float, float] = (0.3, 0.3, 0.2, 0.2)
    """Largest shares of repeated lines, paragraphs, and of characters in these."""
    top_ngrams: tuple[float, float, float] = (0.2, 0.18, 0.16)
    """Largest shares of characters in the most frequent 2-, 3- and 4-gram."""
    dup_ngrams: tuple[float, float, float, float, float, float] = (
        0.15, 0.14, 0.13, 0.12, 0.11, 0.10,
    )  # fmt: skip
    """Largest shares of characters in repeated 5- to 10-grams."""
    max_line_capitals: float = Field(default=0.5, ge=0, le=1)
    """Lines with a larger share of capitals are cut out."""
    max_line_digits: float = Field(default=0.999999, ge=0, le=1)
    """Lines with a larger share of digits are cut out."""
    min_line_words: int = Field(default=2, ge=0, le=2)
    """Lines of fewer words are cut out."""
    max_removed: float = Field(default=0.05, ge=0, le=1)
    """Largest share of the words that may be cut out."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Cut out addresses, compare, cut out lines, compare what is left."""
        new = [
            self._without_addresses(text) if is_alive else ""
            for text, is_alive in zip(docs.strings(), docs.alive.tolist(), strict=True)
        ]
        docs.replace(new)
        empty = np.array([not text for text in new], bool)
        yield Finding("refinedweb.emptied", (~empty).astype(np.float64), 1.0, empty)
        yield from self._quality(docs)
        yield from self._repetition(docs)
        flags = zip(
            (docs["dclm_capital_lines"] > 1000 * self.max_line_capitals).tolist(),
            (docs["dclm_digit_lines"] > 1000 * self.max_line_digits).tolist(),
            docs["dclm_short_lines"].astype(bool).tolist(),
            strict=True,
        )
        before, old = docs["dclm_tokens"], docs.strings()
        cut = [
            self._cut_lines(text, *flag) if is_alive else text
            for text, flag, is_alive in zip(old, flags, docs.alive.tolist(), strict=True)
        ]
        docs.replace(cut)
        empty = np.array([not text for text in cut], bool)
        yield Finding("refinedweb.emptied", (~empty).astype(np.float64), 1.0, empty)
        yield self._removal(docs, before, np.array([a != b for a, b in zip(old, cut, strict=True)]))

    def _without_addresses(self, text: str) -> str:
        if self.tlds is not None and "." in text:
            begins, holds, address = _patterns(self.tlds)
            if begins.match(text) and holds.search(text):
                text = address.sub("", text)
        if _IP_HINT.search(text):
            text = _IP.sub("", text)
        return _NEWLINES.sub("\n\n", text) if "\n\n\n" in text else text

    def _quality(self, docs: TextBatch) -> Iterator[Finding]:
        name, words, lines = "refinedweb.", docs["dclm_words"], docs["dclm_lines"]
        yield below(f"{name}page_length", docs["dclm_tokens"], self.min_words)
        yield above(f"{name}page_length", docs["dclm_tokens"], self.max_words)
        mean = share(docs["dclm_word_chars"], words)
        yield below(f"{name}word_length", mean, self.min_word_length)
        yield above(f"{name}word_length", mean, self.max_word_length)
        yield above(f"{name}symbol_ratio", share(docs["dclm_symbols"], words), self.max_symbols)
        for check, count, limit in (
            ("bullet_count", docs["dclm_bullet_lines"], self.max_bullet_lines),
            ("ellipsis_count", docs["dclm_ellipsis_lines"], self.max_ellipsis_lines),
        ):
            # multiplied, as there: a division rounds otherwise
            yield Finding(name + check, share(count, lines), limit, count > limit * lines)
        letterless = share(docs["dclm_letterless_words"], words)
        yield above(f"{name}alphabetic_word_ratio", letterless, self.max_letterless_words)
        yield below(f"{name}stop_word", docs["dclm_stop_words"], self.min_stop_words)

    def _repetition(self, docs: TextBatch) -> Iterator[Finding]:
        for (check, part, whole), limit in zip(_SEGMENTS, self.max_segments, strict=True):
            found = share(docs[f"dclm_{part}"], docs[f"dclm_{whole}"])
            yield above(f"refinedweb.{check}", found, limit)
        chars = docs["dclm_gram_chars"]
        for n, limit in zip(range(2, 5), self.top_ngrams, strict=True):
            yield above(f"refinedweb.top_{n}_gram", share(docs[f"dclm_top_{n}grams"], chars), limit)
        for n, limit in zip(range(5, 11), self.dup_ngrams, strict=True):
            found = share(docs[f"dclm_dup_{n}grams"], chars)
            yield above(f"refinedweb.duplicated_{n}_grams", found, limit)

    def _removal(self, docs: TextBatch, before: np.ndarray, changed: np.ndarray) -> Finding:
        from puna.data.words.dclm import count_tokens

        changed &= docs.alive
        after = np.where(changed, count_tokens(docs.texts, changed), before)
        return above("refinedweb.word_removal_ratio", share(before - after, before),
                     self.max_removed)  # fmt: skip

    def _cut_lines(self, text: str, capitals: bool, digits: bool, short: bool) -> str:
        """Return the lines to keep; the flags tell whether there may be such lines."""
        if capitals:
            text = _keep(text, lambda line: _count(str.isupper, line) <= self.max_line_capitals)
        text = text.strip()
        if digits:
            text = _keep(text, lambda line: _count(str.isdigit, line) <= self.max_line_digits)
        text = text.strip()
        if _may_hold(text, _COUNTED.split("|"), _COUNTER_HINT):
            text = _keep(text, lambda line: not _COUNTER.search(line.lower()))
        text = text.strip()
        if short and self.min_line_words:
            least = self.min_line_words
            text = _keep(text, lambda line: not line or len(line.split(None, least)) >= least)
        if _may_hold(text, _PHRASE_WORDS, _PHRASE_HINT):
            for phrase in _PHRASES:
                text = _without_phrase(text, phrase)
        return text.strip()


def _may_hold(text: str, words: Iterable[str], hint: re.Pattern[str]) -> bool:
    """Tell whether an expression that asks for one of some words has to be tried; fast on ASCII."""
    if not text.isascii():
        return hint.search(text) is not None
    lower = text.lower()
    return any(word in lower for word in words)


def _count(kind: Callable[[str], bool], line: str) -> float:
    """Return the share of characters of a kind; 0 of an empty line."""
    return sum(map(kind, line)) / len(line) if line else 0.0


def _keep(text: str, is_kept: Callable[[str], bool]) -> str:
    return "\n".join(filter(is_kept, text.split("\n")))


def _without_phrase(text: str, phrase: re.Pattern[str]) -> str:
    """Cut a phrase out of lines of at most ten words, and the lines that hold nothing else."""
    kept = []
    for line in text.split("\n"):
        left = line
        if len(line.split()) <= 10:
            left = phrase.sub("", line)
            if line and not left.strip():
                continue
        kept.append(left)
    return "\n".join(kept).strip()
