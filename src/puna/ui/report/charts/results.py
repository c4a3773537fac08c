"""Pictures of the result: the parts of the model, bits per byte, the lineage of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from puna.ui.report.charts.frame import fits, shorten, x_axis
from puna.ui.report.svg import Scale, Svg, padded

PART_NAMES = {
    "embedding": "embedding",
    "output_head": "output head",
    "kv_projections": "keys and values",
    "qo_projections": "queries and output",
    "ffn": "feed-forward",
    "norms": "norms",
}
"""Parts of :mod:`puna.model.accounting` as they are called in the report."""
_ROW = 48.0
_SHAPES = ("before", "middle", "after")


def draw_parts(model: dict[str, Any], width: float, name: str) -> Svg:
    """Draw the parameters of a model as one bar of its parts."""
    total = max(model["n_params"], 1)
    parts = [(part, row["params"]) for part, row in model["parts"].items() if row["params"]]
    desc = ", ".join(f"{PART_NAMES.get(part, part)} {n / total:.1%}" for part, n in parts)
    svg = Svg(width, 36, "Parameters of the model by part", f"{desc}.", name)
    at = 0.0
    for index, (part, n) in enumerate(parts):
        size = n / total * width
        text = PART_NAMES.get(part, part)
        svg.rect(at, 0, max(size - 1, 0.8), 34, f"fill c{index}", tip=f"{text} {n / total:.1%}")
        if fits(text, size):
            svg.text(at + 10, 22, text, "t on-fill")
        at += size
    return svg


def draw_evaluation(evaluation: dict[str, Any], width: float, name: str) -> Svg:
    """Draw bits per byte of every source: one mark per model, joined by a line; left is better."""
    rows, models = evaluation["rows"], evaluation["models"]
    left = 130.0 if width > 500 else 84.0
    values = [value for row in rows for value in row["bits_per_byte"].values()]
    low, high = padded([0.0, *values], zero=True)
    scale = Scale(low, high, left, width - 24)
    height = _ROW * len(rows) + 44
    desc = "; ".join(
        f"{row['source']}: "
        + ", ".join(f"{model} {value:.3f}" for model, value in row["bits_per_byte"].items())
        for row in rows
    )
    svg = Svg(width, height, "Bits per byte of held-out documents", f"{desc}.", name)
    for tick in scale.ticks(8 if width > 500 else 4):
        svg.line((scale(tick), 0), (scale(tick), height - 40), "grid")
    for index, row in enumerate(rows):
        y = 24.0 + _ROW * index
        cls = "t strong" if row.get("is_total") else "t"
        svg.text(left - 12, y + 4, shorten(row["source"], left - 12), cls, text_anchor="end")
        known = [(m, row["bits_per_byte"][m]) for m in models if m in row["bits_per_byte"]]
        for (_, a), (_, b) in pairwise(known):
            svg.line((scale(a), y), (scale(b), y), "join")
        for model, value in known:
            _mark(svg, models.index(model), len(models), scale(value), y, f"{model}: {value:.4f}")
            below = len(models) > 2 and model == models[-1]
            svg.text(scale(value), y + (20 if below else -10), f"{value:.2f}", "t muted num",
                     text_anchor="middle")  # fmt: skip
    x_axis(svg, scale, height - 36, scale.ticks(8 if width > 500 else 4))
    svg.text(scale.end, height - 4, "bits per byte (less is better)", "t muted", text_anchor="end")
    return svg


def shape_of(index: int, n: int) -> str:
    """Name the mark of a model: the first is hollow, the last is full."""
    return _SHAPES[0] if index == 0 and n > 1 else _SHAPES[2] if index == n - 1 else _SHAPES[1]


def _mark(svg: Svg, index: int, n: int, x: float, y: float, tip: str) -> None:
    shape = shape_of(index, n)
    if shape == "middle":
        svg.circle(x, y, 5.5, "mark m-middle", tip=tip)
    elif shape == "before":
        svg.circle(x, y, 5.0, "mark m-before", tip=tip)
    else:
        svg.polyline([(x, y - 7), (x + 7, y), (x, y + 7), (x - 7, y), (x, y - 7)],
                     "mark m-after", tip=tip)  # fmt: skip


def draw_lineage(nodes: Sequence[dict[str, Any]], width: float, name: str) -> Svg:
    """Draw the stages in the order in which they were made; arcs lead from input to output."""
    wide = width > 500
    row_height = 34.0 if wide else 46.0
    place = {node["fingerprint"]: index for index, node in enumerate(nodes)}
    spine = 150.0 if wide else 70.0
    desc = "; ".join(
        f"{node['stage']} from {', '.join(one['stage'] for one in node['inputs']) or 'raw input'}"
        for node in nodes
    )
    height = row_height * max(len(nodes), 1)
    svg = Svg(width, height, "Lineage of the run", f"{desc}.", name)
    deepest = max(len(nodes) - 1, 1)
    for index, node in enumerate(nodes):
        y = row_height * index + row_height / 2
        for upstream in node["inputs"]:
            origin = place.get(upstream["fingerprint"])
            if origin is None:
                continue
            start = row_height * origin + row_height / 2
            reach = (spine - 12) * (0.12 + 0.88 * ((index - origin - 1) / deepest) ** 0.7)
            bend = spine - 6 - reach
            cls = "edge" if index - origin > 1 else "edge direct"
            ends = (f"{spine:.1f},{start:.1f}", f"{spine:.1f},{y:.1f}")
            bends = (f"{bend:.1f},{start:.1f}", f"{bend:.1f},{y:.1f}")
            tip = f"{upstream['stage']} to {node['stage']} ({upstream['name']})"
            svg.path(f"M{ends[0]}C{bends[0]} {bends[1]} {ends[1]}", cls, tip=tip)
    for index, node in enumerate(nodes):
        y = row_height * index + row_height / 2
        svg.circle(spine, y, 5.0, "node" + (" node-root" if not node["inputs"] else ""))
        _node_text(svg, node, place, spine + 16, y, wide)
    return svg


def _node_text(
    svg: Svg, node: dict[str, Any], place: Mapping[str, int], x: float, y: float, wide: bool
) -> None:
    names = [
        one["name"] if one["fingerprint"] in place else f"{one['name']} (elsewhere)"
        for one in node["inputs"]
    ]
    inputs = ", ".join(names) or "raw input"
    identity = node["fingerprint"][:12]
    if not wide:
        svg.text(x, y - 2, node["stage"], "t strong")
        svg.text(x, y + 12, shorten(f"{identity} ← {inputs}", svg.width - x), "t muted mono")
        return
    svg.text(x, y + 4, node["stage"], "t strong")
    svg.text(x + 130, y + 4, identity, "t mono")
    room = (svg.width - x - 240) / 2
    svg.text(x + 240, y + 4, shorten(f"← {inputs}", room), "t muted")
    svg.text(svg.width, y + 4, shorten(node["result"], room), "t muted num", text_anchor="end")
