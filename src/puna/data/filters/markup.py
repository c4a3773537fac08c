"""Pages without their markup, in time that grows with their size only."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

_TAG = re.compile(r"<!--|<(/?)([a-zA-Z][\w:-]*)?[^<>]*>")


def without_markup(html: str, hidden: Collection[str], gap: str) -> str:
    """Leave out tags, comments, and elements that are not shown.

    No parser of HTML: a ``<`` that begins no tag stays. An element or comment that is never closed
    reaches to the end.

    Args:
        html: The page.
        hidden: Names of elements that are left out with what they hold.
        gap: Stands for what is left out.
    """
    pieces, at = [], 0
    while (tag := _TAG.search(html, at)) is not None:
        pieces.append(html[at : tag.start()])
        name = (tag[2] or "").lower()
        if tag[0] == "<!--":
            end = html.find("-->", tag.end())
            at = end + 3 if end >= 0 else len(html)
        elif name in hidden and not tag[1]:
            closing = _closing(name).search(html, tag.end())
            at = closing.end() if closing is not None else len(html)
        else:
            at = tag.end()
    pieces.append(html[at:])
    return gap.join(pieces)


@cache
def _closing(name: str) -> re.Pattern[str]:
    return re.compile(rf"</{name}\s*>", re.IGNORECASE)
