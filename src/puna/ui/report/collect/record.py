"""The record of a run: stages and their times, lineage, versions, the resolved recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from puna.core.artifact import Artifact
from puna.core.recipe import toml_values
from puna.data.flow import result_line

_RATE_SUFFIX = "_per_s"


def run_section(
    artifacts: Sequence[Artifact], stages: Sequence[dict[str, Any]], ledger: Path | None, title: str
) -> dict[str, Any]:
    """Name the run, its times and the code that made it.

    Args:
        artifacts: Finished artifacts in the order in which they were made.
        stages: Their :func:`stages_section`.
        ledger: The run's ledger; its folder has the run's name.
        title: Heading; the name of the run when empty.
    """
    name = ledger.parent.resolve().name if ledger is not None else ""
    attempts = [attempt for stage in stages for attempt in stage["attempts"]]
    started_at = min((attempt["started_at"] for attempt in attempts), default=None)
    ended_at = max((attempt["ended_at"] for attempt in attempts), default=None)
    return {
        "name": name or "run",
        "title": title or name or "run",
        "started_at": started_at,
        "ended_at": ended_at,
        "elapsed_s": ended_at - started_at if started_at is not None and ended_at else 0.0,
        "busy_s": sum(stage["busy_s"] for stage in stages),
        "n_stages": len(stages),
        "seeds": sorted({a.record["seed"] for a in artifacts if a.record.get("seed") is not None}),
        "code": _distinct([artifact.record["code"] for artifact in artifacts]),
        "hosts": _distinct([artifact.record["host"] for artifact in artifacts]),
        "packages": _packages(artifacts),
        "recipe_toml": _recipe_toml(artifacts),
    }


def stages_section(
    artifacts: Sequence[Artifact], events: Mapping[str, Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Tell, per stage, when it ran (every attempt), how fast and what it left."""
    return [_stage(artifact, events[artifact.stage]) for artifact in artifacts]


def _stage(artifact: Artifact, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    record, metrics = artifact.record, artifact.metrics
    attempts = stage_attempts(events) or [
        {"started_at": record["started_at"], "ended_at": record["ended_at"], "status": "done"}
    ]
    return {
        "stage": artifact.stage,
        "seconds": record["seconds"],
        "busy_s": sum(attempt["ended_at"] - attempt["started_at"] for attempt in attempts),
        "attempts": attempts,
        "n_bytes": sum(entry["n_bytes"] for entry in record["files"]),
        "n_files": len(record["files"]),
        "rates": {
            key.removesuffix(_RATE_SUFFIX): value
            for key, value in metrics.items()
            if key.endswith(_RATE_SUFFIX) and isinstance(value, int | float)
        },
        "result": result_line(metrics),
    }


def stage_attempts(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the attempts at a stage, from its events, since it was last begun from nothing.

    An attempt that was killed has no last word; it counts up to its last event.

    Returns:
        ``{"started_at", "ended_at", "status"}`` each, status ``done``, ``failed`` or ``killed``.
    """
    attempts: list[dict[str, Any]] = []
    for event in events:
        kind, now = event["kind"], event["t_wall_s"]
        if kind == "stage.start":
            if not event.get("resumed"):
                attempts.clear()
            attempts.append({"started_at": now, "ended_at": now, "status": "killed"})
        elif attempts:
            attempts[-1]["ended_at"] = max(now, attempts[-1]["ended_at"])
            if kind in ("stage.done", "stage.failed"):
                attempts[-1]["status"] = kind.removeprefix("stage.")
    return attempts


def lineage_section(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Tell, per stage, its identity and the inputs it was made from."""
    known = {artifact.fingerprint for artifact in artifacts}
    return [
        {
            "stage": artifact.stage,
            "result": result_line(artifact.metrics),
            "fingerprint": artifact.fingerprint,
            "content_hash": artifact.content_hash,
            "inputs": [
                {"name": name, **upstream, "in_report": upstream["fingerprint"] in known}
                for name, upstream in sorted(artifact.record["inputs"].items())
            ],
            "seed": artifact.record.get("seed"),
            "commit": artifact.record["code"].get("commit"),
            "dirty": artifact.record["code"].get("dirty"),
            "puna": artifact.record["code"].get("puna"),
            "written_at": artifact.record["written_at"],
        }
        for artifact in artifacts
    ]


def _packages(artifacts: Sequence[Artifact]) -> dict[str, list[str]]:
    """Versions of each package; more than one when stages were made with different ones."""
    found: dict[str, list[str]] = {}
    for artifact in artifacts:
        for name, version in artifact.record["packages"].items():
            versions = found.setdefault(name, [])
            if version not in versions:
                versions.append(version)
    return found


def _distinct(values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _recipe_toml(artifacts: Sequence[Artifact]) -> str:
    """Write the resolved configuration of all stages as one TOML text."""
    sections: dict[str, Any] = {}
    for artifact in artifacts:
        node = sections
        *parents, last = artifact.stage.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = _without_access(toml_values(artifact.config))
    return tomli_w.dumps(sections)


def _without_access(value: Any) -> Any:
    """A report is passed on: how a store is reached, keys included, stays out of it."""
    if isinstance(value, dict):
        return {
            key: dict.fromkeys(item, "(not shown)")
            if key == "storage_options" and isinstance(item, dict)
            else _without_access(item)
            for key, item in value.items()
        }
    return [_without_access(item) for item in value] if isinstance(value, list) else value
