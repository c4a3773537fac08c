"""Gopher's rules as dolma tags and mixes them for Common Crawl (Soldaini et al. 2024).

The measures are those of ``gopher_v1`` in ``python/dolma/taggers/gopher.py``, the limits those of
``configs/dolma-v1_5/mixing/cc-middle.yaml`` of https://github.com/allenai/dolma. That configuration
asks for the most common n-grams by names that the tagger does not give (``2gram`` for ``2grams``),
so that its limits on them had no effect; here they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from puna.data.filters.base import FilterConfig, Finding, above, below, register, share
from puna.data.filters.batch import TextBatch

_NAMES = (
    *(f"fraction_of_characters_in_most_common_{n}grams" for n in range(2, 5)),
    *(f"fraction_of_characters_in_duplicate_{n}grams" for n in range(5, 11)),
)


@register("dolma_gopher")
class DolmaGopher(FilterConfig):
    """Gopher's rules on words between white space, as dolma applies them."""

    reasons: ClassVar[dict[str, str]] = {
        f"dolma_gopher.{name}": meaning
        for name, meaning in (
            ("word_count", "fewer words than `min_words` or more than `max_words`"),
            ("median_word_length", "median word length outside the limits"),
            ("symbol_to_word_ratio", "more words with `#` or `…` than `max_symbols`"),
            ("fraction_of_words_with_alpha_character", "fewer words with a letter than the limit"),
            ("required_word_count", "fewer than `min_required_words` of the, be, to, of, and, "
             "that, have, with; repeats counted"),
            ("fraction_of_lines_starting_with_bullet_point", "too many lines begin with * or -"),
            ("fraction_of_lines_ending_with_ellipsis", "too many lines end with …"),
            ("fraction_of_duplicate_lines", "share of lines that occur more than once"),
            ("fraction_of_characters_in_duplicate_lines", "characters of such lines, by those of "
             "all words"),
            *((name, name.replace("_", " ")) for name in _NAMES),
        )
    }  # fmt: skip
    min_words: int = Field(default=50, ge=0)
    """Smallest number of words."""
    max_words: int = Field(default=100_000, ge=1)
    """Largest number of words."""
    min_median_length: float = Field(default=3, ge=0)
    """Smallest median of the numbers of characters of words."""
    max_median_length: float = Field(default=10, ge=0)
    """Largest median of the numbers of characters of words."""
    max_symbols: float = Field(default=0.1, ge=0)
    """Largest share of words with `#` or `…`."""
    min_alpha_words: float = Field(default=0.8, ge=0, le=1)
    """Smallest share of words with a letter."""
    min_required_words: int = Field(default=2, ge=0)
    """Smallest number of stop words, repeats counted."""
    max_bullet_lines: float = Field(default=0.9, ge=0, le=1)
    """Largest share of lines that begin with `*` or `-`."""
    max_ellipsis_lines: float = Field(default=0.3, ge=0, le=1)
    """Largest share of lines that end with `…`."""
    max_dup_lines: float = Field(default=0.3, ge=0, le=1)
    """Largest share of lines that occur more than once."""
    max_dup_line_chars: float = Field(default=0.3, ge=0)
    """Largest share of their characters."""
    top_ngrams: tuple[float, float, float] = (0.2, 0.18, 0.16)
    """Largest shares of characters in the most frequent 2-, 3- and 4-gram."""
    dup_ngrams: tuple[float, float, float, float, float, float] = (
        0.15, 0.14, 0.13, 0.12, 0.11, 0.10,
    )  # fmt: skip
    """Largest shares of characters in 5- to 10-grams that occur more than once."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare in the order of the configuration."""
        words, chars, lines = docs["dolma_words"], docs["dolma_chars"], docs["dolma_lines"]
        name = "dolma_gopher."
        yield below(f"{name}word_count", words, self.min_words)
        yield above(f"{name}word_count", words, self.max_words)
        median = (docs["dolma_low_median"] + docs["dolma_high_median"]) / 2
        yield below(f"{name}median_word_length", median, self.min_median_length)
        yield above(f"{name}median_word_length", median, self.max_median_length)
        symbols = share(docs["dolma_symbol_words"], words)
        yield above(f"{name}symbol_to_word_ratio", symbols, self.max_symbols)
        alpha = share(docs["dolma_alpha_words"], words)
        yield below(f"{name}fraction_of_words_with_alpha_character", alpha, self.min_alpha_words)
        required = docs["dolma_required_words"]
        yield below(f"{name}required_word_count", required, self.min_required_words)
        for check, part, whole, limit in (
            ("lines_starting_with_bullet_point", "bullet_lines", lines, self.max_bullet_lines),
            ("lines_ending_with_ellipsis", "ellipsis_lines", lines, self.max_ellipsis_lines),
            ("duplicate_lines", "dup_lines", lines, self.max_dup_lines),
            ("characters_in_duplicate_lines", "dup_line_chars", chars, self.max_dup_line_chars),
        ):
            found = share(docs[f"dolma_{part}"], whole)
            yield above(f"{name}fraction_of_{check}", found, limit)
        for n, limit in zip(range(2, 5), self.top_ngrams, strict=True):
            found = share(docs[f"dolma_top_{n}grams"], chars)
            yield above(name + _NAMES[n - 2], found, limit)
        for n, limit in zip(range(5, 11), self.dup_ngrams, strict=True):
            found = share(docs[f"dolma_dup_{n}grams"], docs[f"dolma_all_{n}grams"])
            yield above(name + _NAMES[n - 2], found, limit)
