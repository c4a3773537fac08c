"""The filters of datatrove 0.10, decision for decision: Gopher quality and repetition, C4, FineWeb.

Gopher means three different things in three code bases (words, means, first occurrences); these are
datatrove's, on the words of spaCy's English tokenizer (:mod:`puna.data.words`). A document fails
with the first check that datatrove would fail it with; after the filter's name and a dot, reasons
are named as there.

Sources: ``gopher_quality_filter.py``, ``gopher_repetition_filter.py``, ``c4_filters.py`` and
``fineweb_quality_filter.py`` of https://github.com/huggingface/datatrove; Rae et al. 2021, table
A1; Raffel et al. 2020; Penedo et al. 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from puna.data.filters.base import FilterConfig, Finding, above, below, register, share
from puna.data.filters.batch import TextBatch


def _reasons(name: str, meanings: dict[str, str]) -> dict[str, str]:
    return {f"{name}.{reason}": meaning for reason, meaning in meanings.items()}


@register("gopher_quality")
class GopherQuality(FilterConfig):
    """Gopher's quality rules as datatrove implements them."""

    reasons: ClassVar[dict[str, str]] = _reasons("gopher_quality", {
        "gopher_short_doc": "fewer words than `min_words`, signs not counted",
        "gopher_long_doc": "more words than `max_words`, signs not counted",
        "gopher_below_avg_threshold": "mean word length below `min_word_length`",
        "gopher_above_avg_threshold": "mean word length above `max_word_length`",
        "gopher_too_many_hashes": "more hash signs per word than `max_symbols`",
        "gopher_too_many_ellipsis": "more ellipses per word than `max_symbols`",
        "gopher_too_many_bullets": "more lines than `max_bullet_lines` begin with a bullet",
        "gopher_too_many_end_ellipsis": "more lines than `max_ellipsis_lines` end with an ellipsis",
        "gopher_below_alpha_threshold": "fewer words than `min_alpha_words` hold a letter",
        "gopher_enough_stop_words": "fewer than `min_stop_words` of the, be, to, of, and, that, "
        "have, with",
    })  # fmt: skip
    min_words: int = Field(default=50, ge=0)
    """Smallest number of words that are not only signs."""
    max_words: int = Field(default=100_000, ge=1)
    """Largest number of words that are not only signs."""
    min_word_length: float = Field(default=3, ge=0)
    """Smallest mean number of characters of these words."""
    max_word_length: float = Field(default=10, ge=0)
    """Largest mean number of characters of these words."""
    max_symbols: float = Field(default=0.1, ge=0)
    """Largest number of hash signs, and of ellipses, per word."""
    max_bullet_lines: float = Field(default=0.9, ge=0, le=1)
    """Largest share of lines that begin with `•` or `-`."""
    max_ellipsis_lines: float = Field(default=0.3, ge=0, le=1)
    """Largest share of lines that end with an ellipsis."""
    min_alpha_words: float = Field(default=0.8, ge=0, le=1)
    """Smallest share of words with a letter."""
    min_stop_words: int = Field(default=2, ge=0, le=8)
    """Smallest number of different stop words."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare in datatrove's order."""
        words, real = docs["dt_n_words"], docs["dt_n_real_words"]
        lines = docs["dt_n_lines"]
        yield below("gopher_quality.gopher_short_doc", real, self.min_words)
        yield above("gopher_quality.gopher_long_doc", real, self.max_words)
        mean = share(docs["dt_n_real_chars"], real)
        yield below("gopher_quality.gopher_below_avg_threshold", mean, self.min_word_length)
        yield above("gopher_quality.gopher_above_avg_threshold", mean, self.max_word_length)
        hashes, ellipses = share(docs["dt_n_hashes"], words), share(docs["dt_n_ellipses"], words)
        yield above("gopher_quality.gopher_too_many_hashes", hashes, self.max_symbols)
        yield above("gopher_quality.gopher_too_many_ellipsis", ellipses, self.max_symbols)
        bullets = share(docs["dt_n_bullet_lines"], lines)
        yield above("gopher_quality.gopher_too_many_bullets", bullets, self.max_bullet_lines)
        ended = share(docs["dt_n_ellipsis_lines"], lines)
        yield above("gopher_quality.gopher_too_many_end_ellipsis", ended, self.max_ellipsis_lines)
        alpha = share(docs["dt_n_letter_words"], words)
        yield below("gopher_quality.gopher_below_alpha_threshold", alpha, self.min_alpha_words)
        yield below(
            "gopher_quality.gopher_enough_stop_words", docs["dt_n_stop_words"], self.min_stop_words
        )


@register("gopher_repetition")
class GopherRepetition(FilterConfig):
    """Gopher's repetition rules as datatrove implements them."""

    reasons: ClassVar[dict[str, str]] = _reasons("gopher_repetition", {
        "empty": "no text",
        "dup_para_frac": "share of paragraphs that occurred before",
        "dup_para_char_frac": "share of characters in repeated paragraphs",
        "dup_line_frac": "share of lines that occurred before",
        "dup_line_char_frac": "share of characters in repeated lines",
        **{f"top_{n}_gram": f"share of characters in the top {n}-gram"
           for n in range(2, 5)},
        **{f"duplicated_{n}_n_grams": f"share of characters in repeated {n}-grams"
           for n in range(5, 11)},
    })  # fmt: skip
    dup_lines: float = Field(default=0.3, ge=0, le=1)
    """Largest share of repeated lines."""
    dup_paragraphs: float = Field(default=0.3, ge=0, le=1)
    """Largest share of repeated paragraphs."""
    dup_line_chars: float = Field(default=0.2, ge=0, le=1)
    """Largest share of characters in repeated lines."""
    dup_paragraph_chars: float = Field(default=0.2, ge=0, le=1)
    """Largest share of characters in repeated paragraphs."""
    top_ngrams: tuple[float, float, float] = (0.2, 0.18, 0.16)
    """Largest shares of characters in the most frequent 2-, 3- and 4-gram."""
    dup_ngrams: tuple[float, float, float, float, float, float] = (
        0.15, 0.14, 0.13, 0.12, 0.11, 0.10,
    )  # fmt: skip
    """Largest shares of characters in repeated 5- to 10-grams."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare in datatrove's order."""
        chars = docs["dt_n_chars"]
        yield below("gopher_repetition.empty", chars, 1)
        for name, part, whole, limit in (
            ("dup_para_frac", "dup_paragraphs", "n_paragraphs", self.dup_paragraphs),
            ("dup_para_char_frac", "dup_paragraph_chars", "n_chars", self.dup_paragraph_chars),
            ("dup_line_frac", "dup_lines", "n_line_parts", self.dup_lines),
            ("dup_line_char_frac", "dup_line_chars", "n_chars", self.dup_line_chars),
        ):
            found = share(docs[f"dt_{part}"], docs[f"dt_{whole}"])
            yield above(f"gopher_repetition.{name}", found, limit)
        for n, limit in zip(range(2, 5), self.top_ngrams, strict=True):
            found = share(docs[f"dt_top_{n}gram_chars"], chars)
            yield above(f"gopher_repetition.top_{n}_gram", found, limit)
        for n, limit in zip(range(5, 11), self.dup_ngrams, strict=True):
            found = share(docs[f"dt_dup_{n}gram_chars"], chars)
            yield above(f"gopher_repetition.duplicated_{n}_n_grams", found, limit)


@register("fineweb_quality")
class FineWebQuality(FilterConfig):
    """FineWeb's additional rules as datatrove implements them."""

    reasons: ClassVar[dict[str, str]] = _reasons("fineweb_quality", {
        "empty": "no line that is not blank",
        "line_punct_ratio": "fewer lines than `min_ended_lines` end with a full stop or "
        "the like",
        "short_line_ratio": "more lines than `max_short_lines` have at most 30 "
        "characters",
        "char_dup_ratio": "share of characters in repeated lines above `max_dup_chars`",
        "list_ratio": "more newlines per word than `max_newlines`",
    })  # fmt: skip
    min_ended_lines: float = Field(default=0.12, ge=0, le=1)
    """Smallest share of lines that end with terminal punctuation."""
    max_short_lines: float = Field(default=0.67, ge=0, le=1)
    """Largest share of lines of at most 30 characters."""
    max_dup_chars: float = Field(default=0.01, ge=0, le=1)
    """Largest share of characters in repeated lines."""
    max_newlines: float = Field(default=0.3, ge=0)
    """Largest number of newlines per word."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare in datatrove's order."""
        lines, newlines = docs["dt_n_full_lines"], docs["dt_n_newlines"]
        yield below("fineweb_quality.empty", lines, 1)
        ended = share(docs["dt_n_ended_lines"], lines)
        yield below("fineweb_quality.line_punct_ratio", ended, self.min_ended_lines)
        short = share(docs["dt_n_short_lines"], lines)
        yield above("fineweb_quality.short_line_ratio", short, self.max_short_lines)
        repeated = share(docs["dt_n_repeated_line_chars"], docs["dt_n_chars"] - newlines)
        yield above("fineweb_quality.char_dup_ratio", repeated, self.max_dup_chars)
        per_word = share(newlines, docs["dt_n_words"])
        yield above("fineweb_quality.list_ratio", per_word, self.max_newlines)
