"""Automatic checks of what was written, before anybody else has to read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from puna.core.errors import PunaError
from puna.post.annotate.settings import CheckRules

LANGUAGE_FROM_CHARS = 40
"""Shorter texts have no language that can be told."""
OPENINGS_FROM = 200
"""Responses from which on their openings are compared."""
_WORD = re.compile(r"\w+")
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:can(?:not|'t)|won't|must decline)"
    r"(?: to)? (?:help|assist|do|provide|answer|comply|fulfil)|as an ai(?: language model)?,? i)",
    re.IGNORECASE,
)
_SPECIAL = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>")
_REFUSAL_CHARS = 200
"""A refusal stands at the beginning; quoted further down it is none."""


class Finding(NamedTuple):
    """Something a check found; hard ones send the text back to its author at once."""

    code: str
    is_hard: bool
    detail: str


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def opening_of(text: str) -> str | None:
    """Return the first three words of a text, None for a shorter one."""
    words = words_of(text[:200])
    return " ".join(words[:3]) if len(words) > 3 else None


def normal_text(text: str) -> str:
    """Return what makes texts exact duplicates: their words."""
    return " ".join(words_of(text))


class Checker:
    """Checks texts by the rules of a desk.

    Args:
        rules: The rules.

    Raises:
        PunaError: A file of evaluation examples cannot be read.
    """

    def __init__(self, rules: CheckRules) -> None:
        self.rules = rules
        self._grams = frozenset(
            gram
            for path in rules.contamination
            for text in read_examples(Path(path))
            for gram in _grams(words_of(text), rules.ngram)
        )

    def check(self, text: str, messages: Iterable[Mapping[str, str]] = ()) -> list[Finding]:
        """Return what is wrong with a text.

        Args:
            text: What was written.
            messages: What it answers; an answer that only repeats it is none.
        """
        return [*self._shape(text, messages), *self._words(text), *self._data(text)]

    def _shape(self, text: str, messages: Iterable[Mapping[str, str]]) -> Iterator[Finding]:
        rules = self.rules
        if len(text) < max(rules.min_chars, 1):
            yield Finding("length.short", True, f"{len(text)} characters, {rules.min_chars} needed")
        if len(text) > rules.max_chars:
            yield Finding("length.long", True, f"{len(text)} of {rules.max_chars} characters")
        if text.count("```") % 2:
            yield Finding("format.fence", True, "a code block is not closed")
        found = _SPECIAL.search(text)
        if found:
            yield Finding("format.special", True, f"{found[0]} is a mark of a chat format")
        if text and any(normal_text(one["content"]) == normal_text(text) for one in messages):
            yield Finding("format.echo", True, "the text repeats a message")

    def _words(self, text: str) -> Iterator[Finding]:
        if self.rules.refusals and (found := _REFUSAL.search(text[:_REFUSAL_CHARS])):
            yield Finding("refusal", True, found[0])
        lower = text.lower()
        for phrase in self.rules.phrases:
            if phrase in lower:
                yield Finding("phrase", False, phrase)
        words = words_of(text)
        shared = next((g for g in _grams(words, self.rules.ngram) if g in self._grams), None)
        if shared is not None:
            yield Finding("contamination", True, shared[:60])

    def _data(self, text: str) -> Iterator[Finding]:
        if not text:
            return
        if self.rules.language is not None and len(text) >= LANGUAGE_FROM_CHARS:
            language = self._language(text)
            if language not in (self.rules.language, "und"):
                yield Finding("language", True, f"{language}, not {self.rules.language}")
        if self.rules.pii:
            for kind in sorted(set(self._pii(text))):
                yield Finding("pii", True, kind)

    @cached_property
    def is_warm(self) -> bool:
        """Load the compiled parts, which takes a second or two the first time."""
        self._pii("warm up")
        if self.rules.language is not None:
            self._language("warm up the model of languages")
        return True

    @staticmethod
    def _language(text: str) -> str:
        import numpy as np

        from puna.data.kernels.buffers import texts_from
        from puna.data.kernels.language import identify

        return identify(texts_from([text]), np.ones(1, bool))[0][0]

    @staticmethod
    def _pii(text: str) -> list[str]:
        from puna.data.kernels.buffers import texts_from
        from puna.data.safety.config import NATIONAL_IDS
        from puna.data.safety.pii import find_pii

        spans = find_pii(texts_from([text]), [frozenset(NATIONAL_IDS)])
        return [kind for _, _, kind in spans.get(0, [])]


def _grams(words: list[str], n: int) -> Iterator[str]:
    for start in range(len(words) - n + 1):
        yield " ".join(words[start : start + n])


def read_examples(path: Path) -> Iterator[str]:
    """Yield the texts of a JSONL file of evaluation examples.

    Raises:
        PunaError: The file is missing, or a line has none of the fields.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError(f"checks.contamination: {path}: {error}", "name a JSONL file") from error
    for number, line in enumerate(lines, 1):
        try:
            raw = json.loads(line)
            text = next(raw[name] for name in ("text", "question", "prompt") if name in raw)
        except (ValueError, TypeError, StopIteration) as error:
            raise PunaError(
                f"checks.contamination: {path}:{number} has no text, question or prompt",
                "write one JSON object per line",
            ) from error
        yield str(text)
