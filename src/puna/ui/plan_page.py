"""The page of ``puna plan estimate`` and ``search``: one file, no request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from puna.core.fsio import write_text
from puna.core.units import GIB
from puna.plan.energy import Site
from puna.plan.estimate import PART_NAMES, Estimate, Level, Range
from puna.plan.fabric import REFERENCE, Fabric
from puna.plan.flops import CONVENTION, CONVENTIONS
from puna.plan.search import PREMIUMS, USABLE, Candidate, Found
from puna.ui.report.charts.frame import figure, fits, shorten, x_axis, y_axis
from puna.ui.report.render import css, environment
from puna.ui.report.svg import Scale, Svg, padded

_LANE = 30.0
_MOST_STAGES = 8
_MEMORY_COLOURS = {
    "weights": "c0", "gradients": "c1", "optimizer": "c2", "activations": "c3", "logits": "c4",
    "buffers": "c5", "fragments": "c7",
}  # fmt: skip


@dataclass(frozen=True)
class Searched:
    """What a search adds to the page of its best layout."""

    found: Found
    tokens: float
    """To train on."""
    site: Site


def write_page(
    path: Path, model: str, found: Estimate, levels: Sequence[Level],
    searched: Searched | None = None,
) -> None:  # fmt: skip
    """Write the page.

    Args:
        path: The file.
        model: What the model is called.
        found: The layout that is shown in full.
        levels: Its waterfall.
        searched: The search that it won, if any.
    """
    job = found.job
    figures = {
        "waterfall": figure("waterfall", lambda w, n: draw_levels(levels, w, n)),
        "time": figure("time", lambda w, n: draw_parts(found, w, n)),
        "memory": figure("memory", lambda w, n: draw_memory(found, w, n)),
    }
    shown: list[Candidate] = []
    if searched is not None:
        front = shown = worth_drawing(searched.found.front)
        figures["room"] = figure("room", lambda w, n: draw_front(front, "memory_gib", w, n))
        if len({one.n_gpus for one in front}) > 1:
            figures["money"] = figure("money", lambda w, n: draw_front(front, "usd", w, n))
    text = (
        environment()
        .get_template("plan.html.j2")
        .render(
            css=css("report.css", "plan.css"), figures=figures, found=found, job=job,
            title=f"{model} on {job.n_gpus:,} {job.gpu.name}", model=model, gib=GIB,
            memory_colours=_MEMORY_COLOURS, conventions=CONVENTIONS, convention=CONVENTION,
            parts=[(PART_NAMES[k], one) for k, one in found.parts.items() if one.mid > 0],
            assumptions=_assumptions(found, searched), searched=searched, short=_short,
            legend=legend_of(shown), n_drawn=len(shown),
            layout_name=layout_name, percent=_percent,
        )
    )  # fmt: skip
    write_text(path, text)


def layout_name(one: Candidate) -> str:
    """Return a layout in a few letters."""
    lay = one.layout
    name = f"tp{lay.tp} cp{lay.cp} pp{lay.pp}" + (f"x{lay.chunks}" if lay.chunks > 1 else "")
    name += f" mb{lay.micro_batch} {lay.sharding}"
    return name + ("" if lay.recompute == "none" else f" recompute {lay.recompute}")


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _percent(value: Range) -> str:
    return f"{100 * value.low:.1f} to {100 * value.high:.1f} %"


def _assumptions(found: Estimate, searched: Searched | None) -> list[tuple[str, str]]:
    """What was put in, and what nobody measured."""
    job, fabric = found.job, found.job.fabric
    mid, low, high = fabric.balance(job.n_gpus)
    rows = [
        ("batch", f"{job.global_batch:,} rows of {job.seq_len:,} tokens, {job.precision}"),
        ("peak", f"{found.workload.peak_low / 1e12:,.4g} TFLOPS, {job.gpu.hbm_tb_s:.3g} TB/s, "
                 f"{job.gpu.memory_gib:.3g} GiB, {job.gpu.nvlink_gb_s:.3g} GB/s in a domain of "
                 f"{job.gpu.domain}"),
        ("network", f"{fabric.kind}, {fabric.gbit:g} Gbit/s per GPU, oversubscription "
                    f"{fabric.oversubscription:g}{_leaves(fabric)}, {fabric.placement} placement"),
        ("load balancing", f"{mid:.0%} of the network, {low:.0%} to {high:.0%} (a prior, not "
                           f"measured; the fit contains {REFERENCE:.0%})"
         if fabric.efficiency is None else f"{mid:.0%} of the network, as given"),
    ]  # fmt: skip
    measured = job.gpu.measured
    if measured is not None:
        rows.append(("measured", f"products, copies and collectives of {measured.n_ranks} ranks; "
                     f"assumed: {', '.join(measured.assumed)}"))  # fmt: skip
    if job.gpu.runs:
        rows.append(("own runs", f"{len(job.gpu.runs)}; times multiplied by {found.factor:.3g}"))
    if searched is not None:
        site = searched.site
        price = job.gpu.usd_per_hour if site.usd_per_gpu_hour is None else site.usd_per_gpu_hour
        goodput = searched.found.goodput[job.n_gpus]
        rows += [
            ("price", f"{price:g} USD per GPU-hour"),
            ("power", f"{job.gpu.watts:g} W per GPU at {site.load:.0%}, hosts {site.host_share:.0%}"
                      f" more, PUE {site.pue:g}, {site.kg_per_kwh:g} kg CO2 per kWh"),
            ("goodput", f"{goodput:.1%}: failures as often as published, best intervals"),
            ("memory", f"layouts may take {USABLE:.0%} of a GPU's"),
            ("premiums", ", ".join(f"{name} {share:.0%}" for name, share in PREMIUMS.items())),
        ]  # fmt: skip
    return rows


def _leaves(fabric: Fabric) -> str:
    """Tell what is said of a fabric's leaves."""
    if not fabric.leaf:
        return ""
    kind = "rail-optimised leaves" if fabric.rails else "leaves"
    return f", {kind} of {fabric.leaf} GPUs at {fabric.leaf_oversubscription:g}"


def draw_levels(levels: Sequence[Level], width: float, name: str) -> Svg:
    """Draw what each loss takes from the peak, in TFLOPS per GPU."""
    shown = [levels[0]]
    shown += [b for a, b in pairwise(levels) if b.tflops < a.tflops]
    desc = "; ".join(f"{level.name}: {_short(level.tflops)} left" for level in shown)
    svg = Svg(width, _LANE * len(shown) + 28, "From the peak to what is left", f"{desc}.", name)
    left, right = (240.0, 118.0) if width > 500 else (122.0, 78.0)
    scale = Scale(0.0, levels[0].tflops, left, width - right)
    before = levels[0].tflops
    for index, level in enumerate(shown):
        y, lost = _LANE * index, before - level.tflops
        svg.text(left - 10, y + 19, shorten(level.name, left - 12), "t", text_anchor="end")
        svg.rect(left, y + 5, scale(level.tflops) - left, 20, "fill c0")
        tip = f"{level.name}: {_short(lost)} TFLOPS lost"
        at = scale(level.tflops)
        svg.rect(at, y + 5, max(scale(before) - at, 0.8 if index else 0), 20, "fill c4", tip=tip)
        label = _short(level.tflops) + (f" (−{_short(lost)})" if index else "")
        svg.text(scale(before) + 8, y + 19, label, "t num")
        before = level.tflops
    x_axis(svg, scale, _LANE * len(shown) + 4, scale.ticks(6 if width > 500 else 3))
    return svg


def draw_parts(found: Estimate, width: float, name: str) -> Svg:
    """Draw the seconds of each part with its 90 % interval."""
    parts = [(PART_NAMES[key], part) for key, part in found.parts.items() if part.mid > 0]
    desc = "; ".join(f"{what}: {part.mid / found.step_s.mid:.0%}" for what, part in parts)
    svg = Svg(width, _LANE * len(parts) + 28, "Time of a step", f"{desc}.", name)
    left, right = (240.0, 70.0) if width > 500 else (122.0, 52.0)
    scale = Scale(0.0, max(part.high for _, part in parts), left, width - right)
    for index, (what, part) in enumerate(parts):
        y = _LANE * index
        svg.text(left - 10, y + 19, shorten(what, left - 12), "t", text_anchor="end")
        tip = f"{what}: {_short(part.mid)} s, 90 %: {_short(part.low)} to {_short(part.high)} s"
        svg.rect(left, y + 5, max(scale(part.mid) - left, 0.8), 20, "fill c0", tip=tip)
        svg.line((scale(part.low), y + 15), (scale(part.high), y + 15), "whisker")
        for end in (part.low, part.high):
            svg.line((scale(end), y + 11), (scale(end), y + 19), "whisker")
        share = f"{part.mid / found.step_s.mid:.1%}"
        svg.text(max(scale(part.high), scale(part.mid)) + 8, y + 19, share, "t num")
    ticks = scale.ticks(6 if width > 500 else 3)
    x_axis(svg, scale, _LANE * len(parts) + 4, ticks, lambda s: f"{s:g} s")
    return svg


def draw_memory(found: Estimate, width: float, name: str) -> Svg:
    """Draw the bytes of each part per pipeline stage, beside what the GPU has."""
    n = len(found.stages)
    chosen = range(n) if n <= _MOST_STAGES else [*range(4), *range(n - 4, n)]
    rows = [(f"stage {stage}" if n > 1 else "each GPU", found.stages[stage]) for stage in chosen]
    capacity = found.workload.hbm_bytes / GIB
    desc = "; ".join(f"{what}: {sum(parts.values()) / GIB:.3g} GiB" for what, parts in rows)
    svg = Svg(width, _LANE * len(rows) + 46, "Memory", f"{desc}; capacity {capacity:g} GiB.", name)
    left, right = 74.0, 76.0
    most = max(capacity, *(sum(parts.values()) / GIB for _, parts in rows))
    scale = Scale(0.0, most, left, width - right)
    for index, (what, parts) in enumerate(rows):
        y, at = _LANE * index + 16, 0.0
        svg.text(left - 10, y + 19, what, "t", text_anchor="end")
        for part, n_bytes in parts.items():
            gib = n_bytes / GIB
            x, end = scale(at), scale(at + gib)
            tip = f"{part}: {gib:.2f} GiB"
            svg.rect(x, y + 5, end - x, 20, f"fill {_MEMORY_COLOURS[part]}", tip=tip)
            label = f"{gib:.1f}"
            if fits(label, end - x):
                colour = _MEMORY_COLOURS[part]
                svg.text((x + end) / 2, y + 19, label, f"on-fill on-{colour}", text_anchor="middle")
            at += gib
        svg.text(scale(at) + 8, y + 19, f"{at:.3g} GiB", "t num strong")
    bottom = _LANE * len(rows) + 20
    svg.line((scale(capacity), 12), (scale(capacity), bottom), "fault")
    svg.text(scale(capacity), 8, f"{capacity:.3g} GiB", "fault-text", text_anchor="middle")
    x_axis(svg, scale, bottom, scale.ticks(6 if width > 500 else 3))
    return svg


def draw_front(front: Sequence[Candidate], what: str, width: float, name: str) -> Svg:
    """Draw the Pareto front: days against memory per GPU, or against money.

    Args:
        front: The candidates that nothing beats.
        what: ``memory_gib`` or ``usd``.
        width: Of the drawing.
        name: Of the drawing.
    """
    pairs = [(one.days, one.memory_gib if what == "memory_gib" else one.bill.usd / 1e6)
             for one in front]  # fmt: skip
    title = "memory per GPU, GiB" if what == "memory_gib" else "million USD"
    best = min(front, key=lambda one: one.days)
    desc = f"{len(front)} layouts; fastest: {best.days:.1f} days, {layout_name(best)}."
    height, left, top = 320.0, 52.0, 26.0
    svg = Svg(width, height, f"Days against {title}", desc, name)
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    x = Scale(*padded(xs), left, width - 16)
    y = Scale(*padded(ys), height - 40, top)
    y_axis(svg, y, left, width - 16, 5)
    x_axis(svg, x, height - 40, x.ticks(6 if width > 500 else 4))
    svg.text(left, 12, title, "label")
    svg.text(width - 16, height - 6, "days", "t muted", text_anchor="end")
    counts = sorted({one.n_gpus for one in front})
    for one, (days, value) in zip(front, pairs, strict=True):
        colour = min(counts.index(one.n_gpus), 7)
        tip = (
            f"{one.n_gpus:,} GPUs, {layout_name(one)}: {days:.1f} days, "
            f"{one.bill.usd / 1e6:,.3g} million USD, {one.memory_gib:.0f} GiB"
        )
        svg.circle(x(days), y(value), 5.0, f"fill c{colour} dot", tip=tip)
    return svg


def worth_drawing(front: Sequence[Candidate]) -> list[Candidate]:
    """Leave out those that take over twice as long as the fastest of as many GPUs."""
    fastest: dict[int, float] = {}
    for one in front:
        fastest[one.n_gpus] = min(one.days, fastest.get(one.n_gpus, one.days))
    return [one for one in front if one.days <= 2 * fastest[one.n_gpus]]


def legend_of(front: Sequence[Candidate]) -> list[tuple[str, str]]:
    """Return colour and text of each number of GPUs."""
    counts = sorted({one.n_gpus for one in front})
    return [(f"c{min(i, 7)}", f"{n:,} GPUs") for i, n in enumerate(counts)]
