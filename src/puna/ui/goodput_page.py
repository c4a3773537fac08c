"""The page of ``puna goodput``: parts of the wall time, attempts, incidents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core.fsio import write_text
from puna.ui.report.charts.frame import figure
from puna.ui.report.charts.time import BUCKET_NAMES, draw_attempts, draw_goodput
from puna.ui.report.render import BUCKET_MEANING, css, environment


def write_page(found: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Args:
        found: ``run``, ``stage``, ``goodput``, ``attempts``, ``incidents`` and perhaps
            ``projection``, as the command prints them.
        path: The file.
    """
    goodput, attempts = found["goodput"], found["attempts"]
    figures = {
        "goodput": figure("goodput", lambda width, name: draw_goodput(goodput, width, name)),
        "attempts": figure("attempts", lambda width, name: draw_attempts(attempts, width, name)),
    }
    template = environment().get_template("goodput_page.html.j2")
    text = template.render(
        title=f"{found['stage']} of {Path(found['run']).name}", training=found, figures=figures,
        css=css("report.css"), bucket_names=BUCKET_NAMES, bucket_meaning=BUCKET_MEANING,
        projection=found.get("projection"),
    )  # fmt: skip
    write_text(path, text)
