"""A small SVG builder: escaped text, scales and ticks; colours are CSS classes of the page.

Charts carry no colours of their own, so that one drawing serves light, dark and print. Numbers are
written with one decimal, which is below a tenth of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from markupsafe import Markup

Point = tuple[float, float]

_MANTISSAS = (1.0, 2.0, 2.5, 5.0, 10.0)


def number(value: float) -> str:
    """Write a coordinate: one decimal, no trailing zero, no ``-0``."""
    text = f"{value:.1f}"
    return "0" if text in ("-0.0", "0.0") else text.removesuffix(".0")


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels.

    Attributes:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Pixel of the low end.
        end: Pixel of the high end (smaller than ``start`` on a y axis).
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; the middle when the scale is empty."""
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, n: int) -> list[float]:
        """Return about ``n`` round values inside the scale."""
        return nice_ticks(self.low, self.high, n)


def nice_ticks(low: float, high: float, n: int) -> list[float]:
    """Return about ``n`` round values (1, 2, 2.5, 5 times a power of ten) within [low, high]."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    raw = span / max(n, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in _MANTISSAS if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def padded(
    values: Iterable[float], *, pad: float = 0.06, zero: bool = False
) -> tuple[float, float]:
    """Return a range that holds all values with some air; (0, 1) when there is none.

    Args:
        values: Numbers; those that are not finite are left out.
        pad: Air on both sides, as a share of the range.
        zero: Begin at zero instead.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    if zero:
        return 0.0, high * (1 + pad) if high > 0 else 1.0
    air = (high - low) * pad or abs(high) * pad or 1.0
    return low - air, high + air


def tick_text(value: float) -> str:
    """Write a tick shortly: 0.0003 -> ``3e-4``, 1500 -> ``1.5k``, 2 -> ``2``."""
    magnitude = abs(value)
    if magnitude == 0:
        return "0"
    if magnitude >= 1e6:
        return f"{value / 1e6:.4g}M"
    if magnitude >= 1e4:
        return f"{value / 1e3:.4g}k"
    if magnitude < 1e-2:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


@dataclass
class Svg:
    """A drawing with a title and a description for those who cannot see it.

    Attributes:
        width: Width of the view box; the page scales the drawing down, never up.
        height: Height of the view box.
        title: Short name.
        desc: What the picture says, in a sentence.
        name: Part of the ids; unique in the page.
    """

    width: float
    height: float
    title: str
    desc: str
    name: str
    _parts: list[str] = field(default_factory=list)

    def add(self, tag: str, *, tip: str = "", text: str = "", **attributes: Any) -> None:
        """Add an element.

        Args:
            tag: Name of the element.
            tip: Text shown when the pointer rests on it.
            text: Its text content.
            **attributes: ``cls`` is ``class``; underscores become hyphens; floats are rounded;
                None is left out.
        """
        written = _attributes(attributes)
        inner = (f"<title>{escape(tip)}</title>" if tip else "") + escape(text)
        self._parts.append(f"<{tag}{written}>{inner}</{tag}>" if inner else f"<{tag}{written}/>")

    def text(self, x: float, y: float, text: str, cls: str = "", **attributes: Any) -> None:
        """Add a line of text; ``y`` is its baseline."""
        self.add("text", text=text, x=x, y=y, cls=cls or None, **attributes)

    def rect(
        self, x: float, y: float, width: float, height: float, cls: str, **attributes: Any
    ) -> None:
        """Add a rectangle; a negative size counts as zero."""
        size = {"width": max(width, 0.0), "height": max(height, 0.0)}
        self.add("rect", x=x, y=y, **size, cls=cls, **attributes)

    def line(self, a: Point, b: Point, cls: str, **attributes: Any) -> None:
        """Add a straight line."""
        self.add("line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], cls=cls, **attributes)

    def polyline(self, points: Sequence[Point], cls: str, **attributes: Any) -> None:
        """Add a line through points; gaps are points with NaN."""
        self.add("path", d=polyline_path(points), cls=cls, **attributes)

    def path(self, d: str, cls: str, **attributes: Any) -> None:
        """Add a path."""
        self.add("path", d=d, cls=cls, **attributes)

    def circle(self, x: float, y: float, r: float, cls: str, **attributes: Any) -> None:
        """Add a circle."""
        self.add("circle", cx=x, cy=y, r=r, cls=cls, **attributes)

    def standalone(self, style: str) -> str:
        """Return the drawing as the text of a file that needs no page around it.

        Args:
            style: CSS of its classes.
        """
        start, rest = self.markup().split(">", 1)
        return (
            f'{start} xmlns="http://www.w3.org/2000/svg"><style>{escape(style, quote=False)}'
            f"</style>{rest}\n"
        )

    def markup(self) -> Markup:
        """Return the drawing."""
        view = f"0 0 {number(self.width)} {number(self.height)}"
        title_id, desc_id = f"{self.name}-title", f"{self.name}-desc"
        head = (
            f'<svg class="chart" viewBox="{view}" width="{number(self.width)}" '
            f'height="{number(self.height)}" role="img" '
            f'aria-labelledby="{title_id} {desc_id}">'
            f'<title id="{title_id}">{escape(self.title)}</title>'
            f'<desc id="{desc_id}">{escape(self.desc)}</desc>'
        )
        return Markup(head + "".join(self._parts) + "</svg>")


def _attributes(attributes: dict[str, object]) -> str:
    written = []
    for name, value in attributes.items():
        if value is None:
            continue
        key = "class" if name == "cls" else name.replace("_", "-")
        text = number(value) if isinstance(value, float) else str(value)
        written.append(f' {key}="{escape(text, quote=True)}"')
    return "".join(written)


def polyline_path(points: Sequence[Point]) -> str:
    """Return the path data of a line; it is interrupted at points that are not finite."""
    data, pen_down = [], False
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen_down = False
            continue
        data.append(f"{'L' if pen_down else 'M'}{number(x)},{number(y)}")
        pen_down = True
    return "".join(data)


def thin_out(points: Sequence[Point], n_most: int) -> list[Point]:
    """Keep the lowest and the highest point of each of ``n_most / 2`` equal parts.

    A line of ten thousand steps then still shows every spike, at the size of a picture.
    """
    if len(points) <= n_most:
        return list(points)
    n_parts = max(n_most // 2, 1)
    kept: list[Point] = []
    for part in range(n_parts):
        piece = points[part * len(points) // n_parts : (part + 1) * len(points) // n_parts]
        low = min(range(len(piece)), key=lambda i: piece[i][1])
        high = max(range(len(piece)), key=lambda i: piece[i][1])
        kept += [piece[i] for i in sorted({low, high})]
    return kept
