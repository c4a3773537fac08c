"""A picture of two tokenizers: bytes per token, and from where on the larger vocabulary pays."""

from __future__ import annotations

import math

from puna.core.units import MIB, format_count
from puna.tokens.compare import SourceTokens, TokenizerComparison
from puna.ui.report.svg import Scale, Svg

_WIDTH, _MARGIN, _LABELS = 1000.0, 30.0, 140.0
_TOP, _ROW, _BAR = 150.0, 54.0, 17.0
_CURVE_HEIGHT = 210.0
_PARAMS = (1e8, 1e12)
_NAME_CHARS = 60
_STYLE = """
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:13px;
fill:#27313d;font-variant-numeric:tabular-nums}
.paper{fill:#fff}text.title{font-size:21px;font-weight:650;fill:#16202c}
text.head,text.strong{font-weight:650;fill:#16202c}text.muted{fill:#66717e}
.a{fill:#aab5c1}.b{fill:#2f6fd6}text.less{fill:#1c6b45;font-weight:650}text.more{fill:#a04e16}
.grid{stroke:#e9edf1}.zero{stroke:#66717e;stroke-dasharray:4 3}.rule{stroke:#d5dbe1}
.curve{fill:none;stroke:#2f6fd6;stroke-width:2.5}.even{fill:#dc8340}
"""


def draw_comparison(found: TokenizerComparison, name_a: str, name_b: str) -> str:
    """Draw bytes per token of each source, and the cost of a byte of text by size of the model.

    Args:
        found: The comparison.
        name_a: Name of the first tokenizer.
        name_b: Name of the second.

    Returns:
        The text of an SVG file, without references to anything outside it.
    """
    rows = [*found.sources, found.total] if len(found.sources) > 1 else list(found.sources)
    bottom = _TOP + _ROW * len(rows)
    height = bottom + _CURVE_HEIGHT + 122
    desc = "; ".join(
        "{}: {:.2f} and {:.2f} bytes per token".format(one.name, *one.bytes_per_token)
        for one in rows
    )
    svg = Svg(_WIDTH, height, f"Two tokenizers: {name_a} and {name_b}", f"{desc}.", "tokens")
    svg.rect(0.0, 0.0, _WIDTH, height, "paper")
    _draw_head(svg, found, name_a, name_b)
    most = max(max(one.bytes_per_token) for one in rows)
    scale = Scale(0.0, most, _LABELS, _WIDTH - 190)
    for tick in scale.ticks(6):
        svg.line((scale(tick), _TOP - 14), (scale(tick), bottom - 6), "grid")
    for index, one in enumerate(rows):
        _draw_row(svg, one, _TOP + _ROW * index, scale, one is rows[-1] and len(rows) > 1)
    _draw_curve(svg, found, bottom + 62)
    return svg.standalone(_STYLE)


def _draw_head(svg: Svg, found: TokenizerComparison, name_a: str, name_b: str) -> None:
    svg.text(_MARGIN, 40, "What a larger vocabulary costs, and what it saves", "title")
    for index, name in enumerate((name_a, name_b)):
        y = 70.0 + 22 * index
        svg.rect(_MARGIN, y - 11, 13.0, 13.0, "ab"[index])
        shown = name if len(name) <= _NAME_CHARS else "…" + name[1 - _NAME_CHARS :]
        size = f"{found.vocab_sizes[index]:,} ids, {found.vocab_bytes[index] / MIB:,.0f} MiB"
        what = "embedding" if found.tied else "embedding and head"
        svg.text(_MARGIN + 22, y, shown, "strong")
        svg.text(_WIDTH - _MARGIN, y, f"{size} of {what}", text_anchor="end")
    svg.text(_MARGIN, _TOP - 24, "bytes per token (more is better)", "head")
    svg.text(_WIDTH - _MARGIN, _TOP - 24, "tokens of B against A", "head", text_anchor="end")


def _draw_row(svg: Svg, one: SourceTokens, y: float, scale: Scale, sums: bool) -> None:
    if sums:
        svg.line((_MARGIN, y - 9), (_WIDTH - _MARGIN, y - 9), "rule")
    svg.text(_MARGIN, y + _BAR + 5, one.name, "strong" if sums else "")
    for index, value in enumerate(one.bytes_per_token):
        top = y + index * (_BAR + 2)
        svg.rect(_LABELS, top, scale(value) - _LABELS, _BAR, "ab"[index], tip=f"{value:.3f}")
        svg.text(scale(value) + 8, top + 13, f"{value:.2f}", "strong" if index else "muted")
    change = one.b / one.a - 1 if one.a else 0.0
    text = f"{change:+.1%}".replace("-", "−")
    svg.text(_WIDTH - _MARGIN, y + _BAR + 5, text, "less" if change < 0 else "more",
             text_anchor="end")  # fmt: skip


def _draw_curve(svg: Svg, found: TokenizerComparison, top: float) -> None:
    """Draw what a byte of text costs with B against A, by the parameters of the layers."""
    total, (size_a, size_b) = found.total, found.vocab_sizes
    tokens = total.b / total.a if total.a else 1.0

    def cost(params: float) -> float:
        return tokens * (params + size_b * found.dim) / (params + size_a * found.dim)

    x = Scale(math.log10(_PARAMS[0]), math.log10(_PARAMS[1]), _LABELS, _WIDTH - _MARGIN - 10)
    points = [(params, cost(params)) for params in _steps()]
    values = [value for _, value in points]
    low, high = min(*values, 1.0), max(*values, 1.0)
    air = 0.08 * (high - low) or 0.1
    y = Scale(low - air, high + air, top + _CURVE_HEIGHT, top + 14)
    svg.text(
        _MARGIN,
        top - 8,
        f"work, and weights read, per byte of text: B against A, at width {found.dim:,}",
        "head",
    )
    for tick in y.ticks(5):
        svg.line((x.start, y(tick)), (x.end, y(tick)), "grid")
        svg.text(x.start - 9, y(tick) + 4, f"{tick:.2f}", "muted", text_anchor="end")
    for exponent in range(8, 13):
        params = 10.0**exponent
        svg.text(x(exponent), y.start + 20, format_count(params), "muted", text_anchor="middle")
    svg.text(x.end, y.start + 40, "parameters in the layers", "muted", text_anchor="end")
    svg.line((x.start, y(1.0)), (x.end, y(1.0)), "zero")
    svg.polyline([(x(math.log10(params)), y(value)) for params, value in points], "curve")
    even = found.break_even_params
    if even is not None and _PARAMS[0] < even < _PARAMS[1]:
        at = x(math.log10(even))
        svg.circle(at, y(1.0), 6.0, "even")
        larger = "B" if size_b > size_a else "A"
        text = f"{larger} costs less from {format_count(even)} parameters on"
        right = at > (x.start + x.end) / 2
        svg.text(at + (-12 if right else 12), y(1.0) - 10, text, "strong",
                 text_anchor="end" if right else "start")  # fmt: skip


def _steps() -> list[float]:
    low, high = (math.log10(params) for params in _PARAMS)
    return [10 ** (low + (high - low) * i / 120) for i in range(121)]
