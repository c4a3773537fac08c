"""Where in a text the part is that a reason is about, as far as the reason tells.

Approximations for the eye: the filters count; this looks for what they count, in the same text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

from puna.data.filters.heuristics import GENERATED_PHRASES, LICENCE_PHRASES

Span = tuple[int, int]
_MAX_SPANS = 200
_SHORT_LINE = 30
_ENDS = (".", "?", "!", '"', "'", "”", "…", "。", "？", "！")
_WORD = re.compile(r"\w+")
_GRAM = re.compile(r"(\d+)_?(?:n_)?grams?")


def find_offending(reason: str, text: str, detail: str | None) -> list[Span]:
    """Find what a reason is about.

    Args:
        reason: Code of the rejection.
        text: The document.
        detail: Of the rejection.

    Returns:
        Character offsets in order, without overlaps; empty where the reason names no place.
    """
    gram = _GRAM.search(reason)
    if gram is not None:
        found = _repeated_grams(text, int(gram[1]), only_top="top_" in reason)
    else:
        look = next((look for pattern, look in _LOOKS if pattern.search(reason)), None)
        found = look(text, detail or "") if look is not None else iter(())
    return _without_overlaps(found)


def _without_overlaps(spans: Iterator[Span]) -> list[Span]:
    joined: list[Span] = []
    for low, high in sorted(spans):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        elif len(joined) < _MAX_SPANS:
            joined.append((low, high))
    return joined


def _repeated_grams(text: str, n: int, *, only_top: bool) -> Iterator[Span]:
    words = [(match.start(), match.end(), match[0].lower()) for match in _WORD.finditer(text)]
    grams = [tuple(word[2] for word in words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    top = max(counts, key=lambda gram: (counts[gram] * len("".join(gram)), gram), default=None)
    seen: set[tuple[str, ...]] = set()
    for i, gram in enumerate(grams):
        if (gram == top) if only_top else (gram in seen):
            yield words[i][0], words[i + n - 1][1]
        seen.add(gram)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    at = 0
    for line in text.split("\n"):
        yield at, line
        at += len(line) + 1


def _lines_where(is_meant: Callable[[str], bool]) -> Callable[[str, str], Iterator[Span]]:
    def look(text: str, _: str) -> Iterator[Span]:
        for at, line in _lines(text):
            if line.strip() and is_meant(line.strip()):
                yield at, at + len(line)

    return look


def _repeated_lines(text: str, _: str) -> Iterator[Span]:
    seen: set[str] = set()
    for at, line in _lines(text):
        if line.strip() in seen:
            yield at, at + len(line)
        if line.strip():
            seen.add(line.strip())


def _pattern(pattern: str) -> Callable[[str, str], Iterator[Span]]:
    compiled = re.compile(pattern, re.IGNORECASE | re.MULTILINE)

    def look(text: str, _: str) -> Iterator[Span]:
        yield from (match.span() for match in compiled.finditer(text) if match[0])

    return look


def _any_of(phrases: tuple[str, ...]) -> Callable[[str, str], Iterator[Span]]:
    return _pattern("|".join(map(re.escape, phrases)))


def _terms_of_detail(text: str, detail: str) -> Iterator[Span]:
    """Terms that the detail lists: ``3 terms: a, b``."""
    terms = [term.strip() for term in detail.partition(":")[2].split(",") if term.strip()]
    if terms:
        pattern = r"\b(?:" + "|".join(map(re.escape, terms)) + r")\b"
        yield from (match.span() for match in re.finditer(pattern, text, re.IGNORECASE))


def _longest_line(text: str, _: str) -> Iterator[Span]:
    at, line = max(_lines(text), key=lambda pair: len(pair[1]))
    yield at, at + len(line)


_LOOKS: tuple[tuple[re.Pattern[str], Callable[[str, str], Iterator[Span]]], ...] = tuple(
    (re.compile(pattern), look)
    for pattern, look in (
        (r"dup_(line|para)|char_dup|line_char|para_char|paragraph_char", _repeated_lines),
        (r"^nontext", _pattern("[\x00-\x08\x0b-\x1f\x7f-\x9f\ue000-\uf8ff\ufffd]+")),
        (r"hash", _pattern("#+")),
        (r"ellipsis_lines|end_ellipsis|ellipsis_count",
         _lines_where(lambda line: line.endswith(("...", "…")))),
        (r"ellips", _pattern(r"\.\.\.|…")),
        (r"bullet", _lines_where(lambda line: line.startswith(("-", "*", "•", "●")))),
        (r"line_punct|no_terminal|no_punct",
         _lines_where(lambda line: not line.endswith(_ENDS))),
        (r"short_line", _lines_where(lambda line: len(line) <= _SHORT_LINE)),
        (r"alpha_words|below_alpha|alphabetic_word", _pattern(r"(?<!\S)[^\w\s]+(?!\S)|\b\d\S*")),
        (r"word_length\.long|above_avg", _pattern(r"\S{16,}")),
        (r"^data_like", _pattern(r"\b(?=\w*\d)[0-9a-fxul.,:;-]{3,}\b|[A-Za-z0-9+/=]{64,}")),
        (r"^generated", _any_of(GENERATED_PHRASES)),
        (r"^licence", _any_of(LICENCE_PHRASES)),
        (r"lorem", _pattern("lorem ipsum")),
        (r"curly", _pattern("[{}]")),
        (r"javascript", _lines_where(lambda line: "javascript" in line.lower())),
        (r"^lines\.longest|max_line", _longest_line),
        (r"^safety\.(nsfw|toxic)", _terms_of_detail),
    )
)  # fmt: skip
"""What reasons look at; the first pattern that the code matches counts."""
