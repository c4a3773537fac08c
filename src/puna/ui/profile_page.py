"""The page of ``puna train profile``: parts of a step, kernels, and the gap to the peak."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core.fsio import write_text
from puna.core.units import format_duration
from puna.ui.report.charts.frame import figure, shorten
from puna.ui.report.render import css, environment
from puna.ui.report.svg import Scale, Svg

PAGE_FILE = "profile.html"
_LANE = 30.0
_COLOURS = {
    "attention": "c0", "feed-forward": "c1", "norms": "c2", "head and loss": "c3",
    "embedding": "c5", "optimiser": "c6", "communication": "c4", "data": "c5", "other": "c7",
}  # fmt: skip
"""Colours of the parts; what is no part of the model has those of a warning or of grey."""


def write_page(found: Mapping[str, Any], folder: Path, title: str) -> Path:
    """Write the page.

    Args:
        found: What :func:`puna.train.profile.profile_training` returned.
        folder: Receives ``profile.html``.
        title: What was profiled.

    Returns:
        Its path.
    """
    ranks = found["ranks"]
    figures = {
        "parts": figure("parts", lambda width, name: draw_parts(found["parts"], width, name)),
        "gap": figure("gap", lambda width, name: draw_gap(found["gap"], width, name)),
    }
    step_s = sum(found["parts"].values())
    text = (
        environment()
        .get_template("profile.html.j2")
        .render(
            found, css=css("report.css", "profile.css"), title=title, figures=figures,
            step_total_s=step_s,
            slowest=max(range(len(ranks)), key=lambda rank: ranks[rank]["step_s"]),
        )
    )  # fmt: skip
    path = folder / PAGE_FILE
    write_text(path, text)
    return path


def draw_parts(parts: Mapping[str, float], width: float, name: str) -> Svg:
    """Draw the share of a step's time of each part as bars."""
    total = sum(parts.values()) or 1.0
    desc = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in parts.items())
    svg = Svg(width, _LANE * len(parts), "Share of the time of a step", f"{desc}.", name)
    left, right = (150.0, 130.0) if width > 500 else (112.0, 100.0)
    scale = Scale(0.0, max(parts.values(), default=1.0) or 1.0, left, width - right)
    for index, (part, seconds) in enumerate(parts.items()):
        y = _LANE * index
        svg.text(left - 10, y + 18, part, "t", text_anchor="end")
        svg.rect(left, y + 4, max(scale(seconds) - left, 0.8), 20, f"fill {_COLOURS[part]}")
        label = f"{seconds / total:.1%}, {format_duration(seconds)}"
        svg.text(scale(seconds) + 8, y + 18, label, "t num")
    return svg


def draw_gap(gap: list[tuple[str, float]], width: float, name: str) -> Svg:
    """Draw how the time at the peak and the rest add up to the step, as a waterfall."""
    total = sum(seconds for _, seconds in gap)
    desc = ", ".join(f"{what} {seconds / total:.0%}" for what, seconds in gap)
    svg = Svg(width, _LANE * len(gap) + 2, "From the peak to the step", f"{desc}.", name)
    wide = width > 500
    left, right = (250.0, 90.0) if wide else (124.0, 62.0)
    scale = Scale(0.0, max(total, gap[0][1], 1e-12), left, width - right)
    at_s = 0.0
    for index, (what, seconds) in enumerate(gap):
        y, begin_s = _LANE * index, at_s
        at_s += seconds
        low, high = sorted((scale(begin_s), scale(at_s)))
        svg.text(left - 10, y + 18, shorten(what, left - 12), "t", text_anchor="end")
        cls = "fill c2" if index == 0 else "fill c4" if seconds >= 0 else "fill c7"
        tip = f"{what}, {format_duration(abs(seconds))}"
        svg.rect(low, y + 4, max(high - low, 0.8), 20, cls, tip=tip)
        if index + 1 < len(gap):
            svg.line((scale(at_s), y + 24), (scale(at_s), y + _LANE + 4), "grid")
        svg.text(high + 8, y + 18, f"{seconds / total:+.1%}" if index else f"{seconds / total:.1%}",
                 "t num")  # fmt: skip
    return svg
