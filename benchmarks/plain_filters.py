"""The measures of the filters in plain Python: peer of the benchmark, reference of the tests."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

_SPACES = " \t\n\r\f\v"
_SEPARATOR = re.compile(r"[\x00-\x20]+")
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_DATA = re.compile(r"[0-9a-fA-FxXuUL+\-.,:;()\[\]{}\\'\"#$%/]+")
_BASE64 = re.compile(r"[A-Za-z0-9+/=_\-]{64,}")


def split_words(text: str) -> list[str]:
    """Split at code points up to U+0020."""
    return [word for word in _SEPARATOR.split(text) if word]


def strip(line: str) -> str:
    """Drop code points up to U+0020 at both ends."""
    return line.strip("".join(map(chr, range(33))))


def char_measures(text: str) -> dict[str, int]:
    """Count classes of characters, as far as Python's own classes agree with the kernel's."""
    return {
        "n_chars": len(text),
        "n_alpha_chars": sum(c.isalpha() for c in text),
        "n_digits": sum(c in "0123456789" for c in text),
        "n_spaces": sum(c in _SPACES for c in text),
        "n_nontext_chars": sum((c < " " and c not in _SPACES) or c == "\x7f" for c in text),
        "n_hashes": text.count("#"),
    }


def word_measures(text: str) -> dict[str, int]:
    """Count words and their kinds."""
    words = split_words(text)
    data = [
        w for w in words
        if (_DATA.fullmatch(w) and any(c in "0123456789" for c in w)) or _BASE64.fullmatch(w)
    ]  # fmt: skip
    return {
        "n_words": len(words),
        "n_word_chars": sum(map(len, words)),
        "n_alpha_words": sum(any(c.isalpha() for c in w) for w in words),
        "max_word_chars": max(map(len, words), default=0),
        "n_data_bytes": sum(len(w.encode()) for w in data),
        "n_ellipses": sum(len(re.findall(r"\.\.\.|…", w)) for w in words),
        "n_stop_words": len({w.lower() for w in words} & _STOP_WORDS),
    }


def line_measures(text: str) -> dict[str, int]:
    """Count lines and their kinds."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    full = [strip(line) for line in lines if strip(line)]
    return {
        "n_all_lines": len(lines),
        "n_lines": len(full),
        "n_line_chars": sum(map(len, lines)),
        "max_line_chars": max(map(len, lines), default=0),
        "n_bullet_lines": sum(line[0] in "-*•" for line in full),
        "n_ellipsis_lines": sum(line.endswith(("...", "…")) for line in full),
    }


def repetition_measures(text: str) -> dict[str, float]:
    """Measure repetition as :mod:`puna.data.kernels.repetition` defines it."""
    words = split_words(text)
    found = dict.fromkeys(_REPETITION, 0.0)
    if not words:
        return found
    lines = [tuple(split_words(line)) for line in text.split("\n")]
    paragraphs: list[tuple[tuple[str, ...], ...]] = []
    block: list[tuple[str, ...]] = []
    for line in [*lines, ()]:
        if line:
            block.append(line)
        elif block:
            paragraphs.append(tuple(block))
            block = []
    full = [(line,) for line in lines if line]
    found["dup_line_share"], found["dup_line_char_share"] = _repeats(full)
    found["dup_paragraph_share"], found["dup_paragraph_char_share"] = _repeats(paragraphs)
    total = sum(map(len, words))
    for n in range(2, 5):
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        best = max(counts.values(), default=1)
        if best > 1:
            chars = max(sum(map(len, gram)) for gram, k in counts.items() if k == best)
            found[f"top_{n}gram_share"] = best * chars / total
    for n in range(5, 11):
        found[f"dup_{n}gram_share"] = _covered(words, n) / total
    return found


_REPETITION = (
    "dup_line_share", "dup_line_char_share", "dup_paragraph_share", "dup_paragraph_char_share",
    *(f"top_{n}gram_share" for n in range(2, 5)), *(f"dup_{n}gram_share" for n in range(5, 11)),
)  # fmt: skip


def _repeats(blocks: list[tuple[tuple[str, ...], ...]]) -> tuple[float, float]:
    seen: set[tuple[tuple[str, ...], ...]] = set()
    n, chars, total = 0, 0, 0
    for block in blocks:
        size = sum(len(word) for line in block for word in line)
        total += size
        if block in seen:
            n, chars = n + 1, chars + size
        seen.add(block)
    return n / len(blocks), chars / total


def _covered(words: list[str], n: int) -> int:
    seen: set[tuple[str, ...]] = set()
    inside: set[int] = set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            inside.update(range(i, i + n))
        seen.add(gram)
    return sum(len(words[i]) for i in inside)


def phrase_measures(text: str, phrases: tuple[str, ...]) -> tuple[int, int]:
    """Return the bytes in blocks, and in blocks with a phrase (phrases of letters, no newline)."""
    lowered = "".join(c.lower() if c.isascii() else c for c in text)
    cuts = [0, *(i + 1 for i, c in enumerate(lowered) if c == "\n"), len(lowered)]
    lines = [lowered[a:b] for a, b in pairwise(cuts) if a < b]
    total = marked = size = 0
    has = False
    for line in [*lines, "\n"]:
        if any(c.isalnum() or not c.isascii() for c in line):
            size += len(line.encode())
            has = has or any(phrase in line for phrase in phrases)
            continue
        total, marked = total + size, marked + (size if has else 0)
        size, has = 0, False
    return total, marked
