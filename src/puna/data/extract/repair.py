"""Repair of texts that were decoded with the wrong encoding before they reached us (mojibake)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from puna.core.errors import PunaError

_C1_CONTROL = re.compile("[\x80-\x9f]")


@lru_cache(maxsize=1)
def _ftfy() -> tuple[Callable[[str, Any], str], Callable[[str], bool], Any]:
    try:
        import ftfy
        from ftfy.badness import is_bad
    except ImportError as error:
        raise PunaError(
            "extract.repair needs the package ftfy", "install it: pip install 'puna[repair]'"
        ) from error
    # Only wrong decodings: quotes, ligatures, widths and escapes of a text are its author's.
    config = ftfy.TextFixerConfig(
        unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False,
        fix_character_width=False, uncurl_quotes=False, fix_line_breaks=False,
        fix_surrogates=False, remove_control_chars=False, normalization=None, explain=False,
    )  # fmt: skip
    return ftfy.fix_text, is_bad, config


def check_repair() -> None:
    """Load ftfy.

    Raises:
        PunaError: It is not installed.
    """
    _ftfy()


def repair(text: str) -> str:
    """Undo wrong decodings, line by line; a text that shows no sign of one is returned as it is.

    The signs are those of ftfy (Speer 2019, doi:10.5281/zenodo.2591652): sequences of characters
    that occur in mojibake and hardly in any language, or control characters of Latin-1.

    Raises:
        PunaError: ftfy is not installed.
    """
    fix_text, is_bad, config = _ftfy()
    if text.isascii() or not (is_bad(text) or _C1_CONTROL.search(text)):
        return text
    return fix_text(text, config)
