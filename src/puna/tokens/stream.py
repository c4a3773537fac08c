"""Decoding as tokens arrive: text comes out as soon as it is complete, never half a character."""

from __future__ import annotations

import codecs

from puna.tokens.tokenizer import REPLACEMENT, Tokenizer


class StreamDecoder:
    """Turns ids into text one by one; the pieces join to the text of all ids.

    Args:
        tokenizer: Its tokenizer.
        skip_special: Leave special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = ""

    def push(self, id_: int) -> str:
        """Take one more id and return the text that is complete now (often empty, or a word)."""
        if self._skip_special and self._tokenizer.is_special(id_):
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.piece(id_))
        self._ids.append(id_)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """Return what is left at the end: an unfinished character becomes U+FFFD."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        # other kinds of tokenizers put spaces by context, so the text since the start is decoded
        new = text[len(self._shown) :]
        self._shown = text
        return new
