"""Pictures of time: where a job's seconds went, its attempts, and the stages of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puna.core.units import format_duration
from puna.ui.report.charts.frame import CHAR_WIDTH, fits, shorten, time_axis
from puna.ui.report.svg import Scale, Svg

BUCKET_NAMES = {
    "productive": "productive",
    "recomputed": "done again",
    "checkpoint": "checkpoints",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "detection": "detection",
    "restart_init": "start and restart",
    "preflight": "preflight",
    "other": "other",
    "stopped": "stopped",
}
"""Buckets of :mod:`puna.resilience.goodput` as they are called in the report."""


def draw_goodput(goodput: dict[str, Any], width: float, name: str) -> Svg:
    """Draw one bar whose parts sum to the wall time of the job."""
    wall_s = goodput["wall_s"]
    shares = ", ".join(
        f"{BUCKET_NAMES.get(bucket, bucket)} {format_duration(seconds)}"
        for bucket, seconds in goodput["buckets"].items()
        if seconds > 0
    )
    desc = f"Of {format_duration(wall_s)} wall time: {shares}."
    svg = Svg(width, 62, "Where the time of the training job went", desc, name)
    scale = Scale(0.0, max(wall_s, 1e-9), 0.0, width)
    at_s = 0.0
    for bucket, seconds in goodput["buckets"].items():
        if seconds <= 0:
            continue
        x, end = scale(at_s), scale(at_s + seconds)
        text = f"{BUCKET_NAMES.get(bucket, bucket)} {seconds / wall_s:.0%}"
        svg.rect(x, 0, max(end - x - 1, 0.8), 34, f"fill b-{bucket}",
                 tip=f"{text}, {format_duration(seconds)}")  # fmt: skip
        if fits(text, end - x):
            svg.text(x + 10, 22, text, f"t on-fill on-{bucket}")
        at_s += seconds
    time_axis(svg, scale, 42, 6 if width > 500 else 3)
    return svg


def draw_attempts(attempts: Sequence[dict[str, Any]], width: float, name: str) -> Svg:
    """Draw the attempts of a job over its time, one lane each, coloured like the buckets."""
    lane = 40.0
    end_s = max((attempt["end_s"] for attempt in attempts), default=1.0)
    desc = " ".join(_attempt_text(attempt) + "." for attempt in attempts)
    svg = Svg(width, lane * len(attempts) + 28, "Attempts of the training job", desc, name)
    scale = Scale(0.0, max(end_s, 1e-9), 0.0, width - 8)
    for index, attempt in enumerate(attempts):
        y = index * lane + 16
        x = scale(attempt["start_s"])
        text = _attempt_text(attempt)
        room = CHAR_WIDTH * len(text)
        svg.text(min(x, max(width - room, 0.0)), y - 4, shorten(text, width), "t muted")
        for phase, start_s, stop_s in attempt["spans"]:
            left, right = scale(start_s), scale(stop_s)
            tip = f"{BUCKET_NAMES.get(phase, phase)}, {format_duration(stop_s - start_s)}"
            svg.rect(left, y, max(right - left, 0.8), 16, f"fill b-{phase}", tip=tip)
        if attempt.get("fault"):
            svg.circle(scale(attempt["end_s"]), y + 8, 5.0, "fault-dot", tip=str(attempt["fault"]))
    time_axis(svg, scale, lane * len(attempts) + 6, 6 if width > 500 else 3)
    return svg


def _attempt_text(attempt: dict[str, Any]) -> str:
    text = f"attempt {(attempt['attempt'] or 0) + 1}"
    if "first_step" in attempt:
        text += f": steps {attempt['first_step']} to {attempt['last_step']}"
    return text + (f", {attempt['fault']}" if attempt.get("fault") else "")


def draw_timeline(stages: Sequence[dict[str, Any]], width: float, name: str) -> Svg:
    """Draw when each stage ran; pauses in which nothing ran are cut out and marked."""
    wide = width > 500
    left = 150.0 if wide else 0.0
    lane = 24.0 if wide else 36.0
    clock = _Clock([attempt for stage in stages for attempt in stage["attempts"]])
    total = format_duration(clock.total_s)
    desc = f"{len(stages)} stages in {total}: " + ", ".join(
        f"{stage['stage']} {format_duration(stage['busy_s'])}" for stage in stages
    )
    height = lane * len(stages) + 30
    svg = Svg(width, height, "Timeline of the stages", desc, name)
    scale = Scale(0.0, max(clock.total_s, 1e-9), left, width - 70)
    for cut_s in clock.cuts_s:
        svg.line((scale(cut_s), 0), (scale(cut_s), height - 28), "cut", tip="pause, not shown")
    for index, stage in enumerate(stages):
        y = index * lane + (4 if wide else 17)
        if wide:
            svg.text(left - 10, y + 12, stage["stage"], "t", text_anchor="end")
        else:
            svg.text(0, y - 4, stage["stage"], "t")
        end = left
        for attempt in stage["attempts"]:
            x = scale(clock(attempt["started_at"]))
            end = max(scale(clock(attempt["ended_at"])), x + 2)
            svg.rect(x, y, end - x, 15, f"fill stage-{attempt['status']}",
                     tip=f"{stage['stage']}, {attempt['status']}")  # fmt: skip
        svg.text(end + 6, y + 12, format_duration(stage["busy_s"]), "t muted num")
    time_axis(svg, scale, height - 24, 6 if wide else 4)
    return svg


def n_pauses(stages: Sequence[dict[str, Any]]) -> int:
    """Count the pauses that the timeline leaves out."""
    return len(_Clock([attempt for stage in stages for attempt in stage["attempts"]]).cuts_s)


class _Clock:
    """Maps wall-clock times to seconds of work, without the pauses between attempts."""

    _PAUSE_S = 30.0

    def __init__(self, attempts: Sequence[dict[str, Any]]) -> None:
        self._pieces: list[list[float]] = []  # wall start, wall end, seconds of work before
        self.cuts_s: list[float] = []
        for attempt in sorted(attempts, key=lambda attempt: attempt["started_at"]):
            start, end = attempt["started_at"], attempt["ended_at"]
            if self._pieces and start <= self._pieces[-1][1] + self._PAUSE_S:
                self._pieces[-1][1] = max(self._pieces[-1][1], end)
                continue
            before_s = self.total_s
            if self._pieces:
                self.cuts_s.append(before_s)
            self._pieces.append([start, end, before_s])

    @property
    def total_s(self) -> float:
        if not self._pieces:
            return 0.0
        start, end, before_s = self._pieces[-1]
        return before_s + end - start

    def __call__(self, wall_s: float) -> float:
        for start, end, before_s in reversed(self._pieces):
            if wall_s >= start:
                return before_s + min(wall_s, end) - start
        return 0.0
