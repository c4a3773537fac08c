"""``puna cluster``: the nodes of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from puna.cli.model_tables import new_console, new_text_table


@click.group("cluster", no_args_is_help=True)
def cluster() -> None:
    """Which nodes a training uses, which wait, and which are not trusted."""


@cluster.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--stage", help="The stage whose training it is; the last one that trained.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def status(run: Path, stage: str | None, as_json: bool) -> None:
    """Show the nodes of RUN, the folder of a run, and the attempts of its last training.

    On one machine a node is the place (GPU) of a rank.
    """
    from puna.train.cluster import describe_cluster

    found = describe_cluster(run, stage)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from puna.core.units import format_duration

    console = new_console()
    table = new_text_table("node", "name", "state", "ranks", "last sign of life", "strikes")
    for node in found["nodes"]:
        silent_s = node["silent_s"]
        why = f"{node['standing']}: {node['why']}" if node["standing"] != "good" else ""
        strikes = [f"{one['fault']} at step {one['step']}" for one in node["strikes"]]
        table.add_row(
            str(node["number"]), node["name"], node["state"],
            ", ".join(map(str, node["ranks"])) or "-",
            "-" if silent_s is None else f"{format_duration(silent_s)} ago",
            "\n".join([*strikes, *([why] if why else [])]) or "none",
        )  # fmt: skip
    console.print(table)
    attempts = new_text_table("attempt", "ranks", "why so many", "ended by")
    for one in found["attempts"]:
        attempts.add_row(
            str(one["attempt"]), str(one["world"]), one["changed"] or "", one["ended_by"] or "-"
        )
    console.print(attempts)
