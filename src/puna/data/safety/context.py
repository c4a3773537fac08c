"""What stands before a candidate on its line: many numbers are what they are by it."""

from __future__ import annotations

import re

CONTEXT_BYTES = 48
"""How far back a word counts (ours)."""
_LABEL_BYTES = 24

_DIGIT = re.compile(rb"\d")
_LETTER = re.compile(rb"[A-Za-z\x80-\xff]")


def before(view: memoryview, start: int, n_bytes: int = CONTEXT_BYTES) -> bytes:
    """Return the text before ``start``: of its line, or of a label alone on the line above."""
    window = bytes(view[max(0, start - n_bytes) : start])
    above, newline, line = window.rpartition(b"\n")
    if newline and not _LETTER.search(line):
        label = above.rpartition(b"\n")[2]
        return label + line if len(label) <= _LABEL_BYTES and not _DIGIT.search(label) else line
    return line
