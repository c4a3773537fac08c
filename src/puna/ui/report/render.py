"""Draws the collected values as one HTML page; every text from data is escaped."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from puna.core.units import format_bytes, format_count, format_duration
from puna.ui.report.charts.curves import SMOOTH_FROM, draw_curves
from puna.ui.report.charts.frame import colour_of, figure
from puna.ui.report.charts.funnel import draw_funnel
from puna.ui.report.charts.heldout import draw_heldout
from puna.ui.report.charts.results import (
    PART_NAMES,
    draw_evaluation,
    draw_lineage,
    draw_parts,
    shape_of,
)
from puna.ui.report.charts.time import (
    BUCKET_NAMES,
    draw_attempts,
    draw_goodput,
    draw_timeline,
    n_pauses,
)

TEMPLATES = Path(__file__).parent / "templates"
_PAGE = "report.html.j2"
BUCKET_MEANING = {
    "productive": "steps done for the first time",
    "recomputed": "steps done again after a rollback, and the step that a fault cut off",
    "checkpoint": "saving, while no step runs",
    "data": "steps that waited for their batch",
    "evaluation": "measuring held-out text, while no step runs",
    "detection": "from a fault until it is noticed",
    "restart_init": "processes, imports, building and loading the model",
    "preflight": "tests before the first step of each attempt",
    "other": "writing the final model and the like",
    "stopped": "the whole run was down and was started again later; not counted in the goodput",
}


def render(value: dict[str, Any], *, max_samples: int = 12) -> str:
    """Write the page.

    Args:
        value: What :func:`puna.ui.report.collect.collect` returned.
        max_samples: Samples shown.
    """
    data, tokens = value["data"], value["tokens"]
    sources = data["sources"] if data is not None else list(tokens["sources"]) if tokens else []
    samples = value["samples"]
    return (
        environment()
        .get_template(_PAGE)
        .render(
            value,
            css=css("report.css"),
            figures=_figures(value),
            colours=colour_of(sources),
            shown_samples=samples[:max_samples] if samples is not None else None,
            bucket_names=BUCKET_NAMES,
            bucket_meaning=BUCKET_MEANING,
            part_names=PART_NAMES,
            shape_of=shape_of,
            smooth_from=SMOOTH_FROM,
            n_pauses=n_pauses(value["stages"]),
        )
    )


def environment() -> jinja2.Environment:
    """Return the templates, with escaping on and the filters that they use."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "bytes": format_bytes,
        "count": format_count,
        "dur": format_duration,
        "n": lambda number: f"{number:,}",
        "pct": lambda share: f"{share:.1%}",
        "date": _date,
        "ticks": _ticks,
    }
    return made


def css(*names: str) -> Markup:
    """Return style sheets of the package, to stand in a page."""
    texts = (TEMPLATES / name for name in names)
    return Markup("\n".join(path.read_text(encoding="utf-8") for path in texts))


def _figures(value: dict[str, Any]) -> dict[str, Markup]:
    figures: dict[str, Markup] = {
        "timeline": figure("timeline", lambda w, n: draw_timeline(value["stages"], w, n)),
        "lineage": figure("lineage", lambda w, n: draw_lineage(value["lineage"], w, n)),
    }
    data, model, training = value["data"], value["model"], value["training"]
    if data is not None:
        figures["funnel_docs"] = figure("docs", lambda w, n: draw_funnel(data, "docs", w, n))
        figures["funnel_bytes"] = figure("bytes", lambda w, n: draw_funnel(data, "bytes", w, n))
    if model is not None:
        figures["parts"] = figure("parts", lambda w, n: draw_parts(model, w, n))
    if training is not None:
        figures["curves"] = figure("curves", lambda w, n: draw_curves(training, w, n))
        heldout = training["heldout"]
        if heldout is not None:
            figures["heldout"] = figure("heldout", lambda w, n: draw_heldout(heldout, w, n))
        goodput, attempts = training["goodput"], training["attempts"]
        figures["goodput"] = figure("goodput", lambda w, n: draw_goodput(goodput, w, n))
        figures["attempts"] = figure("attempts", lambda w, n: draw_attempts(attempts, w, n))
    tuning = (value["tuning"] or {}).get("training")
    if tuning is not None:
        figures["tuning"] = figure("tuning", lambda w, n: draw_curves(tuning, w, n, short=True))
    evaluation = value["evaluation"]
    if evaluation is not None:
        figures["evaluation"] = figure("bpb", lambda w, n: draw_evaluation(evaluation, w, n))
    return figures


def _ticks(text: str) -> Markup:
    """Escape a text and set what stands in back ticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _date(wall_s: float | None) -> str:
    if wall_s is None:
        return "unknown"
    return f"{dt.datetime.fromtimestamp(wall_s, tz=dt.UTC):%Y-%m-%d %H:%M} UTC"
