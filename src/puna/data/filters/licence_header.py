"""Licence boilerplate at the top of source files: one line instead of thirty.

The paragraphs of the first comment that hold licence phrases are replaced by the SPDX identifier,
where the licence is known, and cut out otherwise; whatever else the comment says stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from pydantic import Field

from puna.data.filters.base import FilterConfig, Finding, noted, register
from puna.data.filters.batch import TextBatch
from puna.data.filters.heuristics import LICENCE_PHRASES

_PREAMBLE = re.compile(r"\ufeff?(?:#![^\n]*\n|<\?[^\n]*\n|#[^\n]*coding[:=][^\n]*\n|\s*\n)*")
_BLOCK = re.compile(r"[ \t]*(?:/\*.*?\*/|<!--.*?-->|\(\*.*?\*\)|\{-.*?-\})[ \t]*\n?", re.DOTALL)
_LINE_MARKS = ("//", "#", "--", ";;", ";", "%", "..", "dnl", "REM", "'", "!")
_FRAME = re.compile(r"^[\s/*#;%!\-.{}()<>=+_~|']*|[\s/*#\-<>(){}=+_~|]*$")
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([\w.+\-() ]+?)\s*(?:\*/|-->|$)", re.MULTILINE)
HEADER_PHRASES = (
    *LICENCE_PHRASES, "without warranties or conditions", "you may not use this file",
    "see the license for the specific", "you should have received a copy of the",
    "free software; you can redistribute", "free software: you can redistribute",
    "subject to the terms", "can be found in the license file", "see the license file",
)  # fmt: skip
"""Phrases of licences, letter case ignored (ours)."""
_LATER = ("any later version", "or later")


def licence_of(text: str) -> str | None:
    """Name the licence of a header by its SPDX identifier, None when it is not known."""
    found = _SPDX.search(text)
    if found:
        return found[1]
    lower = " ".join(re.sub(r"[^\w.,()/]+", " ", text.lower()).split())
    for name, words in (
        ("Apache-2.0", ("apache license, version 2.0",)),
        ("MPL-2.0", ("mozilla public license, v. 2.0",)),
        ("MIT", ("permission is hereby granted, free of charge", "the software is provided")),
        ("BSD-3-Clause", ("redistributions of source code must", "neither the name")),
        ("BSD-2-Clause", ("redistributions of source code must", "in binary form must")),
        ("ISC", ("permission to use, copy, modify, and/or distribute this software",)),
    ):
        if all(word in lower for word in words):
            return name
    later = "or-later" if any(word in lower for word in _LATER) else "only"
    for short, long in (
        ("AGPL", "affero general public"), ("LGPL", "lesser general public"),
        ("LGPL", "library general public"), ("GPL", "general public license"),
    ):  # fmt: skip
        version = re.search(r"version (\d(?:\.\d)?)", lower)
        if f"gnu {long}" in lower and version:
            number = version[1] if "." in version[1] else f"{version[1]}.0"
            return f"{short}-{number}-{later}"
    return None


def _first_comment(text: str, start: int) -> tuple[int, str]:
    """Return the end of the comment that begins at a place, and the mark of its lines."""
    block = _BLOCK.match(text, start)
    if block:
        return block.end(), ""
    line = text[start : start + 200].lstrip(" \t")
    mark = next((mark for mark in _LINE_MARKS if line.startswith(mark)), "")
    if not mark:
        return start, ""
    end = start
    while end < len(text):
        stop = text.find("\n", end)
        stop = len(text) if stop < 0 else stop + 1
        part = text[end:stop].strip()
        is_comment = part.startswith(mark) and not (mark == "#" and re.match(r"#[a-z!]", part))
        if not is_comment:
            break
        end = stop
    return end, mark


def without_header(text: str, min_chars: int, max_chars: int) -> str:
    """Replace the licence in the first comment of a file.

    Args:
        text: The file.
        min_chars: Shorter licences stay.
        max_chars: Comments that are longer stay: they are more than a header.
    """
    preamble = _PREAMBLE.match(text)
    start = preamble.end() if preamble else 0
    end, mark = _first_comment(text, start)
    comment = text[start:end]
    lower = comment.lower()
    if not min_chars <= len(comment) <= max_chars or not any(
        phrase in lower for phrase in HEADER_PHRASES
    ):
        return text
    lines = comment.split("\n")
    contents = [_FRAME.sub("", line) for line in lines]
    first, last = _licence_lines(contents)
    if sum(map(len, lines[first:last])) + last - first < min_chars:
        return text
    name = licence_of("\n".join(lines[first:last]))
    spdx = f"SPDX-License-Identifier: {name}"
    head, tail = lines[:first], lines[last:]
    opening, closing = (mark, "") if mark else _signs(comment)
    if not any(_FRAME.sub("", line) for line in (*head, *tail)):
        line = f"{opening} {spdx} {closing}".rstrip() + "\n\n" if name else ""
        return text[:start] + line + text[end:].lstrip("\n")
    if not mark and not any(opening in line for line in head):
        head = [*head, opening]
    if not mark and not any(closing in line for line in tail):
        tail = [f" {closing}", *tail]
    middle = [f"{mark or ' *'} {spdx}"] if name else []
    return text[:start] + "\n".join([*head, *middle, *tail]) + text[end:]


def _signs(comment: str) -> tuple[str, str]:
    """Return the signs that open and close a block comment."""
    for opening, closing in (("/*", "*/"), ("<!--", "-->"), ("(*", "*)"), ("{-", "-}")):
        if comment.lstrip().startswith(opening):
            return opening, closing
    return "", ""


def _licence_lines(contents: list[str]) -> tuple[int, int]:
    """Return the lines of the paragraphs from the first with a phrase to the last."""
    first, last, start = len(contents), 0, 0
    for index in range(len(contents) + 1):
        if index < len(contents) and contents[index]:
            continue
        paragraph = " ".join(contents[start:index]).lower()
        if any(phrase in paragraph for phrase in HEADER_PHRASES):
            first, last = min(first, start), index
        start = index + 1
    return first, last


@register("licence_header")
class LicenceHeader(FilterConfig):
    """Long licence headers of source files, replaced by one line; rewrites what it keeps."""

    rewrites: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {
        "licence_header.removed": "characters of licence boilerplate cut out (measured only)",
        "licence_header.emptied": "fewer characters than `min_left` are left without the header",
    }
    min_chars: int = Field(default=200, ge=1)
    """Shorter headers stay (ours)."""
    max_chars: int = Field(default=20_000, ge=1)
    """Longer first comments are not looked at (ours)."""
    min_left: int = Field(default=20, ge=0)
    """Smallest number of characters that must be left of a file that had a header (ours)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Cut out, then count what is left."""
        old = docs.strings()
        new = [without_header(text, self.min_chars, self.max_chars) for text in old]
        removed = [len(a) - len(b) for a, b in zip(old, new, strict=True)]
        yield noted("licence_header.removed", removed)
        left = np.array([len(text.strip()) for text in new], np.float64)
        changed = np.array([a != b for a, b in zip(old, new, strict=True)], bool)
        failed = changed & (left < self.min_left)
        yield Finding("licence_header.emptied", left, float(self.min_left), failed)
        docs.replace(new)
