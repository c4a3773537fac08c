"""``puna goodput`` on ledgers whose times are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from puna.cli.main import cli
from puna.core.ledger import LEDGER_FILE


def told(at_s: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "t_wall_s": at_s, "t_mono_s": at_s, "stage": "train.pretrain", **fields}


def step(at_s: float, number: int, attempt: int = 0, **fields: Any) -> dict[str, Any]:
    return told(at_s, "train.step", job="j", step=number, attempt=attempt, loss=1.0, **fields)


EVENTS = [
    told(0, "stage.start", resumed=False),
    told(1, "job.start", job="j", resumed=False),
    told(1, "attempt.start", job="j", attempt=0),
    told(4, "preflight.done", job="j", seconds=0.5),
    told(5, "train.start", job="j"),
    step(15, 0, data_s=1.0),
    told(16, "train.snapshot", job="j", step=1, seconds=0.5),
    step(26, 1, data_s=2.0),
    told(29, "train.checkpoint", job="j", step=2, seconds=3.0),
    told(31, "train.eval", job="j", step=2, bits_per_byte=1.0, sources={}, seconds=2.0),
    step(41, 2),
    told(44, "fault.injected", job="j", rank=1, step=3, what="kill"),
    told(46, "fault.detected", job="j", rank=1, step=3, what="exit", detect_s=1.5, attempt=0,
         message="rank 1 was killed"),
    told(46, "attempt.start", job="j", attempt=1),
    told(50, "train.restore", job="j", attempt=1, step=2),
    step(60, 2, 1),
    told(60, "recovery.done", job="j", seconds=14.0, steps_lost=1),
    step(70, 3, 1),
    told(71, "job.done", job="j"),
]  # fmt: skip
BUCKETS = {
    "productive": 9 + 8 + 10 + 10, "recomputed": 3 + 0.5 + 10, "checkpoint": 1 + 3, "data": 3,
    "evaluation": 2, "detection": 1.5, "restart_init": 3.5 + 4,
    "preflight": 0.5, "other": 1, "stopped": 0,
}  # fmt: skip


def write(folder: Path, events: list[dict[str, Any]]) -> Path:
    (folder / LEDGER_FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["goodput", *map(str, arguments)])


def test_every_second_is_in_one_bucket(tmp_path: Path) -> None:
    found = json.loads(call(write(tmp_path, EVENTS), "--json").stdout)
    assert found["goodput"]["buckets"] == pytest.approx(BUCKETS)
    assert sum(BUCKETS.values()) == found["goodput"]["wall_s"] == 70
    assert "projection" not in found


def test_incidents_are_told_in_words_and_drawn(tmp_path: Path) -> None:
    page = tmp_path / "goodput.html"
    result = call(write(tmp_path, EVENTS), "--gpus", 16_384, "--page", page)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "goodput 52.9% of 1 min 10 s" in words
    assert (
        "after 45.0 s: rank 1 was killed (on purpose); noticed after 1.5 s, training again 14.0 s "
        "later, 1 steps computed again"
    ) in words
    assert "as measured" in words
    text = page.read_text()
    assert "rank 1 was killed" in text
    assert "On 16,384 GPUs" in text


def test_the_projection_uses_the_times_of_the_run(tmp_path: Path) -> None:
    found = json.loads(call(write(tmp_path, EVENTS), "--gpus", 16_384, "--json").stdout)
    cluster = found["projection"]["cluster"]
    assert (cluster["detect_s"], cluster["restart_s"]) == (1.5, 14.0)
    assert [(t["name"], t["stall_s"]) for t in cluster["tiers"]] == [("memory", 0.5), ("disk", 3.0)]
    shares = {row["change"]: row["goodput"] for row in found["projection"]["sensitivity"]}
    measured = shares.pop("as measured")
    assert all(share < measured for share in shares.values())
    assert found["projection"]["simulated"]["p50"] == pytest.approx(measured, abs=0.01)


def test_other_trainings_of_the_run_are_named(tmp_path: Path) -> None:
    tuning = [{**event, "stage": "post.sft", "job": "k"} for event in EVENTS if "job" in event]
    write(tmp_path, [*EVENTS, *tuning])
    assert "also trained here: train.pretrain (--stage)" in call(tmp_path).output
    first = json.loads(call(tmp_path, "--stage", "train.pretrain", "--json").stdout)
    assert first["stage"] == "train.pretrain"
    assert first["goodput"]["wall_s"] == 70


@pytest.mark.parametrize(
    ("events", "arguments", "words"),
    [
        (None, [], "is not the folder of a run"),
        (EVENTS[:1], [], "has trained nothing"),
        (EVENTS, ["--stage", "post.sft"], "stage post.sft"),
        (EVENTS[:8], ["--gpus", "8"], "recovered from no fault"),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path, events: list[dict[str, Any]] | None, arguments: list[str], words: str
) -> None:
    from puna.core.errors import PunaError

    if events is not None:
        write(tmp_path, events)
    result = call(tmp_path, *arguments)
    assert isinstance(result.exception, PunaError)
    assert words in result.exception.message


def test_predicted_against_actual_time_is_shown_and_takes_no_time(tmp_path: Path) -> None:
    predicted = told(5, "train.predicted", job="j", attempt=1, step_s=0.05, low_s=0.04, high_s=0.06,
                     hardware="mine.toml", tolerance=0.1)  # fmt: skip
    deviation = told(65, "train.deviation", job="j", attempt=1, step=3, predicted_s=0.05,
                     actual_s=0.07, ratio=1.4, tolerance=0.1, suspect="communication")  # fmt: skip
    steps = [step(60 + k, 2 + k, 1, step_s=0.07) for k in range(4)]
    before = json.loads(call(write(tmp_path, [*EVENTS[:-3], *steps]), "--json").output)
    events = [*EVENTS[:5], predicted, *EVENTS[5:-3], *steps, deviation]
    page = tmp_path / "page.html"
    found = call(write(tmp_path, events), "--page", page)
    assert "a step took 70 ms, predicted were 50 ms (+40%)" in found.output
    assert "40% longer than the 0.05 s predicted; most of it in communication" in " ".join(
        found.output.split()
    )
    assert "Predicted for mine.toml" in page.read_text(encoding="utf-8")
    after = json.loads(call(write(tmp_path, events), "--json").output)
    assert after["goodput"]["buckets"] == before["goodput"]["buckets"]
    assert before["prediction"] is None
