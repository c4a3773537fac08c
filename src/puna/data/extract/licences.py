"""Which licence a text is: SPDX identifiers of common software licences.

A licence file is recognised by sentences that every copy of the licence holds, compared without
case, punctuation and white space, so that copyright lines, wrapping and quotes do not matter. The
sentences were taken from the texts of the SPDX License List (spdx.org/licenses). What fits none is
left unnamed: this is metadata for filters, no legal judgement.
"""

from __future__ import annotations

import re

_NO_WORD = re.compile(r"[^a-z0-9.]+")
_SPDX_TAG = re.compile(r"SPDX-License-Identifier:\s*\(?([A-Za-z0-9.+\-() ]+?)\)?\s*(?:\*/|-->|$)",
                       re.MULTILINE)  # fmt: skip
_HEAD_CHARS = 4096
_MAX_CHARS = 60_000

_BSD = "redistributions of source code must retain the above copyright notice"
_NAMES = "nor the names of"
_ENDORSE = "endorse or promote products derived from this software"
_ADVERTISING = "all advertising materials mentioning features or use of this software"

# (identifier, all of these, none of these); of equal places the first rule is taken
_RULES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("AGPL-3.0", ("gnu affero general public license version 3 19 november 2007",), ()),
    ("LGPL-3.0", ("gnu lesser general public license version 3 29 june 2007",), ()),
    ("LGPL-2.1", ("gnu lesser general public license version 2.1 february 1999",), ()),
    ("LGPL-2.0", ("gnu library general public license version 2 june 1991",), ()),
    ("GPL-3.0", ("gnu general public license version 3 29 june 2007",), ()),
    ("GPL-2.0", ("gnu general public license version 2 june 1991",), ()),
    ("GPL-1.0", ("gnu general public license version 1 february 1989",), ()),
    ("GFDL-1.3", ("gnu free documentation license version 1.3 3 november 2008",), ()),
    ("GFDL-1.2", ("gnu free documentation license version 1.2 november 2002",), ()),
    ("Apache-2.0", ("apache license", "version 2.0", "terms and conditions for use reproduction and"
                    " distribution"), ()),
    ("Apache-2.0", ("licensed under the apache license version 2.0",), ()),
    ("MPL-2.0", ("mozilla public license", "version 2.0", "covered software"), ()),
    ("EPL-2.0", ("eclipse public license v 2.0",), ()),
    ("BSL-1.0", ("boost software license version 1.0",), ()),
    ("BSD-4-Clause", (_BSD, _ADVERTISING), ()),
    ("BSD-3-Clause", (_BSD, "neither the name", _ENDORSE), ()),
    ("BSD-3-Clause", (_BSD, _NAMES, _ENDORSE), ()),
    ("BSD-2-Clause", (_BSD, "redistributions in binary form must reproduce"), (_ENDORSE,)),
    ("Zlib", ("altered source versions must be plainly marked as such", "this software is provided "
              "as is without any express or implied warranty"), ()),
    ("ISC", ("permission to use copy modify and or distribute this software for any purpose with or"
             " without fee is hereby granted provided that the above copyright notice",), ()),
    ("0BSD", ("permission to use copy modify and or distribute this software for any purpose with"
              " or without fee is hereby granted",), ("provided that the above",)),
    ("MIT-0", ("permission is hereby granted free of charge to any person obtaining a copy",),
     ("shall be included in all copies",)),
    ("MIT", ("permission is hereby granted free of charge to any person obtaining a copy",
             "shall be included in all copies"), (_ENDORSE,)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",), ()),
    ("CC0-1.0", ("cc0 1.0 universal",), ()),
    ("CC-BY-SA-4.0", ("creative commons attribution sharealike 4.0 international",), ()),
    ("CC-BY-NC-4.0", ("creative commons attribution noncommercial 4.0 international",), ()),
    ("CC-BY-4.0", ("creative commons attribution 4.0 international",), ()),
    ("PSF-2.0", ("python software foundation license version 2",), ()),
    ("WTFPL", ("do what the fuck you want to public license",), ()),
)  # fmt: skip
_FILE_NAME = re.compile(
    r"(?:un)?licen[sc]e(?:[-_.].*)?|copying(?:[-_.].*)?|.*[-_.]licen[sc]e(?:\.(?:txt|md|rst))?",
    re.IGNORECASE,
)


def is_licence_file(name: str) -> bool:
    """Tell whether a file name is that of a licence: ``LICENSE``, ``COPYING.LESSER``."""
    return _FILE_NAME.fullmatch(name) is not None


def licence_of(text: str) -> str | None:
    """Return the SPDX identifier of a licence text; None when it is none that is known.

    Of several in one file (many add those of what they bundle) it is the one that comes first.

    GNU licences are named without ``-only`` or ``-or-later``: the text of the licence does not
    tell, only the files under it do.
    """
    if tag := spdx_tag(text):
        return tag
    words = _NO_WORD.sub(" ", text[:_MAX_CHARS].lower())
    words = " ".join(word.rstrip(".") for word in words.split())
    best, best_at = None, len(words)
    for identifier, needed, excluded in _RULES:
        at = words.find(needed[0])
        if not 0 <= at < best_at or any(part in words for part in excluded):
            continue
        if all(part in words for part in needed[1:]):
            best, best_at = identifier, at
    return best


def spdx_tag(text: str) -> str | None:
    """Return the expression after ``SPDX-License-Identifier:`` at the top of a file."""
    found = _SPDX_TAG.search(text[:_HEAD_CHARS])
    return " ".join(found[1].split()) if found else None
