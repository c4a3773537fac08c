"""The table that ends ``puna run``: what the run made, and where the report is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from puna.core.artifact import ARTIFACT_FILE, Artifact
from puna.core.progress import console, say
from puna.core.units import format_bytes, format_count, format_duration


def print_summary(run_dir: Path) -> None:
    """Print the result of a run: stages with times, measures, samples, the report's path."""
    artifacts = {
        path.parent.name: Artifact(path.parent)
        for path in sorted(run_dir.glob(f"*/{ARTIFACT_FILE}"))
        if not path.parent.name.endswith(".partial")
    }
    ordered = sorted(artifacts.values(), key=lambda artifact: artifact.record["ended_at"])
    table = Table(title=f"run {run_dir.name}", title_justify="left")
    for name in ("stage", "time", "size", "result"):
        table.add_column(name, justify="right" if name in ("time", "size") else "left")
    for artifact in ordered:
        size = sum(entry["n_bytes"] for entry in artifact.record["files"])
        seconds = format_duration(artifact.record["seconds"])
        table.add_row(artifact.stage, seconds, format_bytes(size), _result(artifact.metrics))
    console.print(table)
    if "eval.samples" in artifacts:
        _print_samples(artifacts["eval.samples"])
    if "report" in artifacts:
        say(f"report: [bold]{artifacts['report'].path / 'report.html'}[/bold]")


def _result(metrics: dict[str, Any]) -> str:
    """One line of a stage's metrics: its own `headline`, else documents kept."""
    if "headline" in metrics:
        return str(metrics["headline"])
    flow = metrics.get("flow")
    if flow:
        docs_in = sum(row["in_docs"] for row in flow.values())
        docs = sum(row["kept_docs"] for row in flow.values())
        kept_bytes = sum(row["kept_bytes"] for row in flow.values())
        return f"{format_count(docs)} of {format_count(docs_in)} docs, {format_bytes(kept_bytes)}"
    return ""


def _print_samples(artifact: Artifact) -> None:
    for sample in json.loads(artifact.file("samples.json").read_text(encoding="utf-8")):
        if sample["kind"] == "chat":
            lines = [(f"{turn['role']}: ", turn["content"]) for turn in sample["messages"]]
        else:
            lines = [("", sample["prompt"] + sample["completion"])]
        say(f"[dim]{sample['kind']}, {sample['model']} model[/dim]")
        for who, text in lines:
            console.print(Text(f"  {who}", style="cyan").append(text.strip(), style="default"))
