"""RedPajama-V2's quality signals, by their names there; as a filter, with limits on any of them.

Every signal is measured and shown by ``puna data label`` and ``puna data try``; only those with a
limit drop documents. The default limits are those of the example in the data set's card, after
Gopher. Signals of a line are averaged over the lines of the document, lines as long as others.

Not here: signals that need the models of RedPajama or of CCNet (``ccnet_*``, ``*_importance``,
``rps_doc_ml_*``), and ``rps_doc_ut1_blacklist`` (``data.safety`` blocks domains).

Sources: Weber et al. 2024; ``app/src/core/quality_signals`` of
https://github.com/togethercomputer/RedPajama-Data at 6d2cee9.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from puna.data.filters.base import FilterConfig, Finding, above, below, register
from puna.data.filters.batch import TextBatch
from puna.data.safety.lists import read_list
from puna.data.words.columns import STOP_WORDS

_PRECISION = 8
SIGNALS: dict[str, str] = {
    "rps_doc_word_count": "words after normalisation",
    "rps_doc_mean_word_length": "mean characters per normalised word",
    "rps_doc_symbol_to_word_ratio": "`#`, `...` and `…` per raw word",
    "rps_lines_start_with_bulletpoint": "share of lines that begin with a bullet",
    "rps_doc_frac_lines_end_with_ellipsis": "share of lines that end with an ellipsis",
    "rps_doc_frac_no_alph_words": "share of raw words without a letter of ASCII",
    "rps_doc_frac_unique_words": "different normalised words per word",
    "rps_doc_unigram_entropy": "entropy of the normalised words, nats",
    "rps_doc_frac_all_caps_words": "share of raw words in capitals",
    "rps_doc_stop_word_fraction": "share of raw words in `stop_words`",
    "rps_doc_num_sentences": "sentences",
    "rps_doc_curly_bracket": "curly brackets per character",
    "rps_doc_lorem_ipsum": '"lorem ipsum" per normalised character',
    "rps_doc_ldnoobw_words": "words and phrases of `bad_words`",
    **{f"rps_doc_frac_chars_top_{n}gram": f"share of characters in the top {n}-gram"
       for n in range(2, 5)},
    **{f"rps_doc_frac_chars_dupe_{n}grams": f"share of characters in repeated {n}-grams"
       for n in range(5, 11)},
    "rps_lines_ending_with_terminal_punctution_mark": "share of lines that end with . ! ? or ”",
    "rps_lines_javascript_counts": 'words "javascript" per line',
    "rps_lines_num_words": "normalised words per line",
    "rps_lines_numerical_chars_fraction": "mean over lines of the share of numbers",
    "rps_lines_uppercase_letter_fraction": "mean over lines of the share of capitals",
}  # fmt: skip
"""Name -> what it is, in the order in which they are compared."""
GOPHER_LIMITS: dict[str, tuple[float | None, float | None]] = {
    "rps_doc_word_count": (50, 10_000),
    "rps_doc_mean_word_length": (3, 10),
    "rps_doc_symbol_to_word_ratio": (None, 0.1),
    "rps_lines_start_with_bulletpoint": (None, 0.9),
    "rps_doc_frac_chars_top_2gram": (None, 0.2),
}
"""Smallest and largest value of the rules in the data set's card; its example ends there."""


@cache
def _words_of(path: Path, what: str, key: str) -> frozenset[str]:
    return frozenset(line.strip() for line in read_list(path, what, key)) - {""}


@register("redpajama")
class RedPajama(FilterConfig):
    """RedPajama-V2's signals; those without a value (no word, no line) pass any limit."""

    reasons: ClassVar[dict[str, str]] = {
        f"redpajama.{name}": f"outside the limits: {meaning}" for name, meaning in SIGNALS.items()
    }
    limits: dict[str, tuple[float | None, float | None]] = Field(
        default_factory=lambda: dict(GOPHER_LIMITS)
    )
    """Signal -> smallest and largest value."""
    stop_words: Path | None = None
    """File with a stop word per line (theirs: stopwords-json); without it Gopher's eight."""
    bad_words: Path | None = None
    """File with a word or phrase per line (theirs: LDNOOBW); without it the signal is 0."""

    @field_validator("limits")
    @classmethod
    def _known(cls, value: dict[str, object]) -> dict[str, object]:
        unknown = sorted(set(value) - set(SIGNALS))
        if unknown:
            raise ValueError(f"no such signal: {', '.join(unknown)}; known: {', '.join(SIGNALS)}")
        return value

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Measure all signals, compare those that have a limit."""
        for name, value in self._measure(docs).items():
            low, high = self.limits.get(name, (None, None))
            code = f"redpajama.{name}"
            if low is not None:
                yield below(code, value, low)
            if high is not None or low is None:
                yield above(code, value, float("inf") if high is None else high)

    def _measure(self, docs: TextBatch) -> dict[str, np.ndarray]:
        from puna.data.words.redpajama import measure_redpajama, normalise

        stop = frozenset(STOP_WORDS)
        if self.stop_words is not None:
            stop = _words_of(self.stop_words, "list of stop words", "stop_words")
        bad = frozenset[str]()
        if self.bad_words is not None:
            bad = _words_of(self.bad_words, "list of bad words", "bad_words")
        strings = [
            text if is_alive else ""
            for text, is_alive in zip(docs.strings(), docs.alive.tolist(), strict=True)
        ]
        normal = [normalise(text) for text in strings]
        found = measure_redpajama(docs.texts, docs.alive, normal, stop, bad)
        n_chars = np.array([*map(len, strings)], np.float64)
        n_normal = np.maximum(found["word_chars"] + found["words"] - 1, 0)
        symbols, brackets, lorem = np.zeros((3, len(docs)))
        for index, text in enumerate(strings):
            symbols[index] = text.count("#") + text.count("...") + text.count("…")
            brackets[index] = text.count("{") + text.count("}")
            if "lorem" in normal[index]:
                lorem[index] = " ".join(normal[index].split()).count("lorem ipsum")
        words, raw, lines, chars = (
            found[name] for name in ("words", "raw_words", "lines", "word_chars")
        )
        none = (raw == 0) | (words == 0)
        values = {
            "rps_doc_word_count": words,
            "rps_doc_mean_word_length": _part(chars, words),
            "rps_doc_symbol_to_word_ratio": _part(symbols, raw),
            "rps_lines_start_with_bulletpoint": _part(found["bullet_lines"], lines),
            "rps_doc_frac_lines_end_with_ellipsis": _part(found["ellipsis_lines"], lines),
            "rps_doc_frac_no_alph_words": 1 - _part(found["letter_words"], raw),
            "rps_doc_frac_unique_words": _part(found["unique_words"], words),
            "rps_doc_unigram_entropy": np.where(words > 0, found["entropy"], np.nan),
            "rps_doc_frac_all_caps_words": _part(found["capital_words"], raw),
            "rps_doc_stop_word_fraction": np.where(none, 0, _part(found["stop_words"], raw)),
            "rps_doc_num_sentences": found["sentences"],
            "rps_doc_curly_bracket": np.nan_to_num(_part(brackets, n_chars)),
            "rps_doc_lorem_ipsum": np.nan_to_num(_part(lorem, n_normal)),
            "rps_doc_ldnoobw_words": found["bad_words"],
            "rps_lines_ending_with_terminal_punctution_mark": _part(found["ended_lines"], lines),
            "rps_lines_javascript_counts": _part(found["javascripts"], lines),
            "rps_lines_num_words": _part(words, lines),
            "rps_lines_numerical_chars_fraction": _part(found["line_numbers"], lines),
            "rps_lines_uppercase_letter_fraction": _part(found["line_capitals"], lines),
        }
        for n in range(2, 11):
            kind, plural = ("top", "") if n < 5 else ("dupe", "s")
            part = found[f"top_{n}grams" if n < 5 else f"dup_{n}grams"]
            name = f"rps_doc_frac_chars_{kind}_{n}gram{plural}"
            values[name] = np.nan_to_num(_part(part, chars))
        return {name: np.round(values[name], _PRECISION) for name in SIGNALS}


def _part(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; NaN, which passes any limit, where the whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
