"""Decoding as tokens arrive: text comes out as soon as it is complete, never half a character."""

from __future__ import annotations

import codecs

from puna.tokens.pieces import REPLACEMENT
from puna.tokens.tokenizer import Tokenizer

_WINDOW_IDS = 16
"""How many ids before the newest decide how those look, for tokenizers that put spaces by context.
More are kept while a character is incomplete."""


class StreamDecoder:
    """Turns ids into text one by one; the pieces join to the text of all ids.

    Each id costs the same, however many came before.

    Args:
        tokenizer: Its tokenizer.
        skip_special: Leave special tokens out.
        continues: The text goes on from other text, so a space at its start is kept; else it is
            dropped by tokenizers that put one before every text (Llama 2's kind).
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool = True, continues: bool = False
    ) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = tokenizer.pieces
        self._joins = pieces is not None
        self._drops_space = pieces is not None and pieces.drops_space and not continues
        self._ids: list[int] = []
        self._shown = ""

    def push(self, id_: int) -> str:
        """Take one more id and return the text that is complete now (often empty, or a word)."""
        if self._skip_special and self._tokenizer.is_special(id_):
            return ""
        if self._joins:
            piece = self._tokenizer.piece(id_)
            if self._drops_space and not self._tokenizer.is_added(id_):
                piece = piece.removeprefix(b" ")
            self._drops_space = False
            return self._utf8.decode(piece)
        self._ids.append(id_)
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith(REPLACEMENT) else self._show(text)

    def flush(self) -> str:
        """Return what is left at the end: an unfinished character becomes U+FFFD."""
        if self._joins:
            return self._utf8.decode(b"", final=True)
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown = text
        if len(self._ids) > 2 * _WINDOW_IDS:
            del self._ids[:-_WINDOW_IDS]
            self._shown = self._tokenizer.decode(self._ids)
        return new
