"""Pictures of the planner: the waterfall from peak to goodput, and the residuals of validation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from puna.plan.estimate import Estimate, Level
from puna.plan.validate import Dossier
from puna.ui.report.svg import Scale, Svg

_WIDTH, _MARGIN = 1000.0, 30.0
_LABELS, _TOP, _ROW, _BAR = 300.0, 96.0, 34.0, 20.0
_STYLE = """
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:13px;
fill:#27313d;font-variant-numeric:tabular-nums}
.paper{fill:#fff}text.title{font-size:21px;font-weight:650;fill:#16202c}
text.strong{font-weight:650;fill:#16202c}text.muted{fill:#66717e}
.left{fill:#2f6fd6}.lost{fill:#dc8340}text.losttext{fill:#a04e16}
.grid{stroke:#e9edf1}.zero{stroke:#66717e}.band{fill:#eef3fb}.dot{fill:#2f6fd6;fill-opacity:.55}
"""


def draw_waterfall(levels: Sequence[Level], found: Estimate) -> str:
    """Draw what each loss takes from the peak.

    Args:
        levels: What :meth:`puna.plan.estimate.Estimate.waterfall` returned.
        found: The estimate.

    Returns:
        The text of an SVG file, without references to anything outside it.
    """
    shown = [levels[0]]
    for level in levels[1:]:
        if level.tflops < shown[-1].tflops:
            shown.append(level)
    height = _TOP + _ROW * len(shown) + 50
    desc = "; ".join(f"{level.name}: {level.tflops:.0f} TFLOPS per GPU left" for level in shown)
    job = found.job
    svg = Svg(_WIDTH, height, "From the peak to what is left", f"{desc}.", "waterfall")
    svg.rect(0.0, 0.0, _WIDTH, height, "paper")
    svg.text(_MARGIN, 40, "From the peak to what is left", "title")
    lay = job.layout
    svg.text(
        _MARGIN, 64, f"{job.n_gpus:,} {job.gpu.name}, {job.precision}; dp {job.dp}, tp {lay.tp}, "
        f"cp {lay.cp}, pp {lay.pp}; TFLOPS per GPU (model FLOPs, no causal discount)", "muted",
    )  # fmt: skip
    scale = Scale(0.0, levels[0].tflops, _LABELS, _WIDTH - 150)
    for tick in scale.ticks(6):
        svg.line((scale(tick), _TOP - 8), (scale(tick), height - 42), "grid")
        svg.text(scale(tick), height - 24, f"{tick:,g}", "muted", text_anchor="middle")
    before = levels[0].tflops
    for index, level in enumerate(shown):
        y = _TOP + _ROW * index
        svg.text(_LABELS - 12, y + 15, level.name, "strong", text_anchor="end")
        svg.rect(_LABELS, y, scale(level.tflops) - _LABELS, _BAR, "left")
        lost = before - level.tflops
        tip = f"{level.name}: -{lost:.1f}"
        svg.rect(scale(level.tflops), y, scale(before) - scale(level.tflops), _BAR, "lost", tip=tip)
        svg.text(scale(before) + 8, y + 15, f"{level.tflops:,.0f}", "strong")
        if index:
            svg.text(scale(before) + 52, y + 15, f"−{lost:,.0f}", "losttext")
        before = level.tflops
    return svg.standalone(_STYLE)


def draw_residuals(dossier: Dossier) -> str:
    """Draw predicted over measured of every row, its source left out of the fit.

    Returns:
        The text of an SVG file, without references to anything outside it.
    """
    sources = [line.name for line in dossier.left_out]
    height = _TOP + _ROW * len(sources) + 50
    desc = "; ".join(f"{one.name}: mean error {one.mape:.1%}" for one in dossier.left_out)
    svg = Svg(_WIDTH, height, "Predicted against measured", f"{desc}.", "residuals")
    svg.rect(0.0, 0.0, _WIDTH, height, "paper")
    svg.text(_MARGIN, 40, "Predicted against measured step time", "title")
    svg.text(
        _MARGIN, 64, "each source left out of the fit; shaded: within 10 %; right: mean error",
        "muted",
    )  # fmt: skip
    x = Scale(-0.5, 0.5, _LABELS, _WIDTH - 110)
    bottom = height - 42
    svg.rect(x(math.log(0.9)), _TOP - 8, x(math.log(1.1)) - x(math.log(0.9)), bottom - _TOP, "band")
    for ratio in (0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5):
        at = x(math.log(ratio))
        svg.line((at, _TOP - 8), (at, bottom), "zero" if ratio == 1 else "grid")
        svg.text(at, height - 24, f"{ratio - 1:+.0%}", "muted", text_anchor="middle")
    for index, line in enumerate(dossier.left_out):
        y = _TOP + _ROW * index + 10
        svg.text(_LABELS - 12, y + 4, f"{line.name} ({line.n})", "strong", text_anchor="end")
        svg.text(_WIDTH - _MARGIN, y + 4, f"{line.mape:.1%}", "strong", text_anchor="end")
        mine = [r for source, _, r in dossier.residuals if source == line.name]
        for k, residual in enumerate(mine):
            jitter = (k % 5 - 2) * 4.0
            at = x(max(-0.5, min(0.5, residual)))
            svg.circle(at, y + jitter, 3.0, "dot", tip=f"{math.expm1(residual):+.1%}")
    return svg.standalone(_STYLE)
