"""Write the classes of code points for word boundaries (UAX #29) that puna needs.

    python tests/unit/word_breaks.py

Reads the installed uniseg and writes ``src/puna/data/words/breaks.json``; test_data_refinedweb
compares the file with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "src/puna/data/words/breaks.json"


def facts() -> dict[str, Any]:
    """First and last code point of every run of a class, flattened; code points of none are Other.

    Only the classes that decide about words which begin with a letter or a digit.
    """
    import uniseg
    from uniseg.emoji import extended_pictographic
    from uniseg.wordbreak import word_break

    classes: dict[str, list[int]] = {}
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000:
            continue
        names = [word_break(chr(code)).value]
        if extended_pictographic(chr(code)):
            names.append("Extended_Pictographic")
        for name in names:
            found = classes.setdefault(name, [])
            if found and found[-1] == code - 1:
                found[-1] = code
            else:
                found += [code, code]
    for name in ("Other", "WSegSpace", "Regional_Indicator"):
        del classes[name]
    return {
        "about": "Classes of the Unicode Character Database for word boundaries (UAX #29; Unicode "
        "License v3), as uniseg has them; written by tests/unit/word_breaks.py.",
        "unicode": uniseg.unidata_version,
        "classes": dict(sorted(classes.items())),
    }


if __name__ == "__main__":
    text = json.dumps(facts(), separators=(",", ":"), sort_keys=True)
    FILE.write_text(text + "\n", encoding="utf-8")
    print(f"{FILE}: {len(text):,} bytes")
