"""The page of ``puna chaos``: what was done to a training, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.core.fsio import write_text
from puna.ui.report.render import css, environment

PAGE_FILE = "chaos.html"


def write_page(verdicts: Sequence[dict[str, Any]], folder: Path, n_ranks: int) -> Path:
    """Write the page; return its path.

    Args:
        verdicts: Of the scenarios, as JSON.
        folder: Receives ``chaos.html``.
        n_ranks: Processes that trained.
    """
    template = environment().get_template("chaos.html.j2")
    path = folder / PAGE_FILE
    write_text(path, template.render(verdicts=verdicts, n_ranks=n_ranks, css=css("report.css")))
    return path
