"""A picture of two models: where the bytes went, part by part, as one self-contained SVG file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from puna.core.units import GIB, KIB, MIB
from puna.model.accounting import PART_LABELS, Accounting, Comparison, dtype_bytes
from puna.ui.report.svg import Scale, Svg

_WIDTH, _MARGIN, _LABELS = 1000.0, 30.0, 160.0
_SIZES = (172.0, 540.0)  # pixels of the bars; their numbers stand right of them
_DELTAS = (640.0, _WIDTH - _MARGIN)
_TOP, _ROW, _BAR, _SPACE = 132.0, 46.0, 15.0, 16.0
_NUMBER = 132.0  # width of a written difference
_CHAR = 7.2
_NAME_CHARS = 44
_GIB_FROM = 100 * GIB  # a largest bar of this size is written in GiB
_KIB_BELOW = 10 * MIB
_FIELDS = {
    "vocab_size": "vocabulary", "dim": "width", "n_layers": "layers", "n_heads": "heads",
    "n_kv_heads": "K/V heads", "ffn_dim": "FFN width", "max_seq_len": "context",
    "rope_theta": "RoPE theta", "rope_scaling": "RoPE scaling", "norm_eps": "norm epsilon",
    "tie_embeddings": "tied head",
}  # fmt: skip
_STYLE = """
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:13px;
fill:#27313d;font-variant-numeric:tabular-nums}
.paper{fill:#fff}text.title{font-size:21px;font-weight:650;fill:#16202c}
text.head,text.strong{font-weight:650;fill:#16202c}text.muted{fill:#66717e}text.small{font-size:12px}
.a{fill:#aab5c1}.b{fill:#2f6fd6}.more{fill:#dc8340}.less{fill:#35966a}
text.ona{fill:#16202c}text.onb{fill:#fff}
text.moretext{fill:#a04e16}text.lesstext{fill:#1c6b45}
.grid{stroke:#e9edf1}.zero{stroke:#97a2ae}.rule{stroke:#d5dbe1}
"""


@dataclass(frozen=True)
class _Line:
    """One row: bytes of both models, and what stands right of their bars."""

    label: str
    a: int
    b: int
    sums: bool = False
    remark_a: str = ""
    remark_b: str = ""


@dataclass(frozen=True)
class _Unit:
    """How bytes are written in the whole picture."""

    name: str
    n_bytes: int

    def text(self, n_bytes: int, sign: bool = False) -> str:
        """Write bytes: ``1,002``, ``+752``, ``0.5``."""
        value = n_bytes / self.n_bytes
        digits = 0 if value.is_integer() or abs(value) >= 10_000 else 1
        if 0 < abs(value) < 0.1:
            digits = 3
        if 0 < abs(value) < 0.0005 and not sign:
            return "< 0.001"
        text = f"{value:{'+' if sign and n_bytes else ''},.{digits}f}"
        return text.replace("-", "−")


def draw_comparison(comparison: Comparison, name_a: str, name_b: str) -> str:
    """Draw the parts of two models, their difference and their KV caches on one scale.

    Args:
        comparison: What :func:`puna.model.accounting.compare` returned.
        name_a: Name of the first model.
        name_b: Name of the second.

    Returns:
        The text of an SVG file, without references to anything outside it.
    """
    lines = _lines(comparison)
    unit = _unit(max(max(line.a, line.b) for line in lines))
    bottom = _TOP + sum(_ROW + (_SPACE if line.sums else 0) for line in lines)
    changes = [
        f"{_FIELDS.get(name, name)}  {_value(before)} → {_value(after)}"
        for name, (before, after) in comparison.changed.items()
    ]
    desc = "; ".join(f"{one.label}: {one.a:,} to {one.b:,} bytes" for one in lines)
    height = bottom + 68 + 20 * len(_flow(changes))
    svg = Svg(_WIDTH, height, f"Where the bytes went: {name_a} to {name_b}", f"{desc}.", "compare")
    svg.rect(0.0, 0.0, _WIDTH, height, "paper")
    _draw_head(svg, comparison, name_a, name_b, unit)
    sizes = Scale(0.0, max(max(line.a, line.b) for line in lines), *_SIZES)
    deltas = _delta_scale([line.b - line.a for line in lines])
    _draw_grid(svg, sizes, deltas, unit, bottom)
    y = _TOP
    for line in lines:
        if line.sums:
            svg.line((_MARGIN, y + _SPACE / 2), (_WIDTH - _MARGIN, y + _SPACE / 2), "rule")
            y += _SPACE
        _draw_line(svg, line, y, sizes, deltas, unit)
        y += _ROW
    _draw_foot(svg, bottom, changes)
    return svg.standalone(_STYLE)


def _lines(comparison: Comparison) -> list[_Line]:
    a, b, dtype = comparison.a, comparison.b, comparison.dtype
    width = dtype_bytes(dtype)
    lines = [
        _Line(PART_LABELS[one.name], one.a_params * width, one.b_params * width)
        for one in comparison.lines
    ]
    lines.append(_Line("all weights", a.n_bytes(dtype), b.n_bytes(dtype), sums=True))
    caches = a.kv_bytes(dtype=dtype), b.kv_bytes(dtype=dtype)
    remarks = _cache_text(a, dtype), _cache_text(b, dtype)
    lines.append(_Line("KV cache, full", *caches, True, *remarks))
    return lines


def _cache_text(cost: Accounting, dtype: str) -> str:
    per_token = cost.kv_bytes_per_token(dtype)
    return f"{cost.config.max_seq_len:,} tokens of {per_token / KIB:,.4g} KiB"


def _unit(largest: int) -> _Unit:
    if largest >= _GIB_FROM:
        return _Unit("GiB", GIB)
    return _Unit("KiB", KIB) if largest < _KIB_BELOW else _Unit("MiB", MIB)


def _delta_scale(deltas: list[int]) -> Scale:
    """Leave room for the written difference beyond the longest bar of each side."""
    low, high = min(0, *deltas), max(0, *deltas)
    start, end = _DELTAS
    if low < 0:
        start += _NUMBER
    if high > 0:
        end -= _NUMBER
    return Scale(float(low), float(high), start, end) if low < high else Scale(0.0, 1.0, start, end)


def _draw_head(svg: Svg, comparison: Comparison, name_a: str, name_b: str, unit: _Unit) -> None:
    svg.text(_MARGIN, 40.0, "Where the bytes went", "title")
    power = {"KiB": 10, "MiB": 20, "GiB": 30}[unit.name]
    note = f"{unit.name} = 2^{power} bytes; KV cache of one sequence"
    svg.text(_WIDTH - _MARGIN, 40.0, note, "small muted", text_anchor="end")
    x = _MARGIN
    for name, cost, cls in ((name_a, comparison.a, "a"), (name_b, comparison.b, "b")):
        svg.rect(x, 58.0, 13.0, 13.0, cls, rx=2)
        shown = name if len(name) <= _NAME_CHARS else f"…{name[1 - _NAME_CHARS :]}"
        text = f"{cost.n_params:,} parameters"
        svg.text(x + 20, 69.0, shown, "strong")
        svg.text(x + 34 + _CHAR * 1.2 * len(shown), 69.0, text, "muted")
        x += 64 + _CHAR * (1.2 * len(shown) + len(text))
    svg.text(_SIZES[0], 104.0, f"size, {unit.name} in {comparison.dtype}", "head")
    svg.text(_DELTAS[0], 104.0, f"difference, {unit.name}", "head")


def _draw_grid(svg: Svg, sizes: Scale, deltas: Scale, unit: _Unit, bottom: float) -> None:
    scale = Scale(0.0, sizes.high / unit.n_bytes, sizes.start, sizes.end)
    for tick in scale.ticks(5):
        x = scale(tick)
        svg.line((x, _TOP - 8), (x, bottom), "grid" if tick else "zero")
        svg.text(x, bottom + 16, f"{tick:,.10g}", "muted small", text_anchor="middle")
    svg.line((deltas(0.0), _TOP - 8), (deltas(0.0), bottom), "zero")


def _draw_line(svg: Svg, line: _Line, y: float, sizes: Scale, deltas: Scale, unit: _Unit) -> None:
    strong = "strong" if line.sums else ""
    middle = y + _ROW / 2
    svg.text(_LABELS, middle + 4, line.label, strong, text_anchor="end")
    for n, cls, top, remark in (
        (line.a, "a", middle - _BAR - 1, line.remark_a),
        (line.b, "b", middle + 1, line.remark_b),
    ):
        end = sizes(float(n))
        svg.rect(sizes.start, top, end - sizes.start, _BAR, cls, tip=f"{line.label}: {n:,} bytes")
        number = unit.text(n)
        svg.text(end + 6, top + 12, number, f"small {strong}")
        if _CHAR * len(remark) + 12 < end - sizes.start:
            svg.text(sizes.start + 8, top + 12, remark, f"small on{cls}")
        else:
            svg.text(end + 14 + _CHAR * len(number), top + 12, remark, "small muted")
    _draw_delta(svg, line, middle, deltas, unit)


def _draw_delta(svg: Svg, line: _Line, middle: float, deltas: Scale, unit: _Unit) -> None:
    delta = line.b - line.a
    zero, end = deltas(0.0), deltas(float(delta))
    cls = "more" if delta > 0 else "less"
    if delta:
        tip = f"{line.label}: {delta:+,} bytes"
        svg.rect(min(zero, end), middle - 10, abs(end - zero), 20.0, cls, tip=tip)
    anchor, gap = ("start", 7.0) if delta >= 0 else ("end", -7.0)
    colour = f"{cls}text strong" if delta else "muted"
    text = unit.text(delta, sign=True)
    if line.sums and line.a and delta:
        text += f" ({_ratio(line.a, line.b)})"
    svg.text(end + gap, middle + 4, text, colour, text_anchor=anchor)


def _ratio(a: int, b: int) -> str:
    return f"×{b / a:,.3g}" if b >= 2 * a else f"{b / a - 1:+.0%}".replace("-", "−")


def _draw_foot(svg: Svg, bottom: float, changes: list[str]) -> None:
    for index, row in enumerate(_flow(changes)):
        y = bottom + 50 + 20 * index
        if index == 0:
            svg.text(_MARGIN, y, "changed", "small muted")
        svg.text(_MARGIN + 62, y, row, "small")


def _flow(texts: list[str]) -> list[str]:
    """Set texts side by side in as few rows as fit the width."""
    most = int((_WIDTH - 2 * _MARGIN - 62) / (_CHAR * 0.95))
    rows: list[str] = []
    for text in texts:
        joined = f"{rows[-1]}   ·   {text}" if rows else text
        if rows and len(joined) <= most:
            rows[-1] = joined
        else:
            rows.append(text)
    return rows


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['kind']} ×{value['factor']:g}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"
