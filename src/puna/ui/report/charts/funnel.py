"""The funnel: documents (or bytes) flow from stage to stage, by source; what is dropped falls off.

The picture is drawn in two coordinates, *along* the flow and *across* it. On a wide page the flow
runs to the right, on a narrow one down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from puna.core.units import format_bytes, format_count
from puna.ui.report.charts.frame import colour_of, shorten, spread
from puna.ui.report.svg import Svg, number

Unit = Literal["docs", "bytes"]

_BAR = 12.0
_FALL = 16.0
_LINE = 14.0
_SHOWN_REASONS = 3


@dataclass(frozen=True)
class _Layout:
    width: float
    down: bool
    stream: float
    """Size of the first bar, across."""
    start: float
    """Where the first bar begins, along."""
    gap: float
    """From bar to bar, along."""
    top: float
    """Where the stream begins, across."""
    height: float

    def point(self, along: float, across: float) -> tuple[float, float]:
        return (across, along) if self.down else (along, across)


def _layout(width: float, n_steps: int, n_sources: int) -> _Layout:
    if width < 900:
        gap = 112.0
        stream = 150.0 if width < 500 else 330.0
        height = 14 + n_steps * gap + _BAR + 34 + n_sources * 18
        return _Layout(width, True, stream, 14.0, gap, 0.0, height)
    gap = min((width - 190 - _BAR) / max(n_steps, 1), 260.0)
    return _Layout(width, False, 230.0, 0.0, gap, 58.0, 58 + 230 + _FALL + 62)


def draw_funnel(section: dict[str, Any], unit: Unit, width: float, name: str) -> Svg:
    """Draw the flow of the data stages.

    Args:
        section: ``data`` of the report.
        unit: What the width of the stream means.
        width: Width of the drawing.
        name: Name of the drawing.
    """
    steps, sources = section["steps"], section["sources"]
    colours = colour_of(sources)
    layout = _layout(width, len(steps), len(sources))
    what = "documents" if unit == "docs" else "bytes"
    svg = Svg(width, layout.height, f"Funnel in {what}", _describe(steps, unit), name)
    total = max(1, *(step[f"kept_{unit}"] + step[f"rejected_{unit}"] for step in steps))
    per_px = total / layout.stream
    for index, step in enumerate(steps):
        _draw_step(svg, layout, index, step, sources, colours, unit, per_px)
    _draw_last(svg, layout, steps[-1], len(steps), sources, colours, unit, per_px)
    return svg


def _draw_step(
    svg: Svg, layout: _Layout, index: int, step: dict[str, Any], sources: Sequence[str],
    colours: dict[str, int], unit: Unit, per_px: float,
) -> None:  # fmt: skip
    along = layout.start + index * layout.gap
    fall_at = along + _BAR + (layout.gap - _BAR) * (0.3 if layout.down else 0.5)
    kept_px = step[f"kept_{unit}"] / per_px
    here, onward, fall = layout.top, layout.top, layout.top + kept_px + _FALL
    for source in sources:
        row = step["by_source"].get(source)
        if row is None:
            continue
        kept = row[f"kept_{unit}"] / per_px
        rejected = row[f"rejected_{unit}"] / per_px
        colour = f"c{colours[source]}"
        tip = f"{source}: {_amount(row[f'kept_{unit}'], unit)} kept"
        _bar(svg, layout, along, here, kept + rejected, f"fill {colour}", source)
        bend = (along + _BAR, along + layout.gap)
        _ribbon(svg, layout, bend, (here, onward), kept, f"ribbon {colour}", tip)
        gone = f"{source}: {_amount(row[f'rejected_{unit}'], unit)} dropped"
        _ribbon(svg, layout, (along + _BAR, fall_at), (here + kept, fall), rejected,
                "ribbon dropped", gone)  # fmt: skip
        here, onward, fall = here + kept + rejected, onward + kept, fall + rejected
    _label_bar(svg, layout, along, step["previous_label"], step, unit, before=True)
    if step[f"rejected_{unit}"] > 0:
        _draw_dropped(svg, layout, fall_at, layout.top + kept_px + _FALL, step, unit, per_px)


def _draw_dropped(
    svg: Svg, layout: _Layout, along: float, across: float, step: dict[str, Any], unit: Unit,
    per_px: float,
) -> None:  # fmt: skip
    size = max(step[f"rejected_{unit}"] / per_px, 1.5)
    _bar(svg, layout, along, across, size, "fill dropped-bar", "dropped", thickness=5.0)
    reasons = step["reasons"]
    total = step[f"rejected_{unit}"] + step[f"kept_{unit}"]
    share = step[f"rejected_{unit}"] / total if total else 0.0
    lines = [(f"− {_amount(step[f'rejected_{unit}'], unit)} ({share:.1%})", "t strong num")]
    ranked = sorted(reasons, key=lambda reason: -reason[unit])
    shown = ranked[: _SHOWN_REASONS if len(ranked) <= _SHOWN_REASONS else _SHOWN_REASONS - 1]
    if layout.down:
        x, room = layout.stream + 34, layout.width - layout.stream - 34
    else:
        x, room = along + 12, layout.gap - 22
    for reason in shown:
        amount = _short(reason[unit], unit)
        lines.append((shorten(f"{amount} {reason['reason']}", room), "t muted num"))
    hidden = step["n_reasons"] - len(shown)
    if hidden > 0:
        lines.append((f"and {hidden} more reason{'s' if hidden > 1 else ''}", "t muted"))
    tall = _LINE * (len(lines) - 1)
    if layout.down:
        y = along + 1
    elif size > tall + 24:  # at the foot of a long bar, where no stream passes
        y = across + size - tall - 1
    else:
        y = across + 9
    for number_, (text, cls) in enumerate(lines):
        svg.text(x, y + number_ * _LINE, text, cls)


def _draw_last(
    svg: Svg, layout: _Layout, step: dict[str, Any], index: int, sources: Sequence[str],
    colours: dict[str, int], unit: Unit, per_px: float,
) -> None:  # fmt: skip
    along = layout.start + index * layout.gap
    here = layout.top
    rows, centres = [], []
    for source in sources:
        row = step["by_source"].get(source)
        if row is None:
            continue
        size = row[f"kept_{unit}"] / per_px
        _bar(svg, layout, along, here, size, f"fill c{colours[source]}", source)
        rows.append((source, row))
        centres.append(here + size / 2)
        here += size
    _label_bar(svg, layout, along, step["label"], step, unit, before=False)
    for (source, row), centre in zip(rows, spread(centres, 32.0), strict=True):
        tokens = row["encoded_tokens"]
        detail = _short(row[f"kept_{unit}"], unit)
        detail += f" · {format_count(tokens)} tokens" if tokens is not None else ""
        if layout.down:
            y = along + _BAR + 24 + 18 * [name for name, _ in rows].index(source)
            svg.rect(0, y - 9, 10, 10, f"fill c{colours[source]}")
            svg.text(16, y, source, "t strong")
            svg.text(24 + 7.2 * len(source), y, detail, "t muted num")
        else:
            x = along + _BAR + 8
            svg.text(x, centre - 1, shorten(source, layout.width - x), "t strong")
            svg.text(x, centre + 13, shorten(detail, layout.width - x + 20), "t muted num")


def _label_bar(
    svg: Svg, layout: _Layout, along: float, state: str, step: dict[str, Any], unit: Unit, *,
    before: bool,
) -> None:  # fmt: skip
    if before:
        docs, n_bytes = (step[f"kept_{key}"] + step[f"rejected_{key}"] for key in ("docs", "bytes"))
    else:
        docs, n_bytes = step["kept_docs"], step["kept_bytes"]
    count, size = f"{docs:,} docs", format_bytes(n_bytes)
    main, side = (count, size) if unit == "docs" else (size, count)
    if layout.down:
        x = layout.stream + 34
        svg.text(x, along + 2, state, "t label")
        svg.text(x, along + 2 + _LINE, f"{main} · {side}", "t num")
        return
    svg.text(along, 14, state, "t label")
    svg.text(along, 31, main, "t strong num")
    svg.text(along, 46, side, "t muted num")


def _bar(
    svg: Svg, layout: _Layout, along: float, across: float, size: float, cls: str, tip: str,
    thickness: float = _BAR,
) -> None:  # fmt: skip
    if size <= 0:
        return
    size = max(size, 1.0)
    x, y = layout.point(along, across)
    if layout.down:
        svg.rect(x, y, size, thickness, cls, tip=tip)
    else:
        svg.rect(x, y, thickness, size, cls, tip=tip)


def _ribbon(
    svg: Svg, layout: _Layout, along: tuple[float, float], across: tuple[float, float],
    size: float, cls: str, tip: str,
) -> None:  # fmt: skip
    if size <= 0:
        return
    size = max(size, 0.8)
    (a, b), (p, q) = along, across
    mid = (a + b) / 2

    def at(along_: float, across_: float) -> str:
        x, y = layout.point(along_, across_)
        return f"{number(x)},{number(y)}"

    svg.path(
        f"M{at(a, p)}C{at(mid, p)} {at(mid, q)} {at(b, q)}L{at(b, q + size)}"
        f"C{at(mid, q + size)} {at(mid, p + size)} {at(a, p + size)}Z",
        cls,
        tip=tip,
    )


def _amount(value: float, unit: Unit) -> str:
    return f"{value:,} docs" if unit == "docs" else format_bytes(value)


def _short(value: float, unit: Unit) -> str:
    return f"{value:,}" if unit == "docs" else format_bytes(value)


def _describe(steps: Sequence[dict[str, Any]], unit: Unit) -> str:
    parts = []
    for index, step in enumerate(steps):
        start = step[f"kept_{unit}"] + step[f"rejected_{unit}"]
        head = f"{_amount(start, unit)} came in; " if index == 0 else ""
        parts.append(
            f"{head}{step['label']}: {_amount(step[f'kept_{unit}'], unit)} kept, "
            f"{_amount(step[f'rejected_{unit}'], unit)} dropped"
        )
    return "; ".join(parts) + "."
