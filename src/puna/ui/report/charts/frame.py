"""What all charts share: one drawing per width of the page, colours of sources, panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from puna.ui.report.svg import Scale, Svg, nice_ticks, tick_text

WIDTHS = {"l": 1040.0, "m": 680.0, "s": 340.0}
"""Widths drawn; the page shows the one that fits, so that text keeps its size."""
N_COLOURS = 8
_TIME_UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
CHAR_WIDTH = 6.6
"""Pixels of an average character at the size of chart text, on the safe side."""
BOLD_CHAR_WIDTH = 7.6


def figure(name: str, draw: Callable[[float, str], Svg]) -> Markup:
    """Draw a chart for every width.

    Args:
        name: Unique in the page.
        draw: ``(width, name of the drawing)`` -> drawing.
    """
    drawings = Markup("").join(
        Markup('<div class="w-{}">{}</div>').format(size, draw(width, f"{name}-{size}").markup())
        for size, width in WIDTHS.items()
    )
    return Markup('<div class="figure">{}</div>').format(drawings)


def colour_of(sources: Sequence[str]) -> dict[str, int]:
    """Give every source the number of its colour; beyond eight the last one is shared."""
    return {source: min(index, N_COLOURS - 1) for index, source in enumerate(sources)}


def shorten(text: str, width: float) -> str:
    """Cut a text to a width in pixels, with an ellipsis."""
    n = max(int(width / CHAR_WIDTH), 2)
    return text if len(text) <= n else text[: n - 1] + "…"


def fits(text: str, width: float) -> bool:
    """Tell whether a bold text fits into a bar, with some air on both sides."""
    return BOLD_CHAR_WIDTH * len(text) + 18 < width


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move label positions (ascending) down until neighbours are ``gap`` apart."""
    moved: list[float] = []
    for position in positions:
        moved.append(max(position, moved[-1] + gap) if moved else position)
    return moved


def y_axis(
    svg: Svg, scale: Scale, left: float, right: float, n_ticks: int,
    text: Callable[[float], str] = tick_text,
) -> None:  # fmt: skip
    """Draw horizontal grid lines with their values left of them."""
    for tick in scale.ticks(n_ticks):
        y = scale(tick)
        svg.line((left, y), (right, y), "grid")
        svg.text(left - 7, y + 4, text(tick), "t muted num", text_anchor="end")


def time_axis(svg: Svg, scale: Scale, y: float, n_ticks: int) -> None:
    """Draw an axis of seconds from zero, with ticks at round times of one unit."""
    name, unit_s = next(
        (name, unit_s) for name, unit_s in _TIME_UNITS if scale.high >= 2 * unit_s or unit_s == 1
    )
    ticks = [tick * unit_s for tick in nice_ticks(0.0, scale.high / unit_s, n_ticks)]
    x_axis(svg, scale, y, ticks, lambda s: _time_text(s, name, unit_s))


def _time_text(seconds: float, name: str, unit_s: float) -> str:
    if seconds == 0:
        return "0"
    if unit_s == 60 and seconds < 60:
        return f"{seconds:g} s"
    return f"{seconds / unit_s:g} {name}"


def x_axis(
    svg: Svg, scale: Scale, y: float, ticks: Sequence[float],
    text: Callable[[float], str] = tick_text,
) -> None:  # fmt: skip
    """Draw a base line with ticks and their values below."""
    svg.line((scale.start, y), (scale.end, y), "axis")
    for tick in ticks:
        x = scale(tick)
        svg.line((x, y), (x, y + 4), "axis")
        svg.text(x, y + 17, text(tick), "t muted num", text_anchor="middle")
