"""Training curves: panels over an axis of steps, with checkpoints, faults and what was redone.

The curve is the one that led to the model. Steps of an earlier attempt that were done again lie
under it as a dashed line, inside a shaded band.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puna.ui.report.charts.frame import CHAR_WIDTH, x_axis, y_axis
from puna.ui.report.svg import Point, Scale, Svg, padded, polyline_path, thin_out

_LEFT = 52.0
_TITLE = 20.0
_BETWEEN = 16.0
_MOST_POINTS = 1200
SMOOTH_FROM = 60
"""Points from which on a curve has a running mean."""
_TALL, _SHORT = 230.0, 62.0


@dataclass(frozen=True)
class _Panel:
    field: str
    title: str
    cls: str
    height: float
    smooth: bool = False
    zero: bool = False


_PRETRAIN = (
    _Panel("loss", "loss (nats per token)", "c0", _TALL, smooth=True),
    _Panel("lr", "learning rate", "c1", _SHORT, zero=True),
    _Panel("grad_norm", "gradient norm", "c3", _SHORT, zero=True),
    _Panel("tokens_per_s", "tokens per second", "c2", _SHORT, zero=True),
)
_TUNING = (
    _Panel("loss", "loss on the assistant's tokens", "c0", 150.0, smooth=True),
    _Panel("lr", "learning rate", "c1", 44.0, zero=True),
)


def draw_curves(section: dict[str, Any], width: float, name: str, *, short: bool = False) -> Svg:
    """Draw the curves of a training job.

    Args:
        section: ``training`` of the report.
        width: Width of the drawing.
        name: Name of the drawing.
        short: Only the loss, lower, and the learning rate (fine-tuning).
    """
    fields: Sequence[str] = section["fields"]
    curve: Sequence[Sequence[Any]] = section["curve"]
    panels = [
        panel for panel in (_TUNING if short else _PRETRAIN)
        if any(row[fields.index(panel.field)] is not None for row in curve)
    ]  # fmt: skip
    tops, bottom = [], 20.0 if section["incidents"] else 0.0
    for panel in panels:
        tops.append(bottom + _TITLE)
        bottom += _TITLE + panel.height + _BETWEEN
    mfu = _mfu_per_rate(section)
    right = width - (46.0 if mfu and not short else 12.0)
    svg = Svg(width, bottom + 30, "Training curves", _describe(section), name)
    steps = Scale(*_step_range(curve), _LEFT, right)
    _draw_bands(svg, section, steps, tops[0] if tops else 0.0, bottom - _BETWEEN)
    for panel, top in zip(panels, tops, strict=True):
        _draw_panel(svg, section, panel, steps, top, mfu if panel.field == "tokens_per_s" else None)
    if tops:
        _draw_checkpoints(svg, section, steps, tops[0] + panels[0].height)
    _draw_faults(svg, section, steps, tops[0] if tops else 0.0, bottom - _BETWEEN)
    ticks = [tick for tick in steps.ticks(8 if width > 500 else 4) if tick == int(tick)]
    x_axis(svg, steps, bottom - _BETWEEN + 6, ticks, lambda step: f"{step:,.0f}")
    svg.text(right, bottom + 28, "step", "t muted", text_anchor="end")
    return svg


def _draw_panel(
    svg: Svg, section: dict[str, Any], panel: _Panel, steps: Scale, top: float, mfu: float | None
) -> None:
    at = section["fields"].index(panel.field)
    points = _points(section["curve"], at)
    replaced = [_points(stretch, at) for stretch in section["replaced"]]
    values = [y for line in (points, *replaced) for _, y in line]
    low, high = padded(values, zero=panel.zero)
    scale = Scale(low, high, top + panel.height, top)
    svg.text(_LEFT, top - 7, panel.title, "t label")
    y_axis(svg, scale, _LEFT, steps.end, 5 if panel.height > 100 else 2)
    if mfu:
        svg.text(svg.width, top - 7, "MFU", "t label", text_anchor="end")
        percent = Scale(low * mfu, high * mfu, scale.start, scale.end)
        for tick in percent.ticks(2):
            svg.text(steps.end + 6, percent(tick) + 4, f"{tick:.0%}", "t muted num")
    for line in replaced:
        svg.path(_path(line, steps, scale), "line replaced")
    smooth = panel.smooth and len(points) >= SMOOTH_FROM
    svg.path(_path(points, steps, scale), f"line {panel.cls}" + (" faint" if smooth else ""))
    if smooth:
        svg.path(_path(_smoothed(points), steps, scale), f"line {panel.cls} strong-line")


def _points(rows: Sequence[Sequence[Any]], at: int) -> list[Point]:
    return [
        (float(row[0]), float(row[at]))
        for row in rows
        if row[at] is not None and math.isfinite(row[at])
    ]


def _path(points: Sequence[Point], steps: Scale, values: Scale) -> str:
    return polyline_path([(steps(x), values(y)) for x, y in thin_out(points, _MOST_POINTS)])


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Centred running mean over about 3 % of the steps, in linear time."""
    half = max(len(points) // 60, 1)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smooth = []
    for index, (x, _) in enumerate(points):
        first, last = max(index - half, 0), min(index + half + 1, len(points))
        smooth.append((x, (sums[last] - sums[first]) / (last - first)))
    return smooth


def _draw_bands(svg: Svg, section: dict[str, Any], steps: Scale, top: float, bottom: float) -> None:
    for stretch in section["replaced"]:
        first, last = steps(stretch[0][0]), steps(stretch[-1][0])
        n = len(stretch)
        tip = f"steps {stretch[0][0]} to {stretch[-1][0]} were done again"
        svg.rect(first, top, max(last - first, 2.0), bottom - top, "band", tip=tip)
        if last - first > 7 * CHAR_WIDTH * 2:
            svg.text((first + last) / 2, bottom - 6, f"{n} done again", "t accent",
                     text_anchor="middle")  # fmt: skip


def _draw_checkpoints(svg: Svg, section: dict[str, Any], steps: Scale, y: float) -> None:
    for checkpoint in section["checkpoints"]:
        if checkpoint["step"] is None:
            continue
        x = min(max(steps(checkpoint["step"]), steps.start), steps.end)
        seconds = checkpoint["seconds"]
        took = f", {seconds:.2f} s" if isinstance(seconds, int | float) else ""
        svg.polyline([(x - 4, y), (x, y - 7), (x + 4, y), (x - 4, y)], "mark checkpoint",
                     tip=f"checkpoint at step {checkpoint['step']}{took}")  # fmt: skip


def _draw_faults(
    svg: Svg, section: dict[str, Any], steps: Scale, top: float, bottom: float
) -> None:
    for incident in section["incidents"]:
        step = incident.get("step")
        if step is None or not incident["is_fault"]:
            continue
        x = min(max(steps(step), steps.start), steps.end)
        text = str(incident.get("message") or f"{incident['what']} at step {step}")
        svg.line((x, top - 31), (x, bottom), "fault", tip=text)
        svg.circle(x, top - 31, 4.0, "fault-dot")
        room = CHAR_WIDTH * len(text)
        if x + room + 10 < svg.width:
            svg.text(x + 9, top - 27, text, "t fault-text")
        else:
            svg.text(max(x - 9, 0.93 * room), top - 27, text, "t fault-text", text_anchor="end")


def _step_range(curve: Sequence[Sequence[Any]]) -> tuple[float, float]:
    if not curve:
        return 0.0, 1.0
    return float(curve[0][0]), float(max(curve[-1][0], curve[0][0] + 1))


def _mfu_per_rate(section: dict[str, Any]) -> float | None:
    """MFU per token/s: constant in a job, so that one line serves both axes."""
    rate, mfu = section["median_tokens_per_s"], section["median_mfu"]
    return mfu / rate if rate and mfu else None


def _describe(section: dict[str, Any]) -> str:
    final, first = section["final_loss"], section["first_loss"]
    if final is None or first is None:
        return "No step has a loss."
    text = f"Over {section['n_steps']} steps the loss went from {first:.3f} to {final['mean']:.3f}."
    for incident in section["incidents"]:
        text += f" Fault: {incident.get('message') or incident['what']}."
    again = section["goodput"]["n_recomputed"]
    return text + (f" {again} steps were done again." if again else "")
