"""Held-out bits per byte in the run report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from puna.ui.report.charts.heldout import draw_heldout
from puna.ui.report.collect.training import training_section


def section(*measured: tuple[int, dict[str, Any]]) -> Any:
    events: list[dict[str, Any]] = [{"kind": "job.start", "t_wall_s": 0.0, "t_mono_s": 0.0}]
    for at, (step, values) in enumerate(measured):
        sources = {name: {"bits_per_byte": value} for name, value in values.items()}
        events.append({
            "kind": "train.eval", "t_wall_s": 1.0 + at, "t_mono_s": 1.0 + at, "step": step,
            "bits_per_byte": sum(values.values()) / len(values), "sources": sources, "seconds": 2.0,
        })  # fmt: skip
    events = [{**event, "job": "j"} for event in events]
    artifact: Any = SimpleNamespace(stage="train.pretrain")
    found = training_section(artifact, {"train.pretrain": events})
    assert found is not None
    return found["heldout"]


def test_the_later_measurement_of_a_step_counts():
    found = section(
        (9, {"code": 4.0, "web": 2.0}), (19, {"code": 3.0, "web": 2.0}),
        (9, {"code": 2.0, "web": 1.0}),
    )  # fmt: skip
    assert found == {
        "steps": [9, 19], "seconds": 4.0,
        "sources": {"all documents": [1.5, 2.5], "code": [2.0, 3.0], "web": [1.0, 2.0]},
    }  # fmt: skip


def test_a_run_without_measurements_has_no_picture():
    assert section() is None


def test_one_source_is_one_line():
    assert list(section((1, {"web": 2.0}))["sources"]) == ["all documents"]


def test_every_line_is_drawn_with_its_last_value_and_what_is_no_number_is_left_out():
    found = section((9, {"<b>": 4.0, "web": float("nan")}), (19, {"<b>": 3.0, "web": 2.0}))
    drawn = str(draw_heldout(found, 680.0, "h").markup())
    assert "&lt;b&gt; 3.000" in drawn
    assert "web 2.000" in drawn
    assert "<b>" not in drawn
    assert "nan" not in drawn
