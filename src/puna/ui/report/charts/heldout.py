"""Bits per byte of held-out text over the steps of a training, a line per source."""

from __future__ import annotations

import math
from typing import Any

from puna.ui.report.charts.frame import CHAR_WIDTH, colour_of, spread, x_axis, y_axis
from puna.ui.report.svg import Scale, Svg, padded

_LEFT, _TOP, _HEIGHT = 52.0, 20.0, 190.0
_GAP = 15.0


def draw_heldout(heldout: dict[str, Any], width: float, name: str) -> Svg:
    """Draw the lines.

    Args:
        heldout: ``steps`` and ``sources`` (name -> bits per byte at each of them, None where it
            was not measured), all documents together as the first.
        width: Width of the drawing.
        name: Name of the drawing.
    """
    steps, sources = heldout["steps"], heldout["sources"]
    lines = {
        source: [
            (float(step), float(value))
            for step, value in zip(steps, values, strict=True)
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        for source, values in sources.items()
    }
    lines = {source: points for source, points in lines.items() if points}
    desc = "; ".join(f"{source} {points[-1][1]:.3f}" for source, points in lines.items())
    longest = max((len(source) for source in lines), default=0)
    right = width - min(CHAR_WIDTH * (longest + 7), 0.4 * width)
    svg = Svg(width, _TOP + _HEIGHT + 40, "Held-out bits per byte", f"At the end: {desc}.", name)
    low, high = padded([value for points in lines.values() for _, value in points])
    values = Scale(low, high, _TOP + _HEIGHT, _TOP)
    first, last = float(min(steps)), float(max(steps))
    at = Scale(first, last if last > first else first + 1, _LEFT, right)
    svg.text(_LEFT, _TOP - 7, "held-out bits per byte", "t label")
    y_axis(svg, values, _LEFT, right, 4)
    colours = colour_of(list(lines))
    order = sorted(lines, key=lambda source: -lines[source][-1][1])
    places = spread([values(lines[source][-1][1]) for source in order], _GAP)
    for source, y in zip(order, places, strict=True):
        points = lines[source]
        drawn = [(at(step), values(value)) for step, value in points]
        cls = f"line c{colours[source]}" + (" strong-line" if source == next(iter(lines)) else "")
        svg.polyline(drawn, cls)
        for (x, y_point), (step, value) in zip(drawn, points, strict=True):
            svg.circle(x, y_point, 2.5, f"fill c{colours[source]}",
                       tip=f"{source}, step {step:.0f}: {value:.4f}")  # fmt: skip
        svg.text(right + 8, y + 4, f"{source} {points[-1][1]:.3f}", "t num")
    ticks = [tick for tick in at.ticks(8 if width > 500 else 4) if tick == int(tick)]
    x_axis(svg, at, _TOP + _HEIGHT + 6, ticks, lambda step: f"{step:,.0f}")
    svg.text(right, _TOP + _HEIGHT + 36, "step", "t muted", text_anchor="end")
    return svg
