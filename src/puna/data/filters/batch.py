"""A batch of documents as filters see it: signals by name, measured once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.data.words.columns import COLUMNS, COLUMNS_OF, DCLM_COLUMNS, DOLMA_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa

DATATROVE, DOLMA, DCLM = "dt_{}", "dolma_{}", "dclm_{}"
"""Names of the signals that are measured as these do."""
UNSPACED_SHARE = 0.3
"""From this share of letters in scripts without spaces, measures that count words mean nothing."""


class TextBatch:
    """Documents of one source, with their signals.

    ``docs["n_words"]`` is an array with one number per document. Signals are measured by compiled
    kernels in groups, for documents that are still alive when the group is first needed; the others
    have zeros.

    Args:
        texts: Arrow string array without nulls.
        paths: Where the documents come from, if that is known.
    """

    def __init__(self, texts: pa.Array, paths: Sequence[str] | None = None) -> None:
        self._array = texts
        self.paths: Sequence[str] | None = paths
        """Path or URL of each document."""
        self.alive: np.ndarray = np.ones(len(texts), bool)
        """bool [n_docs]: False for documents that a finding has dropped."""
        self._columns: dict[str, np.ndarray] = {}
        self._memo: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.alive)

    def __getitem__(self, signal: str) -> np.ndarray:
        """Return a signal, [n_docs].

        Raises:
            KeyError: No such signal; :func:`signal_names` lists them.
        """
        if signal not in self._columns:
            if signal in _DERIVED:
                self._columns[signal] = _DERIVED[signal](self)
            else:
                self._measure(_GROUP_OF[signal])
        return self._columns[signal]

    def _measure(self, group: str) -> None:
        names, rows = _GROUPS[group](self.texts, self.alive)
        for index, name in enumerate(names):
            self._columns[name] = rows[:, index]

    @property
    def texts(self) -> Any:
        """Bytes and offsets of the texts (:class:`puna.data.kernels.buffers.Texts`)."""
        if "texts" not in self._memo:
            from puna.data.kernels.buffers import texts_of

            self._memo["texts"] = texts_of(self._array)
        return self._memo["texts"]

    def strings(self) -> list[str]:
        """Return the texts as Python strings (slow: for filters written in plain Python)."""
        if "strings" not in self._memo:
            self._memo["strings"] = self._array.to_pylist()
        return self._memo["strings"]

    @property
    def array(self) -> pa.Array:
        """The texts as Arrow strings."""
        return self._array

    def replace(self, texts: list[str]) -> None:
        """Put other texts in the place of those of documents that are alive.

        What was measured is forgotten; filters that come later see the new texts.
        """
        import pyarrow as pa

        pairs = zip(self.alive.tolist(), texts, self.strings(), strict=True)
        new = [text if is_alive else old for is_alive, text, old in pairs]
        self._array = pa.array(new, pa.large_string())
        self._columns.clear()
        self._memo.clear()

    def phrases(self, phrases: tuple[str, ...], head_bytes: int = 0) -> np.ndarray:
        """Look for phrases; see :func:`puna.data.kernels.phrases.scan_phrases`."""
        from puna.data.kernels.phrases import scan_phrases

        return scan_phrases(self.texts, self.alive, phrases, head_bytes)

    def code_languages(self) -> list[str | None]:
        """Name the programming language of each document, by its path or its first line."""
        if "code_languages" not in self._memo:
            from puna.data.filters.languages import language_of

            paths = self.paths or [None] * len(self)
            pairs = zip(paths, self.strings(), strict=True)
            self._memo["code_languages"] = [language_of(path, text) for path, text in pairs]
        return self._memo["code_languages"]

    def languages(self) -> tuple[list[str], np.ndarray]:
        """Return the language code and the confidence of each document that is alive."""
        if "languages" not in self._memo:
            from puna.data.kernels.language import identify

            self._memo["languages"] = identify(self.texts, self.alive)
        return self._memo["languages"]

    def in_language(self, code: str) -> np.ndarray:
        """Tell which documents are in a language: bool [n_docs]."""
        return np.array([found == code for found in self.languages()[0]], bool)

    @property
    def spaced(self) -> np.ndarray:
        """Documents in scripts that write spaces between words: bool [n_docs]."""
        return self["n_unspaced_chars"] <= UNSPACED_SHARE * self["n_alpha_chars"]


Measured = tuple[tuple[str, ...], np.ndarray]


def _chars(texts: Any, alive: np.ndarray) -> Measured:
    from puna.data.kernels import chars

    return chars.COLUMNS, chars.count_chars(texts, alive)


def _words(texts: Any, alive: np.ndarray) -> Measured:
    from puna.data.kernels import words

    return words.WORD_COLUMNS, words.count_words(texts, alive)


def _lines(texts: Any, alive: np.ndarray) -> Measured:
    from puna.data.kernels import words

    return words.LINE_COLUMNS, words.count_lines(texts, alive)


def _repetition(texts: Any, alive: np.ndarray) -> Measured:
    from puna.data.kernels import repetition

    return repetition.COLUMNS, repetition.measure_repetition(texts, alive)


def _as_datatrove(what: int) -> Callable[[Any, np.ndarray], Measured]:
    def measured(texts: Any, alive: np.ndarray) -> Measured:
        from puna.data.words import measure

        names = COLUMNS_OF[what]
        columns = [COLUMNS.index(name) for name in names]
        rows = measure.measure(texts, alive, what)[:, columns]
        return tuple(map(DATATROVE.format, names)), rows

    return measured


def _dolma(texts: Any, alive: np.ndarray) -> Measured:
    from puna.data.words.plain import measure_plain

    return tuple(map(DOLMA.format, DOLMA_COLUMNS)), measure_plain(texts, alive)


def _dclm(texts: Any, alive: np.ndarray) -> Measured:
    from puna.data.words.dclm import measure_dclm

    return tuple(map(DCLM.format, DCLM_COLUMNS)), measure_dclm(texts, alive)


_GROUPS: dict[str, Callable[[Any, np.ndarray], Measured]] = {
    "chars": _chars,
    "words": _words,
    "lines": _lines,
    "repetition": _repetition,
    "dolma": _dolma,
    "dclm": _dclm,
    **{f"datatrove.{what}": _as_datatrove(what) for what in COLUMNS_OF},
}

_GROUP_OF = {
    **dict.fromkeys(
        ("n_chars", "n_alpha_chars", "n_digits", "n_spaces", "n_nontext_chars", "n_hashes",
         "n_unspaced_chars"), "chars"),
    **dict.fromkeys(
        ("n_words", "n_word_chars", "n_alpha_words", "max_word_chars", "n_data_bytes", "n_ellipses",
         "n_stop_words"), "words"),
    **dict.fromkeys(
        ("n_all_lines", "n_lines", "n_line_chars", "max_line_chars", "n_bullet_lines",
         "n_ellipsis_lines"), "lines"),
    **dict.fromkeys(
        ("dup_line_share", "dup_line_char_share", "dup_paragraph_share",
         "dup_paragraph_char_share", "top_2gram_share", "top_3gram_share", "top_4gram_share",
         "dup_5gram_share", "dup_6gram_share", "dup_7gram_share", "dup_8gram_share",
         "dup_9gram_share", "dup_10gram_share"), "repetition"),
    **dict.fromkeys(map(DOLMA.format, DOLMA_COLUMNS), "dolma"),
    **dict.fromkeys(map(DCLM.format, DCLM_COLUMNS), "dclm"),
    **{DATATROVE.format(name): f"datatrove.{what}"
       for what, names in COLUMNS_OF.items() for name in names},
}  # fmt: skip


def _ratio(part: str, whole: str) -> Callable[[TextBatch], np.ndarray]:
    def divide(docs: TextBatch) -> np.ndarray:
        return docs[part] / np.maximum(docs[whole], 1)

    return divide


_DERIVED: dict[str, Callable[[TextBatch], np.ndarray]] = {
    "nontext_share": _ratio("n_nontext_chars", "n_chars"),
    "alpha_share": _ratio("n_alpha_chars", "n_chars"),
    "alnum_share": lambda docs: (
        (docs["n_alpha_chars"] + docs["n_digits"]) / np.maximum(docs["n_chars"], 1)
    ),
    "mean_word_chars": _ratio("n_word_chars", "n_words"),
    "alpha_word_share": _ratio("n_alpha_words", "n_words"),
    "hashes_per_word": _ratio("n_hashes", "n_words"),
    "ellipses_per_word": _ratio("n_ellipses", "n_words"),
    "bullet_line_share": _ratio("n_bullet_lines", "n_lines"),
    "ellipsis_line_share": _ratio("n_ellipsis_lines", "n_lines"),
    "mean_line_chars": _ratio("n_line_chars", "n_all_lines"),
    "data_share": lambda docs: docs["n_data_bytes"] / np.maximum(docs["n_visible_bytes"], 1),
    "n_visible_bytes": lambda docs: np.diff(docs.texts.offsets) - docs["n_spaces"],
}


def signal_names() -> list[str]:
    """List the signals that ``docs[...]`` knows."""
    return sorted([*_GROUP_OF, *_DERIVED])
