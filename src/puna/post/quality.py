"""Quality rules for instruction pairs made from docstrings: keep an entry, or say why not.

Each rule has a reason code that ends up in the metrics, so the number of entries is always the
number kept plus the numbers per reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_SIGNATURE = re.compile(r"^[\w.]+\s*\(|->|>>>|::=?")
_POINTER = re.compile(
    r"^(see|alias|same as|like|identical to|equivalent to|wrapper (for|around)|shorthand for|"
    r"deprecated|todo|fixme|x\.__|initiali[sz]e self|.* instead\.?$)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z][a-z]*")
_NAME = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
_OPEN_ENDS = (":", ",", ";", "-", "(", "[", "{", "/", "=", "...", "…")
_OPEN_WORDS = frozenset(
    ("a", "an", "the", "of", "and", "or", "to", "in", "for", "with", "from", "by", "on", "at", "as",
     "is", "are", "that", "which", "if", "when", "into")
)  # fmt: skip
_SMALL_WORDS = _OPEN_WORDS | {"this", "it", "its", "self", "return", "returns", "get", "set"}
_LEAST_WORDS = 3
_LEAST_LETTER_SHARE = 0.6


@dataclass(frozen=True)
class Entry:
    """One documented name.

    Attributes:
        name: Dotted Python name, ``os.path.join``.
        signature: Parameters with or without the name, ``(a, *p)``; empty when unknown.
        summary: First sentence or line of the docstring, white space folded.
    """

    name: str
    signature: str
    summary: str


def read_entry(raw: Any) -> Entry | None:
    """Read one entry of a document's metadata; None when its fields are not what they should be."""
    if not isinstance(raw, dict):
        return None
    name, summary = raw.get("name"), raw.get("summary")
    signature = raw.get("signature") or ""
    if not (isinstance(name, str) and isinstance(signature, str) and _NAME.match(name)):
        return None
    if summary is not None and not isinstance(summary, str):
        return None
    signature = "" if signature.endswith("(...)") else " ".join(signature.split())
    return Entry(name, signature, " ".join((summary or "").split()))


def judge(entry: Entry, min_chars: int, max_chars: int) -> str | None:
    """Return the reason code for which an entry is not worth learning, or None to keep it.

    Args:
        entry: The entry.
        min_chars: Shortest summary, in characters.
        max_chars: Longest summary, in characters.
    """
    summary = entry.summary
    if any(part.startswith("_") for part in entry.name.split(".")):
        return "name.private"
    if not summary:
        return "summary.missing"
    words = _WORD.findall(summary)
    if len(summary) < min_chars or len(words) < _LEAST_WORDS:
        return "summary.too_short"
    if len(summary) > max_chars:
        return "summary.too_long"
    if _SIGNATURE.search(summary) or _letter_share(summary) < _LEAST_LETTER_SHARE:
        return "summary.not_prose"
    if _ends_badly(summary):
        return "summary.ends_badly"
    if _POINTER.match(summary) or _only_repeats_name(entry.name, words):
        return "summary.self_referential"
    return None


def _letter_share(text: str) -> float:
    return sum(char.isalpha() or char == " " for char in text) / len(text)


def _ends_badly(summary: str) -> bool:
    if summary.endswith(_OPEN_ENDS):
        return True
    if summary.count("(") != summary.count(")") or summary.count("`") % 2:
        return True
    last = summary.rstrip(".!?'\"`)").rpartition(" ")[2].lower()
    return last in _OPEN_WORDS


def _only_repeats_name(name: str, words: list[str]) -> bool:
    parts = {part.lower() for part in _WORD.findall(name.replace("_", " "))}
    told = {word.lower() for word in words} - _SMALL_WORDS
    return told <= parts
