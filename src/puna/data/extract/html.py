"""HTML to text: main content with paragraphs, lists, tables, code and formulas; no menus."""

from __future__ import annotations

import re
from typing import Any

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from puna.data.extract.html_blocks import rewrite_blocks
from puna.data.extract.rights import page_rights
from puna.data.extract_config import DEFAULT_EXTRACT, ExtractConfig

_LEAST_MAIN_SHARE = 0.1
_MAX_DEPTH = 1000
_LINKS = ["a", "nav", "header", "footer", "select"]
_TAG = re.compile(r"<(/?)([a-z][a-z0-9]*)", re.IGNORECASE)
_NOT_NESTING = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track",
     "wbr", "p", "li", "dt", "dd", "tr", "td", "th", "option", "tbody", "thead", "tfoot")
)  # fmt: skip


def extract_html(html: str, config: ExtractConfig = DEFAULT_EXTRACT) -> tuple[str, dict[str, Any]]:
    """Extract the readable text of a page, and what the page says about its use.

    The main content is what the heuristics of ``config.extractor`` find, after mathematics, lists
    and tables have been brought into a form that they keep (:mod:`.html_blocks`). Where that is
    less than a tenth of the visible text outside of links, the heuristics have missed (seen on long
    release notes), and the whole visible text is taken. (Links do not count, as the menus of some
    pages are ten times as long as what they are for.) It is taken as well from pages nested deeper
    than 1,000 elements, on which the heuristics would take quadratic time.

    Args:
        html: The page.
        config: Which extractor.

    Returns:
        Plain text, empty when the page shows none; and ``robots``, ``licence``,
        ``tdm_reservation`` as far as the page states them.

    Raises:
        PunaError: The extractor is not installed.
    """
    tree = HTMLTree.parse(html)
    rights = page_rights(html, tree)
    if _is_too_deep(html):
        return extract_plain_text(tree, main_content=False, alt_texts=False), rights
    rewrite_blocks(html, tree)
    if config.extractor == "trafilatura":
        from puna.data.extract.trafilatura_text import main_text

        main = main_text(tree)
    else:
        main = extract_plain_text(tree, main_content=True, alt_texts=False)
    if len(main) > _LEAST_MAIN_SHARE * len(html):
        return main, rights  # certainly more than the share of the visible text
    prose = extract_plain_text(
        tree, main_content=False, alt_texts=False, preserve_formatting=False, skip_elements=_LINKS
    )
    if main and len(main) > _LEAST_MAIN_SHARE * len(prose):
        return main, rights
    return extract_plain_text(tree, main_content=False, alt_texts=False), rights


def _is_too_deep(html: str) -> bool:
    """Tell, from the tags alone, whether elements are nested very deeply."""
    n_tags = html.count("<")
    if n_tags <= _MAX_DEPTH:
        return False
    # Cheap signs first: many elements left open, or a long run of tags that only open.
    is_suspicious = n_tags - 2 * html.count("</") > _MAX_DEPTH or any(
        piece.count("<") > _MAX_DEPTH for piece in html.split("</")
    )
    if not is_suspicious:
        return False
    depth = 0
    for match in _TAG.finditer(html):
        if match[2].lower() not in _NOT_NESTING:
            depth = max(0, depth - 1) if match[1] else depth + 1
            if depth > _MAX_DEPTH:
                return True
    return False
