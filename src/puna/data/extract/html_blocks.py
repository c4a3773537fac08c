"""Rewriting a parsed page so that mathematics, lists and tables survive any extractor.

Extractors of main content treat these badly, each in its own way: the sources of formulas are
scripts and annotations, which are dropped or doubled; resiliparse takes every bulleted list near
the top of the tree for a menu; cells of several lines break the rows of a table. Here formulas
become text (``$...$``, ``$$...$$``), data tables become preformatted rows (``| a | b |``), and
lists that are no menus are moved deeper into the tree.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from resiliparse.parse.html import HTMLTree

_MATH_SIGNS = ("<math", "math/tex", "mjx-", "katex", "mwe-math", 'class="math', "formula")
_MATH_IMAGES = (
    "img.math, img.tex, img.latex, img.formulaInl, img.formulaDsp,"
    " img.mwe-math-fallback-image-inline, img.mwe-math-fallback-image-display"
)
_MATHJAX_2 = ".MathJax, .MathJax_Display, .MathJax_Preview, .MathJax_SVG, .MathJax_CHTML"
_DISPLAYSTYLE = re.compile(r"\{\\(?:display|text)style\s*(.*)\}\s*", re.DOTALL)
_LINK = re.compile(r"<a\b[^>]*>(.*?)</a>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_SPACE = re.compile(r"\s+")
_BREAK = re.compile(r"</?(?:br|p|div|li|dt|dd)\b[^>]*>")
_ROW = re.compile(r"<tr\b[^>]*>(.*?)</tr>", re.DOTALL)
_CELL = re.compile(r"<(?:td|th)\b[^>]*>(.*?)</(?:td|th)>", re.DOTALL)
_CAPTION = re.compile(r"<caption\b[^>]*>(.*?)</caption>", re.DOTALL)
_LAYOUT = re.compile(r"<(?:pre|h[1-3]|form|textarea)\b")
_UNSEEN = re.compile(r"<!--.*?-->|<(script|style|template)\b.*?</\1>", re.DOTALL)
_MENU = re.compile(
    r"(?:^|[\s_-])(?:nav\w*|menu\w*|breadcrumbs?|toc|toctree\S*|sidebar\S*|related|footer|header|"
    r"pagination|pager|contents)(?:$|[\s_-])", re.IGNORECASE,
)  # fmt: skip
_MENU_TAGS = frozenset(("nav", "header", "footer", "aside"))
_DEEP_ENOUGH = 5  # resiliparse takes lists with fewer elements between them and the body for menus
_MAX_LINK_SHARE = 0.5
_MAX_CELL_CHARS = 1000
_MAX_TABLE_ROWS = 10_000
_MAX_MENU_ROWS = 2


def rewrite_blocks(html: str, tree: HTMLTree) -> None:
    """Rewrite mathematics, lists and tables of a page in place.

    Args:
        html: The source of the page, to see cheaply what it holds.
        tree: The page, parsed; changed.
    """
    body = tree.body
    if body is None:
        return
    if any(sign in html for sign in _MATH_SIGNS):
        _rewrite_math(tree, body, "math/tex" in html)
    if "<table" in html or "<TABLE" in html:
        for table in body.query_selector_all("table"):
            _rewrite_table(tree, table)
    if "<ul" in html or "<UL" in html:
        for element in body.query_selector_all("ul"):
            _deepen_list(tree, element)


def _rewrite_math(tree: Any, body: Any, is_mathjax_2: bool) -> None:
    for node in body.query_selector_all("script"):
        kind = (node.getattr("type") or "").lower()
        if kind.startswith("math/tex"):
            _replace(tree, node, _tex(node.text, "display" in kind))
    for node in body.query_selector_all("math"):
        if node.parent is None:
            continue
        annotation = node.query_selector('annotation[encoding="application/x-tex"]')
        source = annotation.text if annotation is not None else node.getattr("alttext")
        is_display = (node.getattr("display") or "").lower() == "block" or (
            _closest(node, "katex-display") is not None
        )
        if source and source.strip():
            _replace(tree, node, _tex(source, is_display))
    for node in body.query_selector_all(".katex-html"):
        node.decompose()
    if is_mathjax_2:
        for node in body.query_selector_all(_MATHJAX_2):
            node.decompose()
    for node in body.query_selector_all(_MATH_IMAGES):
        wiki = _closest(node, "mwe-math-element")
        if wiki is not None and "$" in wiki.text:
            continue  # its formula stands there already
        if alt := (node.getattr("alt") or "").strip():
            is_display = "display" in node.class_name.lower() or "dsp" in node.class_name.lower()
            _replace(tree, node, _tex(alt, is_display))


def _closest(node: Any, class_name: str) -> Any:
    while node is not None:
        if class_name in getattr(node, "class_list", ()):
            return node
        node = node.parent
    return None


def _tex(source: str, is_display: bool) -> str:
    text = _SPACE.sub(" ", source).strip()
    if found := _DISPLAYSTYLE.fullmatch(text):
        text = found[1].strip()
    if text.startswith(("$", "\\(", "\\[", "\\begin{")):
        return f" {text} "
    return f" $${text}$$ " if is_display else f" ${text}$ "


def _replace(tree: Any, node: Any, text: str) -> None:
    if node.parent is not None:
        node.parent.replace_child(tree.create_text_node(text), node)


def _rewrite_table(tree: Any, table: Any) -> None:
    """Turn a data table into preformatted rows; tables that lay out a page stay as they are."""
    if table.parent is None or table.getattr("role") in ("presentation", "none"):
        return
    # What the parser writes is well formed, and reading it is much faster than visiting nodes.
    html = _UNSEEN.sub("", table.html)
    if html.count("<table") > 1 or _LAYOUT.search(html):
        return
    rows = _ROW.findall(html)
    if not 0 < len(rows) <= _MAX_TABLE_ROWS:
        return
    if len(rows) <= _MAX_MENU_ROWS and _link_share(table) > _MAX_LINK_SHARE:
        return
    lines, most_cells = [], 0
    for row in rows:
        cells = [_plain(cell) for cell in _CELL.findall(row)]
        if any(len(cell) > _MAX_CELL_CHARS for cell in cells):
            return
        most_cells = max(most_cells, len(cells))
        if any(cells):
            lines.append(f"| {' | '.join(cells)} |")
    if most_cells < 2 or not lines:
        return
    if (caption := _CAPTION.search(html)) and (title := _plain(caption[1])):
        lines.insert(0, title)
    block = tree.create_element("pre")
    for name in ("class", "id"):  # menus are told by them
        if value := table.getattr(name):
            block.setattr(name, value)
    block.append_child(tree.create_text_node("\n".join(lines)))
    table.parent.replace_child(block, table)


def _plain(html: str) -> str:
    text = _TAG.sub("", _BREAK.sub(" ", html))
    return _SPACE.sub(" ", unescape(text)).strip()


def _deepen_list(tree: Any, element: Any) -> None:
    depth, node = 0, element.parent
    while node is not None and node.tag != "body":
        depth += 1
        if depth >= _DEEP_ENOUGH or node.tag in ("ul", "ol", "li"):
            return
        if node.tag in _MENU_TAGS or node.getattr("role") == "navigation" or _is_menu(node):
            return
        node = node.parent
    if node is None or _is_menu(element) or _link_share(element) > _MAX_LINK_SHARE:
        return
    outer = inner = tree.create_element("div")
    for _ in range(_DEEP_ENOUGH - depth - 1):
        child = tree.create_element("div")
        inner.append_child(child)
        inner = child
    element.parent.replace_child(outer, element)
    inner.append_child(element)


def _is_menu(node: Any) -> bool:
    return any(_MENU.search(node.getattr(name) or "") for name in ("class", "id"))


def _link_share(node: Any) -> float:
    """Return the share of an element's visible characters that stand in links."""
    html = node.html  # one string is much faster than one object per link
    if "<a" not in html:
        return 0.0
    n_chars = len(_TAG.sub("", html).strip())
    n_linked = sum(len(_TAG.sub("", inner).strip()) for inner in _LINK.findall(html))
    return n_linked / n_chars if n_chars else 0.0
