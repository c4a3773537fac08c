"""What is known of the nodes of a run, from its ledger and its folder; imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, read_events
from puna.resilience.quarantine import Record, read_record
from puna.train.fleet import CREW
from puna.train.nodes import LEADER_FILE, NODES_DIR, NodeState
from puna.train.spec import STATE_DIR

Event = Mapping[str, Any]


def describe_cluster(run: Path, stage: str | None = None) -> dict[str, Any]:
    """Describe the nodes and attempts of the last training of a run.

    Args:
        run: Folder of the run.
        stage: Its stage; the last one that trained when None.

    Returns:
        JSON values: ``run, stage, job, ended, nodes`` (``number, name, state, ranks, silent_s,
        why, strikes``) and ``attempts`` (``attempt, world, nodes, ended_by``).

    Raises:
        PunaError: It is no run, or it has trained nothing.
    """
    ledger = run / LEDGER_FILE
    if not ledger.is_file():
        raise PunaError(
            f"{run} is not the folder of a run: it has no {LEDGER_FILE}",
            "give the folder that `puna run` made, below runs/",
        )
    events = [e for e in read_events(ledger) if stage is None or e.get("stage") == stage]
    jobs = [e["job"] for e in events if e["kind"] == CREW]
    if not jobs:
        where = f"stage {stage} of {run}" if stage else str(run)
        raise PunaError(
            f"{where} has started no rank", "give a run, or a stage, that trains, once it does"
        )
    own = [e for e in events if e.get("job") == jobs[-1]]
    crew = [e for e in own if e["kind"] == CREW][-1]
    ended = [e["kind"] for e in own if e["kind"] in ("job.start", "job.done")][-1:] == ["job.done"]
    record = read_record(Path(crew["quarantine"]))
    read = _of_nodes if crew["unit"] == "node" else _of_places
    return {
        "run": str(run), "stage": crew.get("stage"), "job": jobs[-1], "ended": ended,
        "unit": crew["unit"], "nodes": read(run, own, crew, record, ended),
        "attempts": _attempts(own),
    }  # fmt: skip


def _of_nodes(
    run: Path, own: Sequence[Event], crew: Event, record: Record, ended: bool
) -> list[dict[str, Any]]:
    folder, names = run / NODES_DIR, _names(own)
    ranks = _ranks_of_nodes(run, crew["attempt"])
    for path in folder.glob("node-*.json"):
        state = NodeState.read(path)
        if state is not None:
            names.setdefault(state.node, state.name)
    used = {place["number"] for place in crew["places"]}
    rows = []
    for number, name in sorted(names.items()):
        path = folder / (LEADER_FILE if number == 0 else f"node-{number}.json")
        silent_s = _age_s(path)
        told = NodeState.read(path) if number and path.exists() else None
        is_lost = silent_s is None or silent_s > crew["node_timeout_s"]
        is_testing = told is not None and told.is_testing
        state = _state(number in used, record.standing(name).state, is_testing, is_lost, ended)
        rows.append(_row(number, name, state, ranks.get(number, []), silent_s, record))
    return rows


def _of_places(
    run: Path, own: Sequence[Event], crew: Event, record: Record, ended: bool
) -> list[dict[str, Any]]:
    used = [place["number"] for place in crew["places"]]
    rows = []
    for number, name in sorted(_names(own).items()):
        ranks = [used.index(number)] if number in used else []
        silent_s = None
        if ranks:
            beat = f"*/{STATE_DIR}/attempt-{crew['attempt']}/heartbeat-{ranks[0]}.json"
            ages_s = [age for path in run.glob(beat) if (age := _age_s(path)) is not None]
            silent_s = min([*ages_s, time.time() - own[-1]["t_wall_s"]])
        standing = record.standing(name).state
        # On one machine a test begins with the attempt that goes without the place.
        state = _state(bool(ranks), standing, standing == "quarantined", False, ended)
        rows.append(_row(number, name, state, ranks, silent_s, record))
    return rows


def _state(in_use: bool, standing: str, is_testing: bool, is_lost: bool, ended: bool) -> str:
    if ended:
        return "ended" if standing == "good" else standing
    if is_lost:
        return "lost"
    if in_use:
        return "in use"
    if standing == "quarantined":
        return "burn-in" if is_testing else standing
    return "spare" if standing == "good" else standing


def _row(
    number: int, name: str, state: str, ranks: list[int], silent_s: float | None, record: Record
) -> dict[str, Any]:
    return {
        "number": number, "name": name, "state": state, "ranks": ranks, "silent_s": silent_s,
        "standing": record.standing(name).state, "why": record.standing(name).why,
        "strikes": [asdict(strike) for strike in record.strikes_of(name)],
    }  # fmt: skip


def _names(own: Sequence[Event]) -> dict[int, str]:
    """Names of all that were in use, by number; the last one where a number had several."""
    return {
        place["number"]: place["name"]
        for event in own if event["kind"] == CREW for place in event["places"]
    }  # fmt: skip


def _ranks_of_nodes(run: Path, attempt: int) -> dict[int, list[int]]:
    """Ranks of each node, as long as the attempt's folder is there."""
    found: dict[int, list[int]] = {}
    for path in run.glob(f"*/{STATE_DIR}/attempt-{attempt}/heartbeat-*.json"):
        beat = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(beat["node"], []).append(beat["rank"])
    return {node: sorted(ranks) for node, ranks in found.items()}


def _attempts(own: Sequence[Event]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    change: str | None = None
    for event in own:
        kind = event["kind"]
        if kind == "world.changed":
            change = event["why"]
        elif kind == CREW:
            if found and found[-1]["ended_by"] is None:
                found[-1]["ended_by"] = "a planned restart"
            nodes = [place["name"] for place in event["places"]]
            found.append({
                "attempt": event["attempt"], "world": event["world"], "nodes": nodes,
                "changed": change, "ended_by": None,
            })  # fmt: skip
            change = None
        elif kind == "fault.detected" and found:
            found[-1]["ended_by"] = event["message"]
        elif kind == "job.start" and found and found[-1]["ended_by"] is None:
            found[-1]["ended_by"] = "the end of the whole command"
        elif kind == "job.done" and found:
            found[-1]["ended_by"] = "the end of the training"
    return found


def _age_s(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return None
