"""Pictures of the result: the parts of the model, bits per byte, the lineage of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from puna.ui.report.charts.frame import fits, shorten, x_axis
from puna.ui.report.svg import Scale, Svg, number, padded

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
            svg.text(at + 10, 22, text, f"t on-fill on-c{index}")
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
    row = 34.0 if wide else 46.0
    place = {node["fingerprint"]: index for index, node in enumerate(nodes)}
    edges = [
        (place[one["fingerprint"]], index, one["name"])
        for index, node in enumerate(nodes)
        for one in node["inputs"]
        if one["fingerprint"] in place
    ]
    most = 120.0 if wide else 56.0
    reaches = [14 + most * ((end - start - 1) / max(len(nodes) - 1, 1)) ** 0.7
               for start, end, _ in edges]  # fmt: skip
    spine = max(reaches, default=0.0) * 0.75 + 10  # a cubic goes three quarters of the way
    desc = "; ".join(
        f"{node['stage']} from {', '.join(one['stage'] for one in node['inputs']) or 'raw input'}"
        for node in nodes
    )
    svg = Svg(width, row * max(len(nodes), 1), "Lineage of the run", f"{desc}.", name)
    for (start, end, input_name), reach in zip(edges, reaches, strict=True):
        y, y_end, bend = (start + 0.5) * row, (end + 0.5) * row, spine - reach
        tip = f"{nodes[start]['stage']} to {nodes[end]['stage']} ({input_name})"
        svg.path(
            f"M{number(spine)},{number(y)}C{number(bend)},{number(y)} "
            f"{number(bend)},{number(y_end)} {number(spine)},{number(y_end)}",
            "edge" if end - start > 1 else "edge direct",
            tip=tip,
        )
    for index, node in enumerate(nodes):
        y = (index + 0.5) * row
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
