"""The extractor trafilatura (Barbaresi 2021, ACL demos) behind puna's interface."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from resiliparse.parse.html import HTMLTree

from puna.core.errors import PunaError

_MARK = "\N{OGHAM FEATHER MARK}"
"""Stands for the white space at the start of a preformatted line, which trafilatura would alter;
printable, or it would be removed. A page that holds it already goes through unmarked."""
_INDENT = re.compile(r"^[ \t]*", re.MULTILINE)
_MARKED = re.compile(rf"^[^\S\n]*{_MARK}", re.MULTILINE)


@lru_cache(maxsize=1)
def _trafilatura() -> Any:
    try:
        import trafilatura
    except ImportError as error:
        raise PunaError(
            "extractor 'trafilatura' is not installed",
            "install it: pip install 'puna[trafilatura]'; or use extractor = \"resiliparse\"",
        ) from error
    return trafilatura


def check_trafilatura() -> None:
    """Load trafilatura.

    Raises:
        PunaError: It is not installed.
    """
    _trafilatura()


def main_text(tree: HTMLTree) -> str:
    """Return the main content that trafilatura finds in a page.

    Args:
        tree: The page after :func:`puna.data.extract.html_blocks.rewrite_blocks`; changed.

    Raises:
        PunaError: trafilatura is not installed.
        ValueError: trafilatura cannot parse the page.
    """
    trafilatura = _trafilatura()
    from lxml.etree import LxmlError  # comes with it

    is_marked = _mark_lines(tree)
    document: Any = tree.document
    try:
        text = trafilatura.extract(
            document.html, output_format="txt", include_comments=False, include_tables=True,
            include_links=False, include_images=False, deduplicate=False,
        )  # fmt: skip
    except LxmlError as error:
        raise ValueError(f"trafilatura cannot parse the page: {error}") from error
    if not text:
        return ""
    return _MARKED.sub("", text) if is_marked else text


def _mark_lines(tree: Any) -> bool:
    """Put a mark before every line of preformatted blocks; tell whether that was possible."""
    body = tree.body
    if body is None or _MARK in body.text:
        return False
    for block in body.query_selector_all("pre"):
        text = block.text.strip("\n")
        marked = _INDENT.sub(lambda found: _MARK + found[0], text)
        plain = tree.create_element("pre")
        plain.append_child(tree.create_text_node(marked))
        block.parent.replace_child(plain, block)
    return True
