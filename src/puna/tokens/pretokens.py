"""Pre-tokenisation: how Llama 3 cuts text into pieces before byte-pair encoding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of meta-llama/llama3 (``llama/tokenizer.py``): contractions, words with one leading
mark or space, numbers of at most three digits, punctuation, line breaks, other whitespace."""

MAX_CHARS = 400_000
"""Longest text that is encoded at once; longer text is cut there (Llama 3's limit)."""
MAX_RUN_CHARS = 25_000
"""Longest run of whitespace, or of anything else, that is kept whole (Llama 3's limit)."""

# the lookbehind starts a match at the beginning of a run only, which keeps the search linear
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN_CHARS + 1}}}\S*|(?<!\s)\s{{{MAX_RUN_CHARS + 1}}}\s*")


def split_huge(text: str) -> Iterator[str]:
    """Cut text into parts that are safe to pre-tokenise; almost every text is one part.

    The cuts are those of Llama 3's tokenizer: every 400,000 characters, and inside such a part
    after each 25,000 characters of a run of whitespace or of non-whitespace.

    Args:
        text: Any text.

    Yields:
        The parts, which join to the text.
    """
    if len(text) <= MAX_RUN_CHARS:
        yield text
        return
    for first in range(0, len(text), MAX_CHARS):
        part = text[first : first + MAX_CHARS]
        start = 0
        for run in _LONG_RUN.finditer(part):
            for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                yield part[start:cut]
                start = cut
        yield part[start:]


def valid_text(text: str) -> str:
    """Return a text that UTF-8 can hold: lone surrogates become the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates; pairs of them are the character they mean
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_llama3_pattern(pre_tokenizer: Mapping[str, Any]) -> bool:
    """Tell whether a tokenizer cuts text as Llama 3 does.

    Args:
        pre_tokenizer: Entry of that name of its ``tokenizer.json``.
    """
    steps = pre_tokenizer.get("pretokenizers") or []
    if pre_tokenizer.get("type") != "Sequence" or len(steps) != 2:
        return False
    split, byte_level = steps
    return (
        split.get("type") == "Split"
        and split.get("pattern") == {"Regex": LLAMA3_PATTERN}
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and byte_level.get("type") == "ByteLevel"
        and not byte_level.get("add_prefix_space")
        and not byte_level.get("use_regex")
    )


def byte_alphabet() -> dict[str, int]:
    """Return the characters that stand for bytes in byte-level vocabularies.

    Printable Latin-1 bytes stand for themselves, the other 68 for the characters from U+0100 on
    (the table of GPT-2), which is also the order of the first 256 ids of Llama 3.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return {**table, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}
