"""Keeping the names of special tokens out of messages while a template is rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from puna.tokens.chat.messages import Message

_PRIVATE = range(0xF0000, 0xF1000)
"""Code points for stand-ins: of a private use area that no text has a reason to use."""


class StandIns:
    """Exchanges characters in messages so that no special token's name is left in them.

    Args:
        messages: The conversation; the stand-ins occur nowhere in it.
        names: The special tokens.
    """

    def __init__(self, messages: Sequence[Message], names: Sequence[str]) -> None:
        rests: dict[str, list[str]] = {}
        for name in sorted(names, key=len, reverse=True):
            rests.setdefault(name[0], []).append(re.escape(name[1:]))
        self._starts = re.compile(
            "|".join(f"{re.escape(c)}(?={'|'.join(rest)})" for c, rest in rests.items()) or "(?!)"
        )
        self._heads = {name[:n] for name in names for n in range(1, len(name))}
        self._tails = {name[n:] for name in names for n in range(1, len(name))}
        self._longest = max(map(len, names), default=0)
        taken = {char for message in messages for char in str(message)}
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        self._stand_in: dict[str, str] = {}

    def hide(self, value: Any) -> Any:
        """Return a message, or a part of one, without names of special tokens."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, dict):
            return {key: self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def _hide_text(self, text: str) -> str:
        chars = list(self._starts.sub(lambda match: self._of(match[0]), text))
        # a name could also arise where text and template meet
        for n in range(min(self._longest, len(chars)), 0, -1):
            if "".join(chars[-n:]) in self._heads:
                chars[-n] = self._of(chars[-n])
            if "".join(chars[:n]) in self._tails:
                chars[n - 1] = self._of(chars[n - 1])
        return "".join(chars)

    def _of(self, char: str) -> str:
        if char not in self._stand_in:
            self._stand_in[char] = next(self._free)
        return self._stand_in[char]

    def show(self, text: str) -> str:
        """Return a text with the stand-ins turned back."""
        return text.translate({ord(after): before for before, after in self._stand_in.items()})
