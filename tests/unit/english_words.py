"""Write the facts about spaCy's English tokenizer and datatrove's sets of signs that puna needs.

    python tests/unit/english_words.py

Reads the installed libraries and writes ``src/puna/data/words/english.json``; test_data_words
compares the file with them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "src/puna/data/words/english.json"


def ranges(is_member: Any) -> list[int]:
    """First and last code point of every run of members, flattened."""
    found: list[int] = []
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000 or not is_member(chr(code)):
            continue
        if found and found[-1] == code - 1:
            found[-1] = code
        else:
            found += [code, code]
    return found


def facts() -> dict[str, Any]:
    """Everything, from the libraries."""
    import spacy
    from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION
    from spacy.lang import char_classes as c
    from spacy.tokenizer import Tokenizer

    nlp = spacy.blank("en")
    signs = nlp.add_pipe("sentencizer").punct_chars  # type: ignore[attr-defined]
    tokenizer = nlp.tokenizer
    bare = Tokenizer(
        nlp.vocab, rules={}, prefix_search=tokenizer.prefix_search,
        suffix_search=tokenizer.suffix_search, infix_finditer=tokenizer.infix_finditer,
        url_match=tokenizer.url_match,
    )  # fmt: skip

    def members(inside: str) -> list[int]:
        return ranges(re.compile(f"[{inside}]").match)

    def affix(search: Any) -> list[int]:
        return ranges(lambda char: (found := search(char)) is not None and found.end() == 1)

    inner = [
        text for text in tokenizer.rules
        if tokenizer.find_prefix(text) or tokenizer.find_infix(text) or tokenizer.find_suffix(text)
    ]  # fmt: skip
    return {
        "about": "Facts about the English tokenizer of spaCy (MIT) and the sets of signs of "
        "datatrove (Apache-2.0); written by tests/unit/english_words.py. Classes are first and "
        "last code points.",
        "spacy": spacy.__version__,
        "classes": {
            "alpha": members(c.ALPHA),
            "lower": members(c.ALPHA_LOWER),
            "upper": members(c.ALPHA_UPPER),
            "quote": members(c.CONCAT_QUOTES),
            "before_dot": members(f"0-9{c.ALPHA_LOWER}%²\\-\\+{c.PUNCT}(?:{c.CONCAT_QUOTES})"),
            "icon": ranges(re.compile(c.LIST_ICONS[0]).match),
            "prefix": affix(tokenizer.prefix_search),
            "suffix": affix(tokenizer.suffix_search),
            "currency": ranges(lambda char: char in c.LIST_CURRENCY or char == "$"),
            "symbol": ranges(PUNCTUATION_SET.__contains__),
            "terminal": ranges(TERMINAL_PUNCTUATION.__contains__),
            "sentence_end": ranges(signs.__contains__),
        },
        "units": sorted(set(c.UNITS.split("|"))),
        "specials": [
            [piece[65] for piece in pieces] for _, pieces in sorted(tokenizer.rules.items())
        ],
        "inner": {text: [token.text for token in bare(text)] for text in sorted(inner)},
    }


if __name__ == "__main__":
    FILE.write_text(
        json.dumps(facts(), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
