"""The page of ``puna mix report``: verdict, mix with intervals, parity, heat maps, noise, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.core.fsio import write_text
from puna.ui.report.charts.frame import figure, shorten, x_axis
from puna.ui.report.render import css, environment
from puna.ui.report.svg import Scale, Svg, padded, tick_text

_LANE, _BAR = 30.0, 12.0
_MOST_PARITY = 12
_CELL = 26.0


def write_page(values: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Args:
        values: What :func:`puna.mix.analyse.report_values` returned.
        path: The file.
    """
    made, helped = values["recommendation"], values["attribution"]
    sources, targets = values["sources"], values["targets"]
    figures = {
        "mix": figure("mix", lambda w, n: draw_mix(made, values["natural"], w, n)),
        "parity": figure(
            "parity", lambda w, n: draw_parity(values["parity"], values["per_target"], w, n)
        ),
        "duels": figure("duels", lambda w, n: draw_duels(made["baselines"], w, n)),
        "transfer": figure(
            "transfer",
            lambda w, n: draw_heat(
                "Worth of a token", helped["transfer"], targets, sources, w, n, signed=False
            ),
        ),
        "left_out": figure(
            "leftout",
            lambda w, n: draw_heat(
                "Loss without the source", helped["left_out"], targets, sources, w, n, signed=True
            ),
        ),
        "shapley": figure(
            "shapley",
            lambda w, n: draw_heat(
                "Shapley value", helped["shapley"], targets, sources, w, n, signed=True
            ),
        ),
    }
    template = environment().get_template("mix.html.j2")
    text = template.render(values, made=made, figures=figures, css=css("report.css", "mix.css"))
    write_text(path, text)


def draw_mix(made: Mapping[str, Any], natural: Mapping[str, float], width: float, name: str) -> Svg:
    """Draw the share of each source: bar, 90 % interval, region that is as good, natural share."""
    shares = made["mix"]
    low, high = made["interval"]["low"], made["interval"]["high"]
    flat = made["flat_region"]
    top = max(*high.values(), *shares.values(), *natural.values(), *flat["high"].values(), 0.05)
    desc = ", ".join(f"{source} {share:.0%}" for source, share in shares.items())
    svg = Svg(width, _LANE * len(shares) + 34, "Recommended shares", f"{desc}.", name)
    left, right = (190.0, 70.0) if width > 500 else (110.0, 46.0)
    x = Scale(0.0, top * 1.03, left, width - right)
    bottom = _LANE * len(shares)
    for row, (source, share) in enumerate(shares.items()):
        middle = _LANE * row + _LANE / 2
        svg.text(left - 8, middle + 4, shorten(source, left - 12), "t", text_anchor="end")
        a, b = flat["low"][source], flat["high"][source]
        svg.rect(x(a), middle - 11, x(b) - x(a), 22.0, "flat", tip=f"as good: {a:.1%} to {b:.1%}")
        svg.rect(
            x(0), middle - _BAR / 2, x(share) - x(0), _BAR, "bar", tip=f"{source}: {share:.1%}"
        )
        svg.line((x(low[source]), middle), (x(high[source]), middle), "whisker")
        for end in (low[source], high[source]):
            svg.line((x(end), middle - 4), (x(end), middle + 4), "whisker")
        at = x(natural.get(source, 0.0))
        svg.line((at, middle - 11), (at, middle + 11), "natural", tip="natural share")
        svg.text(width - right + 8, middle + 4, f"{share:.1%}", "t num")
    x_axis(svg, x, bottom + 4, x.ticks(6 if width > 500 else 3), lambda v: f"{v:.0%}")
    return svg


def draw_parity(
    parity: Mapping[str, Sequence[Sequence[float]]], errors: Mapping[str, Any], width: float,
    name: str,
) -> Svg:  # fmt: skip
    """Draw predicted against measured losses of unseen runs, one panel per target."""
    shown = list(parity.items())[:_MOST_PARITY]
    columns = 4 if width > 900 else 3 if width > 500 else 2
    size = width / columns
    panel = size - 34
    rows = -(-len(shown) // columns)
    words = ", ".join(
        f"{target} {errors[target]['spearman']:.2f}"
        for target, _ in shown
        if errors[target]["spearman"] is not None
    )
    desc = f"Spearman of predictions of runs that were left out: {words}."
    svg = Svg(width, rows * (panel + 56), "Predicted against measured", desc, name)
    for index, (target, pairs) in enumerate(shown):
        left = (index % columns) * size + 28
        top = (index // columns) * (panel + 56) + 20
        svg.text(left, top - 6, shorten(target, panel), "t strong")
        low, high = padded([value for pair in pairs for value in pair])
        x, y = Scale(low, high, left, left + panel), Scale(low, high, top + panel, top)
        svg.rect(left, top, panel, panel, "panel")
        svg.line((x(low), y(low)), (x(high), y(high)), "grid")
        for guess, true in pairs:
            svg.circle(x(true), y(guess), 2.2, "dot", tip=f"{true:.3f}, told {guess:.3f}")
        for tick in x.ticks(2):
            svg.text(x(tick), top + panel + 14, tick_text(tick), "t muted", text_anchor="middle")
        rho = errors[target]["spearman"]
        told = "" if rho is None else f"ρ {rho:.2f}"
        svg.text(left + 6, top + 15, told, "t muted")
    return svg


def draw_duels(baselines: Sequence[Mapping[str, Any]], width: float, name: str) -> Svg:
    """Draw the gain over each baseline with its 90 % interval; right of zero the mix is better."""
    desc = "; ".join(
        f"{one['name']}: gain {one['gain']:+.3f}, better with {one['probability']:.0%}"
        for one in baselines
    )
    svg = Svg(width, _LANE * len(baselines) + 34, "Gain over other mixes", f"{desc}.", name)
    left, right = (190.0, 70.0) if width > 500 else (120.0, 46.0)
    ends = [one[key] for one in baselines for key in ("gain_low", "gain_high")]
    x = Scale(*padded([*ends, 0.0]), left, width - right)
    bottom = _LANE * len(baselines)
    svg.line((x(0), 0.0), (x(0), bottom), "axis")
    for row, one in enumerate(baselines):
        middle = _LANE * row + _LANE / 2
        svg.text(left - 8, middle + 4, shorten(one["name"], left - 12), "t", text_anchor="end")
        svg.line((x(one["gain_low"]), middle), (x(one["gain_high"]), middle), "whisker")
        svg.circle(x(one["gain"]), middle, 5.0, "dot", tip=f"{one['gain']:+.4f}")
        svg.text(width - right + 8, middle + 4, f"{one['probability']:.0%}", "t num")
    x_axis(svg, x, bottom + 4, x.ticks(5 if width > 500 else 3))
    return svg


def draw_heat(
    title: str, values: Sequence[Sequence[float | None]], rows: Sequence[str],
    columns: Sequence[str], width: float, name: str, *, signed: bool,
) -> Svg:  # fmt: skip
    """Draw a matrix of targets and sources; the strength of a cell is its value's size."""
    known = [value for row in values for value in row if value is not None]
    most = max((abs(value) for value in known), default=1.0) or 1.0
    rows_shown = "; ".join(
        f"{target}: most from {columns[max(range(len(row)), key=lambda j: row[j] or 0.0)]}"
        for target, row in zip(rows, values, strict=True)
    )
    left = 190.0 if width > 500 else 100.0
    cell = min((width - left - 8) / len(columns), 90.0)
    tall = 120.0
    svg = Svg(width, tall + _CELL * len(rows) + 6, title, f"{rows_shown}.", name)
    for j, source in enumerate(columns):
        x = left + cell * (j + 0.5)
        svg.text(
            x, tall - 8, shorten(source, 130), "t muted",
            transform=f"rotate(-45 {x:.0f} {tall - 8:.0f})",
        )  # fmt: skip
    for i, (target, row) in enumerate(zip(rows, values, strict=True)):
        y = tall + _CELL * i
        svg.text(left - 8, y + 17, shorten(target, left - 12), "t", text_anchor="end")
        for j, value in enumerate(row):
            x = left + cell * j
            if value is None:
                svg.rect(x, y, cell - 2, _CELL - 2, "panel")
                continue
            kind = "against" if signed and value < 0 else "for"
            tip = f"{columns[j]} for {target}: {value:+.3f}" if signed else f"{value:.2f}"
            svg.rect(
                x, y, cell - 2, _CELL - 2, kind, fill_opacity=f"{abs(value) / most:.2f}", tip=tip
            )
            if cell > 44:
                text = f"{value:+.2f}" if signed else f"{value:.2f}"
                svg.text(x + cell / 2 - 1, y + 17, text, "t num cell", text_anchor="middle")
    return svg
