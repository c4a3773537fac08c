"""The table that ends ``puna run``: what the run made, and where the report is."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from puna.core.artifact import ARTIFACT_FILE, Artifact
from puna.core.progress import console, say
from puna.core.units import format_bytes, format_duration
from puna.data.flow import result_line


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
        table.add_row(artifact.stage, seconds, format_bytes(size), result_line(artifact.metrics))
    console.print(table)
    if "eval.samples" in artifacts:
        _print_samples(artifacts["eval.samples"])
    if "report" in artifacts:
        say("report: ", (str(artifacts["report"].path / "report.html"), "bold"))


def _print_samples(artifact: Artifact) -> None:
    for sample in artifact.read_json("samples.json"):
        if sample["kind"] == "chat":
            lines = [(f"{turn['role']}: ", turn["content"]) for turn in sample["messages"]]
        else:
            lines = [("", sample["prompt"] + sample["completion"])]
        say((f"{sample['kind']}, {sample['model']} model", "dim"))
        for who, text in lines:
            console.print(Text(f"  {who}", style="cyan").append(text.strip(), style="default"))
