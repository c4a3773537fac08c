r"""The one normalisation that every text goes through.

- ``\r\n`` and a lone ``\r`` become ``\n``;
- NUL characters are removed (no other control character is touched);
- Unicode is brought to NFC, except in program code, where string literals must stay as they are.
"""

from __future__ import annotations

import unicodedata

CODE_MEDIA_TYPES = frozenset(("text/x-python", "text/x-source"))


def normalise(text: str, media_type: str = "text/plain") -> str:
    """Normalise a text; normalising twice changes nothing more."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        text = text.replace("\0", "")
    if text.isascii() or media_type in CODE_MEDIA_TYPES:
        return text
    return unicodedata.normalize("NFC", text)
