"""HTML to text: what each extractor keeps, what menus it leaves, and how fast it is.

    python benchmarks/bench_extract.py --html /path/to/unpacked [--pages 400] [--seed 0]

The pages are real documentation (`debian_corpus.py` unpacks it): Sphinx, pydata, rustdoc, DocBook,
gtk-doc, Qt, MediaWiki (cppreference), node. Each family's menus, headers and footers have known
classes, which label the boilerplate; everything else is content. Formulas of the pages are
rewritten, in turn, as MathML with annotation, as MathJax script and as KaTeX, so that every form
occurs.

Shares are of all pages together:

- code: lines of `<pre>` that are in the output with their indentation;
- tables: rows of data tables whose cells stand in one line of the output, in their order;
- lists: items of lists (not of links only) that begin a line of the output with a marker;
- mathematics: formulas whose TeX source is in the output exactly once or more, as written;
- text: paragraphs whose first words are in the output;
- boilerplate: lines of boilerplate that are lines of the output (less is better).

MB/s are of HTML per second of CPU time, one process. Rows `plain` call the library as its
documentation shows, without puna's preparation.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trafilatura
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from puna.data.extract.decode import decode
from puna.data.extract.html import extract_html
from puna.data.extract_config import ExtractConfig
from puna.data.readers.records import UnusableError

FAMILIES = {
    "python3.11-doc": "div.related, div.sphinxsidebar, div.footer, div.mobile-nav",
    "linux-doc-6.1": "div.related, div.sphinxsidebar, div.footer",
    "python-django-doc": "#hd, #ft, #sidebar, div.nav, div.sphinxsidebar",
    "python-pandas-doc": "nav, footer, .bd-sidebar, #banner, .bd-toc, .prev-next-area",
    "python-scipy-doc": "nav, footer, .bd-sidebar, #banner, .bd-toc, .prev-next-area",
    "cmake-doc": "div.related, div.sphinxsidebar, div.footer",
    "rust-doc": "nav, .search-container, .sidebar-elems, #settings-menu, #help-button",
    "libgtk-3-doc": "table.navigation, div.footer",
    "qtbase5-doc-html": "div.navigationbar, div.toc, div.footer",
    "debian-handbook": "ul.docnav, #banner",
    "installation-guide-amd64": "div.navheader, div.navfooter",
    "cppreference-doc-en-html": "div.t-navbar, div.printfooter, #catlinks, #siteSub, #contentSub,"
    " #mw-js-message, span.editsection",
    "nodejs-doc": "#column2, #intro, header.header, div.picker, #gtoc, a.mark",
}
_UNSEEN = "script, style, template, noscript, head"
_BLANKS = re.compile(r"\s+")
_MATH = re.compile(r"<(span|div) class=\"math[^\"]*\">\s*\\[(\[](.*?)\\[)\]]\s*</\1>", re.DOTALL)
_MARKED = re.compile(r"\s*(?:[•◦▪*\-–]|\d+[.)])\s+(.*)")
_HEAD_CHARS = 30
_MAX_PAGE_BYTES = 300_000


@dataclass
class Labels:
    """What a page holds: things to keep and lines to leave out."""

    code: list[str] = field(default_factory=list)
    tables: list[list[str]] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    mathematics: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    boilerplate: list[str] = field(default_factory=list)


def flat(text: str) -> str:
    """White space as single blanks."""
    return _BLANKS.sub(" ", text).strip()


def vary_math(html: str, turn: Iterator[int], found: list[str]) -> str:
    """Write the formulas of a page in other forms, and note their sources."""
    forms = (
        '<math><semantics><mrow><mi>x</mi></mrow><annotation encoding="application/x-tex">{}'
        "</annotation></semantics></math>",
        '<span class="MathJax_Preview">[math]</span><script type="math/tex">{}</script>',
        '<span class="katex"><span class="katex-mathml"><math><semantics><mrow><mi>x</mi></mrow>'
        '<annotation encoding="application/x-tex">{}</annotation></semantics></math></span>'
        '<span class="katex-html" aria-hidden="true">x</span></span>',
        '<span class="math">\\({}\\)</span>',
    )

    def swap(match: re.Match[str]) -> str:
        source = flat(match[2])
        if "<" in source:
            return match[0]
        plain = source.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        form = forms[next(turn) % len(forms)]
        found.append(plain)
        return form.format(plain if "math/tex" in form else source)

    return _MATH.sub(swap, html)


def label(html: str, selector: str) -> Labels:
    """Label a page by the selector of its boilerplate."""
    tree: Any = HTMLTree.parse(html)
    labels = Labels()
    for node in tree.body.query_selector_all(_UNSEEN):
        node.decompose()
    pieces: list[str] = []
    for node in tree.body.query_selector_all(selector):
        if node.parent is not None:
            pieces += extract_plain_text(node.html, alt_texts=False).split("\n")
            node.decompose()
    content = set(map(flat, extract_plain_text(tree, alt_texts=False).split("\n")))
    labels.boilerplate = [
        line for line in map(flat, pieces) if len(line) > 2 and line not in content
    ]
    label_content(tree.body, labels)
    return labels


def label_content(body: Any, labels: Labels) -> None:
    """Label what is to be kept of a page without its boilerplate."""
    for node in body.query_selector_all("pre"):
        lines = (line.rstrip() for line in node.text.split("\n"))
        labels.code += [line for line in lines if line.strip()]
    for table in body.query_selector_all("table"):
        if table.query_selector("table, pre, h1, h2, h3, ul, p") is None:
            for row in table.query_selector_all("tr"):
                cells = [flat(cell.text) for cell in row.query_selector_all("td, th")]
                cells = [cell for cell in cells if cell]
                if len(cells) > 1 and "<br" not in row.html:
                    labels.tables.append(cells)
    for item in body.query_selector_all("li"):
        linked = sum(len(flat(link.text)) for link in item.query_selector_all("a"))
        first = flat(item.text.strip().split("\n")[0])
        if len(first) > 2 and linked < len(flat(item.text)) / 2 and "math" not in item.html:
            labels.lists.append(first[:_HEAD_CHARS])
    for item in body.query_selector_all("p"):
        start = flat(item.text)
        if len(start) > _HEAD_CHARS and "math" not in item.html:
            labels.text.append(start[:_HEAD_CHARS])


def score(text: str, labels: Labels, kept: Counter[str], total: Counter[str]) -> None:
    """Add what an output keeps to the counters."""
    lines = text.split("\n")
    right = {line.rstrip() for line in lines}
    flats = [flat(line) for line in lines]
    flat_set, whole = set(flats), flat(text)
    marked = {match[1][:_HEAD_CHARS] for line in lines if (match := _MARKED.match(line))}
    marked = {flat(start) for start in marked}
    kept["code"] += sum(line in right for line in labels.code)
    kept["lists"] += sum(start in marked or start.strip() in marked for start in labels.lists)
    kept["mathematics"] += sum(source in whole for source in labels.mathematics)
    kept["text"] += sum(start in whole for start in labels.text)
    kept["boilerplate"] += sum(line in flat_set for line in labels.boilerplate)
    by_first: dict[str, list[str]] = {}
    for line in flats:
        for word in line.split()[:2]:
            by_first.setdefault(word, []).append(line)
    for cells in labels.tables:
        candidates = by_first.get(cells[0].split()[0], ())
        kept["tables"] += any(_in_order(line, cells) for line in candidates)
    for name in vars(labels):
        total[name] += len(getattr(labels, name))


def _in_order(line: str, cells: list[str]) -> bool:
    at = 0
    for cell in cells:
        at = line.find(cell, at)
        if at < 0:
            return False
        at += len(cell)
    return True


def sample_pages(root: Path, n_pages: int, seed: int) -> list[tuple[str, Labels]]:
    """Choose pages of every family in equal numbers, and label them."""
    rng, pages = random.Random(seed), []
    turn = iter(range(10**9))
    for family, selector in FAMILIES.items():
        files = sorted(
            path for path in (root / family).rglob("*.html")
            if path.is_file() and not path.is_symlink()
            and 2_000 < path.stat().st_size < _MAX_PAGE_BYTES
        )  # fmt: skip
        for path in rng.sample(files, min(len(files), n_pages // len(FAMILIES))):
            try:
                html, _ = decode(path.read_bytes(), None, "text/html")
            except UnusableError:
                continue
            formulas: list[str] = []
            html = vary_math(html, turn, formulas)
            labels = label(html, selector)
            labels.mathematics = formulas
            pages.append((html, labels))
    return pages


def main() -> None:
    """Sample, extract, print one row per extractor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--html", type=Path, required=True, help="folder of unpacked packages")
    parser.add_argument("--pages", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pages = sample_pages(arguments.html, arguments.pages, arguments.seed)
    n_mb = sum(len(html.encode()) for html, _ in pages) / 1e6
    print(f"{len(pages)} pages of {len(FAMILIES)} families, {n_mb:.1f} MB")
    of_trafilatura = ExtractConfig(extractor="trafilatura")
    extractors: dict[str, Callable[[str], str]] = {
        "puna, resiliparse": lambda html: extract_html(html)[0],
        "puna, trafilatura": lambda html: extract_html(html, of_trafilatura)[0],
        "plain resiliparse": lambda html: extract_plain_text(html, main_content=True),
        "plain trafilatura": lambda html: trafilatura.extract(html) or "",
    }
    names = list(vars(Labels()))
    print(f"{'':<20}{'MB/s':>7}{'out MB':>8}" + "".join(f"{name:>13}" for name in names))
    totals: Counter[str] = Counter()
    for name, extractor in extractors.items():
        kept, totals, cpu_s, n_out = Counter(), Counter(), 0.0, 0
        for html, labels in pages:
            start_s = time.process_time()
            text = extractor(html)
            cpu_s += time.process_time() - start_s
            n_out += len(text.encode())
            score(text, labels, kept, totals)
        shares = "".join(f"{100 * kept[key] / max(1, totals[key]):>12.1f}%" for key in names)
        print(f"{name:<20}{n_mb / cpu_s:>7.1f}{n_out / 1e6:>8.2f}{shares}")
    print(f"{'labels':<35}" + "".join(f"{totals[key]:>13,}" for key in names))


if __name__ == "__main__":
    main()
