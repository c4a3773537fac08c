"""HTML to text: main content with paragraphs, lists, tables and code blocks; no links, no menus."""

from __future__ import annotations

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

_LEAST_MAIN_SHARE = 0.1


def extract_html(html: str) -> str:
    """Extract the readable text of a page.

    The main content is what resiliparse's heuristics find. Where that is less than a tenth of
    the visible text, the heuristics have missed (seen on long release notes), and the whole visible
    text is taken.

    Args:
        html: The page.

    Returns:
        Plain text; empty when the page shows none.
    """
    tree = HTMLTree.parse(html)
    main = extract_plain_text(tree, main_content=True, alt_texts=False)
    if len(main) > _LEAST_MAIN_SHARE * len(html):
        return main  # certainly more than the share of the visible text
    whole = extract_plain_text(tree, main_content=False, alt_texts=False)
    return main if len(main) >= _LEAST_MAIN_SHARE * len(whole) else whole
