"""StarCoder's filters of files, by extension (Li et al. 2023, section 3.2).

Numbers are those of the code and the table of extensions that the authors published
(bigcode-project/bigcode-dataset, `preprocessing/filtering.py` and `visual_inspection.csv`). Only
the smallest size of JSON and YAML is from the text (50 characters, as DeepSeek-Coder, which took
these rules over, states it too): the published code has 100 as its default. Not taken over: `.fsh`
files may have lines of 500 characters only, near-duplicates of three extensions have settings of
their own, and extensions that the table does not list are dropped there and judged here.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from pydantic import Field

from puna.data.filters.base import FilterConfig, Finding, above, below, register, share
from puna.data.filters.batch import TextBatch
from puna.data.filters.markup import without_markup


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


EXCLUDED = _words(
    "al aux bison cats cdf cl2 csx dpr f77 frg frx geo grt ltx nbp pck ph pls plx rest rktd rktl",
    "sexp sig tab toc vhf vht vhw vrx w wlt xrl yy",
)
"""Extensions that their inspection left out: generated files and data."""
LONG_LINED = _words(
    "ado asm bbx bib bsv cbx cmake do dtx frm ihlp ins json lbx ma markdown matlab md mkd mkdn",
    "mkii mkiv mkvi nb r rmd ron rst sql sthlp sty tex",
)
"""Extensions without a limit on lines."""
ANY_ALNUM = _words("frm ihlp ma nb sas sthlp")
"""Extensions without a limit on the share of letters and digits."""
DATA_LIKE = _words("ads aug bas fp ma matlab mpl nb prc scm sld sps sv vhd wl y")
"""Extensions under which their inspection found much data: letters are counted as well."""
DATA = frozenset(("json", "yaml", "yml"))
XML_BASED = frozenset(("xsl", "xslt"))
HTML = frozenset(("html", "htm", "xhtml", "xht"))
_HIDDEN = frozenset(("script", "style"))
_XML_MARK, _XML_HEAD_CHARS = "<?xml version=", 100


def extension_of(path: str) -> str:
    """Return the extension of a path in small letters, empty when there is none."""
    name = path.partition("#")[0].rpartition("/")[2].lower()
    return name.rpartition(".")[2] if "." in name else ""


def shown_chars(page: str) -> int:
    """Count the characters of a page outside of tags, scripts, styles and comments."""
    return len(html.unescape(without_markup(page, _HIDDEN, "")))


@register("starcoder")
class StarCoder(FilterConfig):
    """StarCoder's rules for files of code, markup and data, by the extension of the path."""

    reasons: ClassVar[dict[str, str]] = {
        "starcoder.extension": "an extension under which there are mostly generated files or data",
        "starcoder.longest_line": "a line is longer than `max_line`",
        "starcoder.mean_line": "mean line length above `max_mean_line`",
        "starcoder.alnum": "fewer letters and digits than `min_alnum`",
        "starcoder.alpha": "fewer letters than `min_alpha`, in a file that may be data",
        "starcoder.data_alpha": "a JSON or YAML file has fewer letters than `min_data_alpha`",
        "starcoder.xml": "`<?xml version=` stands in the first 100 characters",
        "starcoder.visible_chars": "an HTML file shows fewer characters than `min_visible`",
        "starcoder.visible_share": "an HTML file shows less of its text than `min_visible_share`",
        "starcoder.small": "a JSON or YAML file has fewer characters than `min_data_chars`",
        "starcoder.large": "a JSON or YAML file has more characters than `max_data_chars`",
    }
    exclude: tuple[str, ...] = tuple(sorted(EXCLUDED))
    """Extensions that are dropped."""
    max_line: int = Field(default=1000, ge=1)
    """Largest number of characters in a line; JSON, Markdown, TeX, R, SQL and some others have no
    limit on lines."""
    max_mean_line: float = Field(default=100, ge=1)
    """Largest mean number of characters per line, of the same files."""
    min_alnum: float = Field(default=0.25, ge=0, le=1)
    """Smallest share of letters and digits."""
    min_alpha: float = Field(default=0.25, ge=0, le=1)
    """Smallest share of letters under extensions that are often data."""
    min_data_alpha: float = Field(default=0.5, ge=0, le=1)
    """Smallest share of letters in JSON and YAML."""
    min_visible: int = Field(default=100, ge=0)
    """Smallest number of characters that an HTML file shows."""
    min_visible_share: float = Field(default=0.2, ge=0, le=1)
    """Smallest share of them."""
    min_data_chars: int = Field(default=50, ge=0)
    """Smallest number of characters of JSON and YAML."""
    max_data_chars: int = Field(default=5000, ge=1)
    """Largest number of characters of JSON and YAML."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare in the order of the published code."""
        extensions = [extension_of(path or "") for path in docs.paths or [""] * len(docs)]

        def among(names: frozenset[str]) -> np.ndarray:
            return np.array([extension in names for extension in extensions], bool)

        name, has_lines = "starcoder.", ~among(LONG_LINED)
        excluded = among(frozenset(self.exclude)).astype(np.float64)
        yield above(f"{name}extension", excluded, 0)
        yield above(f"{name}longest_line", docs["max_line_chars"], self.max_line, where=has_lines)
        mean = docs["mean_line_chars"]
        yield above(f"{name}mean_line", mean, self.max_mean_line, where=has_lines)
        alnum, alpha, is_data = docs["alnum_share"], docs["alpha_share"], among(DATA)
        yield below(f"{name}alnum", alnum, self.min_alnum, where=~among(ANY_ALNUM))
        yield below(f"{name}alpha", alpha, self.min_alpha, where=among(DATA_LIKE))
        yield below(f"{name}data_alpha", alpha, self.min_data_alpha, where=is_data)
        texts = docs.strings()
        marks = np.array([_XML_MARK in text[:_XML_HEAD_CHARS] for text in texts], np.float64)
        yield above(f"{name}xml", marks, 0, where=~among(XML_BASED))
        is_html, visible = among(HTML), np.zeros(len(docs))
        for index in np.flatnonzero(is_html & docs.alive):
            visible[index] = shown_chars(texts[index])
        yield below(f"{name}visible_chars", visible, self.min_visible, where=is_html)
        part = share(visible, docs["n_chars"])
        yield below(f"{name}visible_share", part, self.min_visible_share, where=is_html)
        yield below(f"{name}small", docs["n_chars"], self.min_data_chars, where=is_data)
        yield above(f"{name}large", docs["n_chars"], self.max_data_chars, where=is_data)
