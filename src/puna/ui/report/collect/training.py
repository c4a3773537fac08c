"""A training job from the ledger: the curve, what was done twice, faults, attempts, goodput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.core.artifact import Artifact
from puna.resilience.goodput import elapsed_s, is_aside, job_goodput
from puna.resilience.straggler import slow_in_words
from puna.train.predict_config import deviation_in_words

CURVE_FIELDS = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu")
FINAL_SHARE = 0.05
"""The final loss is the mean over this share of the last steps (at least one)."""
MOST_ROWS = 20_000
"""Rows of a curve that the report keeps."""
ALL_DOCUMENTS = "all documents"
_START_FIELDS = (
    "n_params", "world", "dtype", "steps", "tokens_per_step", "flops_per_token",
    "peak_flops_measured",
)  # fmt: skip
_PHASES = {
    "train.step": "productive",
    "train.checkpoint": "checkpoint",
    "train.snapshot": "checkpoint",
    "train.eval": "evaluation",
    "fault.injected": "recomputed",
    "fault.detected": "detection",
    "train.anomaly": "recomputed",
    "train.skip": "recomputed",
    "attempt.start": "restart_init",
    "attempt.crew": "restart_init",
    "world.changed": "restart_init",
    "recovery.start": "restart_init",
    "recovery.done": "restart_init",
    "train.start": "restart_init",
    "train.restore": "restart_init",
}


def training_section(
    artifact: Artifact | None, events: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[str, Any] | None:
    """Describe the training job of an artifact.

    Args:
        artifact: Output of a stage that trains; None when the recipe has none.
        events: Stage -> its events.

    Returns:
        JSON values; None without an artifact or without events of its job.
    """
    if artifact is None:
        return None
    own = job_events(events[artifact.stage])
    return {"stage": artifact.stage, **describe_training(own)} if own else None


def describe_training(own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe a training job.

    Args:
        own: Its events, at least one, see :func:`job_events`.

    Returns:
        JSON values.
    """
    steps = [event for event in own if event["kind"] == "train.step"]
    curve, replaced = _curves(steps)
    start = next((event for event in reversed(own) if event["kind"] == "train.start"), {})
    goodput = job_goodput(own)
    return {
        **{name: start.get(name) for name in _START_FIELDS},
        "fields": ["step", *CURVE_FIELDS, "attempt"],
        "curve": sampled(curve),
        "replaced": [sampled(stretch) for stretch in replaced],
        "n_steps": goodput.n_steps,
        "n_tokens": sum(event.get("tokens") or 0 for event in _last_of_each_step(steps)),
        "first_loss": curve[0][1] if curve else None,
        "final_loss": _final_loss(curve),
        "median_tokens_per_s": _median([row[4] for row in curve]),
        "median_mfu": _median([row[5] for row in curve]),
        "checkpoint_bytes": next(
            (e.get("n_bytes") for e in reversed(own) if e["kind"] == "train.checkpoint"), None
        ),
        "checkpoints": [
            {key: event.get(key) for key in ("step", "seconds", "n_bytes")}
            for event in own
            if event["kind"] == "train.checkpoint"
        ],
        "heldout": _heldout(own),
        "prediction": _prediction(own, steps),
        "incidents": _incidents(own, goodput.faults),
        "attempts": _attempts(own),
        "goodput": goodput.to_json(),
    }


def job_events(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of a stage's last job, since the stage was last begun from nothing."""
    own: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "stage.start" and not event.get("resumed"):
            own.clear()
        elif event.get("job") is not None:
            own.append(event)
    return [event for event in own if event["job"] == own[-1]["job"]]


def _last_of_each_step(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that count: of a step that was done twice the later one."""
    return [last for _, last in sorted({event["step"]: event for event in steps}.items())]


def _curves(steps: Sequence[dict[str, Any]]) -> tuple[list[list[Any]], list[list[list[Any]]]]:
    """Split the steps into the curve that led to the model and the stretches it replaced."""
    kept = _last_of_each_step(steps)
    kept_ids = {id(event) for event in kept}
    stretches: list[list[dict[str, Any]]] = []
    for event in steps:
        if id(event) in kept_ids:
            continue
        last = stretches[-1][-1] if stretches else None
        if last is None or last.get("attempt") != event.get("attempt"):
            stretches.append([])
        stretches[-1].append(event)
    return [_row(event) for event in kept], [[_row(e) for e in stretch] for stretch in stretches]


def sampled(rows: list[list[Any]]) -> list[list[Any]]:
    """At most about ``MOST_ROWS`` rows of a long run, evenly spaced, the last one included."""
    every = max(1, len(rows) // MOST_ROWS)
    return rows if every == 1 else rows[::-1][::every][::-1]


def _row(event: dict[str, Any]) -> list[Any]:
    values = [_number(event.get(name)) for name in CURVE_FIELDS]
    return [event["step"], *values, event.get("attempt", 0)]


def _heldout(own: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Held-out bits per byte over the steps, of a step that was measured twice the later one."""
    events = _last_of_each_step([event for event in own if event["kind"] == "train.eval"])
    if not events:
        return None
    names = sorted({name for event in events for name in event["sources"]})
    lines = {ALL_DOCUMENTS: [_number(event["bits_per_byte"]) for event in events]}
    for name in names if len(names) > 1 else []:
        found = [event["sources"].get(name, {}) for event in events]
        lines[name] = [_number(one.get("bits_per_byte")) for one in found]
    seconds = sum(event["seconds"] for event in events)
    return {"steps": [event["step"] for event in events], "sources": lines, "seconds": seconds}


def _number(value: Any) -> float | None:
    """A finite number or None; the ledger writes NaN and infinity as words."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _final_loss(curve: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    n = max(1, round(len(curve) * FINAL_SHARE))
    last = [row[1] for row in curve[-n:] if row[1] is not None]
    return {"mean": sum(last) / len(last), "n_steps": len(last)} if last else None


def _prediction(
    own: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Predicted against actual seconds of a step, of the last attempt; None without prediction."""
    found = next((event for event in reversed(own) if event["kind"] == "train.predicted"), None)
    if found is None:
        return None
    own_steps = [e for e in steps if e.get("attempt", 0) == found["attempt"]]
    times = [e.get("step_s") for e in own_steps[1:]]
    actual_s = _median(times)
    return {
        **{key: found[key] for key in ("step_s", "low_s", "high_s", "hardware", "tolerance")},
        "actual_s": actual_s, "ratio": actual_s / found["step_s"] if actual_s else None,
    }  # fmt: skip


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def _incidents(
    own: Sequence[dict[str, Any]], faults: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What went wrong, in the order in which it did, and whether the recipe asked for it."""
    injected: list[dict[str, Any]] = []
    incidents, n_faults = [], 0
    for event in own:
        kind = event["kind"]
        message, step = "", event.get("step")
        found: dict[str, Any] = {}
        if kind == "fault.injected":
            injected.append(event)
        elif kind == "fault.detected":
            found, n_faults = dict(faults[n_faults]), n_faults + 1
            planned = next((e for e in injected if e["rank"] == event.get("rank")), None)
            found["on_purpose"] = planned is not None
            if planned is not None:
                injected.remove(planned)
        else:
            message = _in_words(event, kind)
        if message:
            found = {"what": kind, "message": message, "step": step, "detect_s": None,
                     "on_purpose": False}  # fmt: skip
        if found:
            at_s = max(0.0, event["t_wall_s"] - own[0]["t_wall_s"])
            incidents.append({**found, "is_fault": kind == "fault.detected", "after_s": at_s})
    return incidents


def _in_words(event: dict[str, Any], kind: str) -> str:
    """Tell an event that is an incident without being a fault; empty for others."""
    if kind == "job.start" and event.get("resumed"):
        return "the whole run was stopped and started again"
    if kind == "train.checkpoint_damaged":
        return f"the checkpoint of step {event.get('step')} was damaged: {event.get('why')}"
    if kind == "train.anomaly":
        action = event["action"].replace("_", " ")
        return f"step {event.get('step')}: {event['seen']}; {action}: {event['result']}"
    if kind == "health.warning":
        return f"node {event['node']}: {event['message']}"
    if kind == "straggler.detected":
        return f"{slow_in_words(event)}; {event['action']}ed"
    if kind == "train.deviation":
        return deviation_in_words(event)
    if kind == "train.checkpoint_failed":
        return f"the checkpoint of step {event.get('step')} was not saved: {event.get('error')}"
    return ""


def _attempts(own: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each attempt did and when, for the picture: spans named like the goodput's buckets."""
    attempts: list[dict[str, Any]] = []
    now_s, furthest, previous = 0.0, -1, None
    for event in own:
        if is_aside(event):
            continue
        passed_s = elapsed_s(previous, event) if previous is not None else 0.0
        kind = event["kind"]
        if kind == "job.start":  # nothing ran before it: the picture leaves that time out
            passed_s = 0.0
        if kind == "attempt.start":
            attempts.append(
                {"attempt": event.get("attempt"), "start_s": now_s + passed_s, "spans": []}
            )
        elif attempts:
            phase = _PHASES.get(kind, "other")
            if kind == "train.step" and event["step"] <= furthest:
                phase = "recomputed"
            if kind == "fault.detected":
                detect_s = min(passed_s, max(0.0, event["detect_s"]))
                _extend(attempts[-1], "recomputed", now_s, passed_s - detect_s)
                _extend(attempts[-1], phase, now_s + passed_s - detect_s, detect_s)
            elif kind == "preflight.done":
                tests_s = min(passed_s, max(0.0, event["seconds"]))
                _extend(attempts[-1], "restart_init", now_s, passed_s - tests_s)
                _extend(attempts[-1], "preflight", now_s + passed_s - tests_s, tests_s)
            else:
                _extend(attempts[-1], phase, now_s, passed_s)
        if kind == "train.step":
            furthest = max(furthest, event["step"])
        if attempts:
            _note(attempts[-1], event, kind)
        now_s += passed_s
        previous = event
    for attempt in attempts:
        attempt["end_s"] = max([attempt["start_s"], *(end for _, _, end in attempt["spans"])])
    return attempts


def _note(attempt: dict[str, Any], event: dict[str, Any], kind: str) -> None:
    if kind == "train.step":
        attempt.setdefault("first_step", event["step"])
        attempt["last_step"] = event["step"]
    elif kind == "fault.detected":
        attempt["fault"] = event.get("message") or event.get("what")


def _extend(attempt: dict[str, Any], phase: str, start_s: float, seconds: float) -> None:
    spans: list[list[Any]] = attempt["spans"]
    if seconds <= 0:
        return
    if spans and spans[-1][0] == phase:
        spans[-1][2] = start_s + seconds
    else:
        spans.append([phase, start_s, start_s + seconds])
