"""What Jupyter notebooks leave behind in text: prompts, pictures, progress bars, widgets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar

from puna.data.filters.base import Finding, register
from puna.data.filters.batch import TextBatch
from puna.data.filters.cleaning import Cleaning, Cut, clean, of_lines

_CUTS = {
    "terminal": Cut(re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")),
    "pictures": Cut(re.compile(
        r"!\[[^\]\n]*\]\((?:data:image/|attachment:)[^)\s]*\)|<img[^>]*\bsrc=[\"']data:[^>]*>"
        r"|(?:^|(?<=[\"'\s(]))data:image/[\w.+-]+;base64,[A-Za-z0-9+/=]{64,}"
        r"|\biVBORw0KGgo[A-Za-z0-9+/=\n]{64,}", re.MULTILINE)),
    "widgets": of_lines(
        r"(?:HBox|VBox|IntProgress|FloatProgress|HTML|Output|interactive)\((?:children=|value=).*"
        r"|\{\"model_id\":\s*\"[0-9a-f]{32}\".*"
        r"|.*application/vnd\.jupyter\.widget-(?:view|state)\+json.*"),
    "progress": of_lines(r"(?:.{0,60}?:\s*)?\d{1,3}%\|[^|\n]*\|.*(?:it/s|s/it|\]).*"),
    "objects": of_lines(
        r"(?:Out\s*\[\d*\]:\s*)?(?:<Figure size [\d.]+x[\d.]+ with \d+ Axes>"
        r"|<(?:matplotlib|seaborn|IPython|pandas|bokeh|plotly|altair)[\w.]* (?:object )?at "
        r"0x[0-9a-f]+>|\[?<[\w.]+\.(?:Line2D|Patch|Text|AxesImage)[\w. ]* at 0x[0-9a-f]+>\]?)"),
    "prompts": Cut(re.compile(r"^[ \t]*(?:In|Out)\s*\[[\d* ]*\]:[ \t]*(?:\n(?:[ \t]*\n)*)?",
                              re.MULTILINE)),
    "empty_cells": Cut(re.compile(r"^(?P<fence>```+|~~~+)[\w{}.+-]*[ \t]*\n\s*(?P=fence)[ \t]*$\n?"
                                  r"|^# ?%%[^\n]*\n(?:[ \t]*\n)*(?=# ?%%|\Z)", re.MULTILINE)),
}  # fmt: skip


@register("notebook")
class Notebook(Cleaning):
    """Cleans notebooks that are text already; ingest makes text of ``.ipynb`` files (rules ours).

    Rewrites what it keeps.
    """

    cuts: ClassVar[Mapping[str, Cut]] = _CUTS
    reasons: ClassVar[dict[str, str]] = {
        "notebook.terminal": "colour codes of terminals cut out (measured only)",
        "notebook.pictures": "pictures as base64 cut out (measured only)",
        "notebook.widgets": "lines of widget state cut out (measured only)",
        "notebook.progress": "lines of progress bars cut out (measured only)",
        "notebook.objects": "lines that only name an object in memory cut out (measured only)",
        "notebook.prompts": "prompts `In [1]:` and `Out[1]:` cut out (measured only)",
        "notebook.empty_cells": "cells without text cut out (measured only)",
        "notebook.emptied": "fewer characters than `min_left` are left of a text that was cut",
    }

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Cut out, count, and look at what is left."""
        yield from clean("notebook", docs, _CUTS, self.off, self.min_left)
