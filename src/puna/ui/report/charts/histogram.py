"""Histograms of a signal with its thresholds; bars of the same shares before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from puna.ui.report.charts.frame import BOLD_CHAR_WIDTH, CHAR_WIDTH, shorten
from puna.ui.report.svg import Svg, nice_ticks, tick_text

CARD_WIDTH = 336.0
_HEIGHT, _TOP, _FOOT = 142.0, 18.0, 22.0
_BAR = 9.0
_CUT = 3.0
Group = tuple[str, str, str]
"""Key of the counts, class of the colour, what it is called."""


def draw_histogram(
    counted: dict[str, Any],
    groups: Sequence[Group],
    marks: Sequence[tuple[float, str | None]],
    *,
    title: str,
    width: float,
    name: str,
    outline: str | None = None,
) -> Svg:
    """Draw the bins side by side, equally wide, the groups on top of each other.

    Args:
        counted: ``scale``, ``edges`` and ``counts``.
        groups: What is drawn, from the axis up.
        marks: Thresholds, each with the side that fails (``below``, ``above``, None).
        title: What is measured.
        width: Of the drawing.
        name: Unique in the page.
        outline: Key of counts that are drawn as a line over the bars, not on top of them.
    """
    edges = np.asarray(counted["edges"], np.float64)
    n = len(edges) - 1
    bars = [np.asarray(counted["counts"][key], np.float64) for key, _, _ in groups]
    total = np.sum(bars, axis=0)
    drawn = np.maximum(total, counted["counts"][outline]) if outline is not None else total
    most = _most_shown(drawn)
    svg = Svg(width, _HEIGHT, title, _describe(counted, groups, marks), name)
    bottom, per_bin = _HEIGHT - _FOOT, width / n
    scale = (bottom - _TOP - 6) / most

    def place(value: float) -> float:
        return float(np.interp(value, edges, np.arange(n + 1))) * per_bin

    _draw_failing(svg, marks, counted["scale"], place, width, bottom)
    below = np.zeros(n)
    for (_, cls, what), counts in zip(groups, bars, strict=True):
        for index in np.flatnonzero(counts).tolist():
            height = max(counts[index] * scale, 1.2)
            y = max(bottom - below[index] - height, _TOP)
            height = bottom - below[index] - y
            below[index] += height
            tip = f"{_range_text(counted, index)}: {int(counts[index]):,} {what}"
            svg.rect(index * per_bin + 0.5, y, max(per_bin - 1, 1), height, f"fill {cls}", tip=tip)
    if outline is not None:
        svg.path(_steps(counted["counts"][outline], per_bin, bottom, scale), "line strong-line c0")
    svg.line((0, bottom), (width, bottom), "axis")
    _label_tallest(svg, drawn, most, per_bin, bottom - scale * min(drawn.max(), most), width)
    _draw_ticks(svg, counted["scale"], edges, place, width, bottom)
    _draw_marks(svg, [(v, _line_at(v, side, counted["scale"], place)) for v, side in marks], bottom)
    return svg


def _most_shown(counts: np.ndarray) -> float:
    """Return the count at full height; one bin far above all others is cut off at the top."""
    largest, second = np.sort(np.append(counts, [0.0, 0.0]))[::-1][:2].tolist()
    return max(_CUT * second if largest > _CUT * second > 0 else largest, 1.0)


def _label_tallest(
    svg: Svg, counts: np.ndarray, most: float, per_bin: float, y: float, width: float
) -> None:
    """Write the largest count beside its bar; a bar that is cut off has a gap near its top."""
    index = int(counts.argmax())
    left, right = index * per_bin, (index + 1) * per_bin
    if counts[index] > most:
        svg.path(f"M{left:.1f},{_TOP + 12:.1f}L{right:.1f},{_TOP + 7:.1f}", "gap")
    text = f"{int(counts[index]):,}"
    if right + CHAR_WIDTH * len(text) + 4 < width:
        svg.text(right + 4, y + 10, text, "t muted num")
    else:
        svg.text(left - 4, y + 10, text, "t muted num", text_anchor="end")


def _draw_marks(svg: Svg, marks: Sequence[tuple[float, float]], bottom: float) -> None:
    """Draw thresholds as lines with their values above, which stay apart and inside."""
    ordered = sorted(marks, key=lambda mark: mark[1])
    end = -math.inf
    for value, x in ordered:
        svg.line((x, _TOP - 3), (x, bottom), "fault")
        text = tick_text(value)
        size = BOLD_CHAR_WIDTH * len(text)
        left = min(max(x - size / 2, 0.0), svg.width - size)
        left = max(left, end + 5)
        svg.text(left, 11, text, "t fault-text num")
        end = left + size


def _line_at(value: float, side: str | None, scale: str, place: Callable[[float], float]) -> float:
    """Draw a threshold of whole numbers between the last one that fails and the first that passes.

    Elsewhere the line is at the threshold itself.
    """
    shift = {"below": -0.5, "above": 0.5}.get(side or "", 0.0) if scale == "whole" else 0.0
    return place(value + shift)


def _draw_failing(
    svg: Svg, marks: Sequence[tuple[float, str | None]], scale: str,
    place: Callable[[float], float], width: float, bottom: float,
) -> None:  # fmt: skip
    for value, side in marks:
        x = _line_at(value, side, scale, place)
        if side == "below":
            svg.rect(0, _TOP, x, bottom - _TOP, "failing")
        elif side == "above":
            svg.rect(x, _TOP, width - x, bottom - _TOP, "failing")


def _draw_ticks(
    svg: Svg, scale: str, edges: np.ndarray, place: Callable[[float], float], width: float,
    bottom: float,
) -> None:  # fmt: skip
    low, high = float(edges[0]), float(edges[-1])
    if scale == "log":
        first = float(edges[edges > 0][0])
        powers = range(math.ceil(math.log10(first)), math.floor(math.log10(high)) + 1)
        ticks = [10.0**power for power in powers]
        ticks = [0.0, *ticks] if low == 0 else ticks
    elif scale == "whole":
        ticks = [tick for tick in nice_ticks(low + 0.5, high - 0.5, 6) if tick == int(tick)]
    else:
        inner = float(edges[-2]) if len(edges) > 3 else high  # the last bin may be a wide one
        ticks = nice_ticks(low, high if high - inner < 1.5 * (edges[1] - low) else inner, 4)
    end = -math.inf
    for tick in ticks:
        x, text = place(tick), tick_text(tick)
        half = CHAR_WIDTH * len(text) / 2
        anchor, left = ("start", x) if x < half else ("middle", x - half)
        if x > width - half:
            anchor, left = "end", x - 2 * half
        if left > end + 6:
            svg.line((x, bottom), (x, bottom + 4), "axis")
            svg.text(x, bottom + 16, text, "t muted num", text_anchor=anchor)
            end = left + 2 * half


def _steps(counts: Sequence[int], per_bin: float, bottom: float, scale: float) -> str:
    points = [f"M0,{bottom:.1f}"]
    for index, count in enumerate(counts):
        y = bottom - count * scale
        points.append(f"V{y:.1f}H{(index + 1) * per_bin:.1f}")
    return "".join([*points, f"V{bottom:.1f}"])


def _range_text(counted: dict[str, Any], index: int) -> str:
    low, high = counted["edges"][index], counted["edges"][index + 1]
    if counted["scale"] == "whole":
        return f"{int(low + 0.5)}"
    return f"{tick_text(low)} to {tick_text(high)}"


def _describe(
    counted: dict[str, Any], groups: Sequence[Group], marks: Sequence[tuple[float, str | None]]
) -> str:
    parts = [f"{sum(counted['counts'][key]):,} {what}" for key, _, what in groups]
    low, high = counted["edges"][0], counted["edges"][-1]
    limits = ", ".join(f"{side + ' ' if side else ''}{tick_text(value)}" for value, side in marks)
    text = f"{', '.join(parts)}; from {tick_text(low)} to {tick_text(high)}"
    return f"{text}; fails {limits}." if limits else f"{text}."


def draw_pairs(
    rows: Sequence[tuple[str, float, float | None]], *, title: str, width: float, name: str
) -> Svg:
    """Draw two bars per row: a share before and after.

    Args:
        rows: Name, share before, share after (None: only one is drawn).
        title: What the shares are of.
        width: Of the drawing.
        name: Unique in the page.
    """
    step = 2 * _BAR + 12
    svg = Svg(width, step * len(rows) + 2, title, _describe_pairs(rows), name)
    label, number = width * 0.4, 44.0
    room = width - label - number
    most = max((share for _, *pair in rows for share in pair if share), default=1.0)
    for index, (row, before, after) in enumerate(rows):
        y = index * step + 2
        svg.text(0, y + _BAR + 4, shorten(row, label - 8), "t")
        for offset, share, cls in ((0.0, before, "c7"), (_BAR + 1, after, "c0")):
            if share is None:
                continue
            svg.rect(label, y + offset, max(share / most * room, 1), _BAR, f"fill {cls}")
            x = label + share / most * room + 5
            svg.text(x, y + offset + _BAR, f"{share:.1%}", "t muted num small-text")
    return svg


def _describe_pairs(rows: Sequence[tuple[str, float, float | None]]) -> str:
    parts = []
    for row, before, after in rows:
        parts.append(f"{row} {before:.1%}" + ("" if after is None else f", then {after:.1%}"))
    return "; ".join(parts) + "."
