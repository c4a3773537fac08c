"""What is measured in a text for datatrove's filters; see :mod:`puna.data.words.measure`."""

from __future__ import annotations

WORD_COLUMNS = (
    "n_words", "n_real_words", "n_real_chars", "n_letter_words", "n_stop_words",
)  # fmt: skip
"""Real words are not only signs; stop words are counted once each."""
TEXT_COLUMNS = (
    "n_chars", "n_hashes", "n_ellipses", "n_lines", "n_bullet_lines", "n_ellipsis_lines",
    "n_full_lines", "n_ended_lines", "n_short_lines", "n_repeated_line_chars", "n_newlines",
)  # fmt: skip
"""The first lines are those of ``str.splitlines``; full ones are not blank, between newlines."""
REPETITION_COLUMNS = (
    "n_paragraphs", "dup_paragraphs", "dup_paragraph_chars", "n_line_parts", "dup_lines",
    "dup_line_chars",
    *(f"top_{n}gram_chars" for n in (2, 3, 4)), *(f"dup_{n}gram_chars" for n in range(5, 11)),
)  # fmt: skip
SENTENCE_COLUMNS = ("n_sentences",)
COLUMNS = (*WORD_COLUMNS, *TEXT_COLUMNS, *REPETITION_COLUMNS, *SENTENCE_COLUMNS)
WORDS, TEXT, REPETITION, SENTENCES = 1, 2, 4, 8
"""What to measure, as a sum."""
COLUMNS_OF = {
    WORDS: WORD_COLUMNS, TEXT: TEXT_COLUMNS, REPETITION: REPETITION_COLUMNS,
    SENTENCES: SENTENCE_COLUMNS,
}  # fmt: skip
DOLMA_COLUMNS = (
    "words", "chars", "low_median", "high_median", "symbol_words", "alpha_words", "required_words",
    "lines", "bullet_lines", "ellipsis_lines", "dup_lines", "dup_line_chars",
    *(f"{what}_{n}grams" for n in range(2, 11) for what in ("top", "dup", "all")),
)  # fmt: skip
"""Of dolma's tagger; see :mod:`puna.data.words.plain`."""
DCLM_COLUMNS = (
    "tokens", "words", "word_chars", "letterless_words", "stop_words", "symbols", "bullet_lines",
    "ellipsis_lines", "lines", "dup_lines", "line_chars", "dup_line_chars", "paragraphs",
    "dup_paragraphs", "paragraph_chars", "dup_paragraph_chars", "capital_lines", "digit_lines",
    "short_lines", "gram_chars", *(f"top_{n}grams" for n in range(2, 5)),
    *(f"dup_{n}grams" for n in range(5, 11)),
)  # fmt: skip
"""Of dclm's filters; see :mod:`puna.data.words.dclm`."""
REDPAJAMA_COLUMNS = (
    "raw_words", "letter_words", "capital_words", "stop_words", "sentences", "lines",
    "ellipsis_lines", "ended_lines", "bullet_lines", "line_capitals", "line_numbers", "javascripts",
    "words", "word_chars", "unique_words", "entropy", "bad_words",
    *(f"top_{n}grams" for n in range(2, 5)), *(f"dup_{n}grams" for n in range(5, 11)),
)  # fmt: skip
"""Of RedPajama-V2's signals; see :mod:`puna.data.words.redpajama`."""

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""Gopher (Rae et al. 2021, appendix A) asks for at least two of these eight in English prose."""
