"""The built-in filters. Each default names its source; *ours* marks a threshold of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from pydantic import Field

from puna.data.filters.base import FilterConfig, Finding, above, below, register
from puna.data.filters.batch import TextBatch


@register("nontext")
class NonText(FilterConfig):
    """Control characters, private use and U+FFFD: binary content or a failed decoding."""

    reasons: ClassVar[dict[str, str]] = {
        "nontext": "too many control, private-use or replacement characters"
    }
    max: float = Field(default=0.005, ge=0, le=1)
    """Largest share of such characters (ours)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the share of characters that are no text."""
        yield above("nontext", docs["nontext_share"], self.max)


@register("length")
class Length(FilterConfig):
    """Number of characters."""

    reasons: ClassVar[dict[str, str]] = {
        "length.short": "fewer characters than `min`",
        "length.long": "more characters than `max`",
    }
    min: int = Field(default=200, ge=0)
    """Smallest number of characters (ours)."""
    max: int = Field(default=1_000_000, ge=1)
    """Largest number of characters (The Stack, Kocetkov et al. 2022: files up to 1 MB)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the number of code points."""
        yield below("length.short", docs["n_chars"], self.min)
        yield above("length.long", docs["n_chars"], self.max)


@register("words")
class Words(FilterConfig):
    """Number of words (only in scripts that write spaces between words)."""

    reasons: ClassVar[dict[str, str]] = {
        "words.few": "fewer words than `min`",
        "words.many": "more words than `max`",
    }
    min: int = Field(default=50, ge=0)
    """Smallest number of words (Gopher, Rae et al. 2021)."""
    max: int = Field(default=100_000, ge=1)
    """Largest number of words (Gopher)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the number of words."""
        yield below("words.few", docs["n_words"], self.min, where=docs.spaced)
        yield above("words.many", docs["n_words"], self.max)


@register("word_length")
class WordLength(FilterConfig):
    """Mean length of words (only in scripts that write spaces between words)."""

    reasons: ClassVar[dict[str, str]] = {
        "word_length.short": "mean word length below `min`",
        "word_length.long": "mean word length above `max`",
    }
    min: float = Field(default=3.0, ge=0)
    """Smallest mean number of characters per word (Gopher)."""
    max: float = Field(default=10.0, ge=0)
    """Largest mean number of characters per word (Gopher)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the mean number of code points per word."""
        spaced = docs.spaced
        yield below("word_length.short", docs["mean_word_chars"], self.min, where=spaced)
        yield above("word_length.long", docs["mean_word_chars"], self.max, where=spaced)


@register("symbols")
class Symbols(FilterConfig):
    """Hash signs and ellipses per word."""

    reasons: ClassVar[dict[str, str]] = {
        "symbols.hash": "too many hash signs per word",
        "symbols.ellipsis": "too many ellipses per word",
    }
    max: float = Field(default=0.1, ge=0)
    """Largest number per word, for each of the two symbols (Gopher)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare symbols per word."""
        spaced = docs.spaced
        yield above("symbols.hash", docs["hashes_per_word"], self.max, where=spaced)
        yield above("symbols.ellipsis", docs["ellipses_per_word"], self.max, where=spaced)


@register("bullet_lines")
class BulletLines(FilterConfig):
    """Lines that begin with a bullet (``-``, ``*`` or ``•``)."""

    reasons: ClassVar[dict[str, str]] = {"bullet_lines": "too many lines begin with a bullet"}
    max: float = Field(default=0.9, ge=0, le=1)
    """Largest share of lines that are not blank (Gopher)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the share of bullet lines."""
        yield above("bullet_lines", docs["bullet_line_share"], self.max)


@register("ellipsis_lines")
class EllipsisLines(FilterConfig):
    """Lines that end with an ellipsis."""

    reasons: ClassVar[dict[str, str]] = {"ellipsis_lines": "too many lines end with an ellipsis"}
    max: float = Field(default=0.3, ge=0, le=1)
    """Largest share of lines that are not blank (Gopher)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the share of lines with an ellipsis at the end."""
        yield above("ellipsis_lines", docs["ellipsis_line_share"], self.max)


@register("alpha_words")
class AlphaWords(FilterConfig):
    """Words with at least one letter (only in scripts that write spaces between words)."""

    reasons: ClassVar[dict[str, str]] = {"alpha_words": "too few words hold a letter"}
    min: float = Field(default=0.8, ge=0, le=1)
    """Smallest share of words (Gopher)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the share of words with a letter."""
        yield below("alpha_words", docs["alpha_word_share"], self.min, where=docs.spaced)


@register("repetition")
class Repetition(FilterConfig):
    """Repeated lines, paragraphs and word sequences (Gopher, table A1 of Rae et al. 2021).

    How the shares are measured: :mod:`puna.data.kernels.repetition`. A limit of 1 turns a check
    off. Word sequences are checked only in scripts that write spaces between words.
    """

    reasons: ClassVar[dict[str, str]] = {
        "repetition.dup_line_share": "share of lines that occurred before",
        "repetition.dup_line_char_share": "share of characters in lines that occurred before",
        "repetition.dup_paragraph_share": "share of paragraphs that occurred before",
        "repetition.dup_paragraph_char_share": "share of characters in repeated paragraphs",
        **{f"repetition.top_{n}gram_share": f"share of characters in the top {n}-gram"
           for n in range(2, 5)},
        **{f"repetition.dup_{n}gram_share": f"share of characters in repeated {n}-grams"
           for n in range(5, 11)},
    }  # fmt: skip
    dup_line_share: float = Field(default=0.30, ge=0, le=1)
    """Largest share of repeated lines (Gopher)."""
    dup_line_char_share: float = Field(default=0.20, ge=0, le=1)
    """Largest share of characters in repeated lines (Gopher)."""
    dup_paragraph_share: float = Field(default=0.30, ge=0, le=1)
    """Largest share of repeated paragraphs (Gopher)."""
    dup_paragraph_char_share: float = Field(default=0.20, ge=0, le=1)
    """Largest share of characters in repeated paragraphs (Gopher)."""
    top_ngram_shares: tuple[float, ...] = Field(
        default=(0.20, 0.18, 0.16), min_length=3, max_length=3
    )
    """Largest shares of characters in the most frequent 2-, 3- and 4-gram (Gopher)."""
    dup_ngram_shares: tuple[float, ...] = Field(
        default=(0.15, 0.14, 0.13, 0.12, 0.11, 0.10), min_length=6, max_length=6
    )
    """Largest shares of characters in repeated 5- to 10-grams (Gopher)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the thirteen shares in the order of Gopher's table."""
        for name in ("dup_line_share", "dup_paragraph_share", "dup_line_char_share",
                     "dup_paragraph_char_share"):  # fmt: skip
            yield above(f"repetition.{name}", docs[name], getattr(self, name))
        spaced = docs.spaced
        grams = [f"top_{n}gram_share" for n in range(2, 5)]
        grams += [f"dup_{n}gram_share" for n in range(5, 11)]
        limits = (*self.top_ngram_shares, *self.dup_ngram_shares)
        for name, limit in zip(grams, limits, strict=True):
            yield above(f"repetition.{name}", docs[name], limit, where=spaced)


@register("data_like")
class DataLike(FilterConfig):
    """Tables of numbers, hex and base64: data, not language.

    A word counts as data if it holds a digit and otherwise only hex digits, ``x``, ``u``, ``L`` and
    punctuation, or if it is a run of 64 or more base64 characters (StarCoder2, Lozhkov et al. 2024,
    drops files in which encoded data makes up more than half).
    """

    reasons: ClassVar[dict[str, str]] = {"data_like": "most of the text is numbers, hex or base64"}
    max: float = Field(default=0.5, ge=0, le=1)
    """Largest share of bytes that are not white space (StarCoder2)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the share of bytes in data-like words."""
        yield above("data_like", docs["data_share"], self.max)


GENERATED_PHRASES = (
    "auto-generated", "autogenerated", "automatically generated", "generated automatically",
    "this file is generated", "this file was generated", "machine generated", "do not edit",
    "generated by the protocol buffer compiler", "generated from an openapi",
)  # fmt: skip


@register("generated")
class Generated(FilterConfig):
    """Files that say at the top that a program wrote them (after The Stack and CodeParrot)."""

    reasons: ClassVar[dict[str, str]] = {
        "generated": "a phrase at the top says that the file is generated"
    }
    phrases: tuple[str, ...] = Field(default=GENERATED_PHRASES, min_length=1)
    """Phrases to look for, letter case ignored."""
    head_bytes: int = Field(default=1000, ge=1)
    """Only this many bytes at the top are looked at (ours)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Fail where a phrase is found; the value is the position where it ends."""
        position = docs.phrases(self.phrases, self.head_bytes)[:, 2].astype(np.float64)
        yield Finding("generated", position, float(self.head_bytes), position >= 0)


LICENCE_PHRASES = (
    "is hereby granted", "permission to use, copy, modify", "without warranty of any kind",
    "without any warranty",
    "redistribution and use in source", "redistributions of source code",
    "redistributions in binary form", "licensed under the", "all rights reserved",
    "copyright (c)", "copyright ©", "apache license", "gnu general public license",
    "gnu lesser general public", "mozilla public license", "spdx-license-identifier",
    "provided by the copyright holders", "in no event shall", "merchantability",
    "this software is provided", "terms and conditions", "permission notice shall be included",
    "granted to you under this license", "the licensor", "this license",
)  # fmt: skip


@register("licence")
class Licence(FilterConfig):
    """Licence texts and files that are little more than a licence header.

    A block is a run of lines that hold letters or digits; a block with one of the phrases counts
    as licence.
    """

    reasons: ClassVar[dict[str, str]] = {"licence": "most of the text is licence boilerplate"}
    phrases: tuple[str, ...] = Field(default=LICENCE_PHRASES, min_length=1)
    """Phrases that mark a block, letter case ignored (ours)."""
    max: float = Field(default=0.5, ge=0, le=1)
    """Largest share of bytes in such blocks (ours)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the share of bytes in blocks with a phrase."""
        rows = docs.phrases(self.phrases)
        yield above("licence", rows[:, 1] / np.maximum(rows[:, 0], 1), self.max)


@register("language")
class Language(FilterConfig):
    """Languages to keep, decided on the first kilobyte."""

    reasons: ClassVar[dict[str, str]] = {
        "language.other": "not in one of `languages` (the detail names the language)",
        "language.unsure": "language known with less confidence than `min_confidence`",
    }
    languages: tuple[str, ...] = ()
    """ISO 639 codes to keep; empty keeps all."""
    min_confidence: float = Field(default=0.0, ge=0, le=1)
    """Smallest confidence of the decision (ours: 0 accepts any)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the language with the list; the value is the confidence of the decision."""
        codes, confidence = docs.languages()
        allowed = frozenset(self.languages)
        other = np.array([bool(allowed) and code not in allowed for code in codes], bool)
        yield Finding("language.other", confidence, self.min_confidence, other, codes)
        unsure = confidence < self.min_confidence
        yield Finding("language.unsure", confidence, self.min_confidence, unsure, codes)


@register("stop_words")
class StopWords(FilterConfig):
    """English texts without the most common English words: lists, menus, word salad."""

    reasons: ClassVar[dict[str, str]] = {
        "stop_words": "too few of the, be, to, of, and, that, have, with"
    }
    min: int = Field(default=2, ge=0, le=8)
    """Smallest number of different ones of the eight (Gopher)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the number of different stop words, in texts found to be English."""
        where = docs.in_language("en")
        yield below("stop_words", docs["n_stop_words"], self.min, where=where)


@register("lines")
class Lines(FilterConfig):
    """Lengths of lines: minified code, data in one line."""

    reasons: ClassVar[dict[str, str]] = {
        "lines.mean": "mean line length above `max_mean`",
        "lines.longest": "a line is longer than `max`",
    }
    max_mean: float = Field(default=100.0, ge=1)
    """Largest mean number of characters per line (Codex, Chen et al. 2021; The Stack)."""
    max: int = Field(default=1000, ge=1)
    """Largest number of characters in a line (Codex; The Stack)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare mean and longest line."""
        yield above("lines.mean", docs["mean_line_chars"], self.max_mean)
        yield above("lines.longest", docs["max_line_chars"], self.max)


@register("alnum")
class Alnum(FilterConfig):
    """Shares of letters and of letters and digits."""

    reasons: ClassVar[dict[str, str]] = {
        "alnum.share": "too few letters and digits",
        "alnum.letters": "too few letters",
    }
    min: float = Field(default=0.25, ge=0, le=1)
    """Smallest share of letters and digits (The Stack; Codex: "small fraction of alphanumeric")."""
    min_letters: float = Field(default=0.25, ge=0, le=1)
    """Smallest share of letters (StarCoder, Li et al. 2023)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the two shares of all characters."""
        yield below("alnum.share", docs["alnum_share"], self.min)
        yield below("alnum.letters", docs["alpha_share"], self.min_letters)
