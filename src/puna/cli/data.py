"""``puna data``: the data stages, the funnel, and why a document went where it went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from puna.cli.common import load_stages, stage_group
from puna.cli.data_classifier import classifier
from puna.cli.data_compare import diff, try_filter
from puna.cli.data_embedder import embedder
from puna.cli.data_export import count, export
from puna.cli.data_label import label
from puna.cli.data_report import data_report

if TYPE_CHECKING:
    from rich.table import Table

    from puna.data.flow import FlowRow, Funnel
    from puna.data.why import Fate

data = stage_group("data", "Sources, filters, deduplication, split; why a document went.")
data.add_command(classifier)
data.add_command(embedder)
data.add_command(label)
data.add_command(count)
data.add_command(export)
data.add_command(try_filter)
data.add_command(diff)
data.add_command(data_report)

SHOWN_MATCHES = 20
MIN_WIDTH = 128
"""Columns of the tables; in a narrower terminal (or a pipe) lines run on rather than wrap."""


run_option = click.option(
    "--run", "run_dir", type=click.Path(path_type=Path), required=True,
    help="Folder of the run, runs/<name>.",
)  # fmt: skip


@data.command()
@click.argument("document")
@run_option
def why(document: str, run_dir: Path) -> None:
    """Tell where a document ended, and by which rule.

    DOCUMENT is a document id, the beginning of one, or a part of a path.
    """
    from puna.data.why import why as find

    load_stages()  # filters of plugins explain their reasons
    fates = find(run_dir, document)
    if len(fates) == 1:
        _print_fate(fates[0])
    else:
        _print_matches(fates)


def _print_fate(fate: Fate) -> None:
    click.secho(f"{fate.source}: {fate.path}", bold=True)
    click.echo(f"  id         {fate.id}   {fate.n_bytes:,} bytes")
    if fate.outcome == "kept":
        times = f", read {fate.repeat} times in a pass" if (fate.repeat or 1) > 1 else ""
        click.secho(f"  kept       in split {fate.split!r}{times}", fg="green")
    elif fate.outcome == "waiting":
        click.secho(f"  kept       by {fate.stage}; the next stage has not run yet", fg="green")
    else:
        click.secho(f"  {fate.outcome:<11}by {fate.stage}: {fate.reason}", fg="red")
    if fate.meaning:
        click.echo(f"  meaning    {fate.meaning}")
    if fate.value is not None:
        click.echo(f"  measured   {fate.value:.6g}, threshold {fate.threshold:.6g}")
    rows = (("detail", fate.detail), ("kept doc", fate.kept_path), ("cluster", fate.cluster),
            ("language", fate.language))  # fmt: skip
    for name, value in rows:
        if value:
            click.echo(f"  {name:<11}{value}")
    if fate.tokens is not None:
        end = fate.tokens.first_token + fate.tokens.n_tokens
        click.echo(f"  tokens     {fate.tokens.first_token:,} to {end:,} of {fate.tokens.path}")
    if fate.excerpt:
        click.echo(f"  text       {fate.excerpt}")


def _print_matches(fates: list[Fate]) -> None:
    click.echo(f"{len(fates)} documents match; give a whole id for one of them:")
    for fate in fates[:SHOWN_MATCHES]:
        end = fate.split if fate.outcome == "kept" else fate.reason or "waiting"
        click.echo(f"  {fate.id}  {fate.outcome:<11} {end or '':<28} {fate.source}: {fate.path}")
    if len(fates) > SHOWN_MATCHES:
        click.echo(f"  ... and {len(fates) - SHOWN_MATCHES} more")


@data.command()
@run_option
@click.option("--reasons", is_flag=True, help="Also list what was rejected, by reason.")
def funnel(run_dir: Path, reasons: bool) -> None:
    """Print documents, bytes and estimated tokens after every stage, per source."""
    from rich.console import Console

    from puna.data.flow import funnel as read_funnel

    found = read_funnel(run_dir)
    console = Console()
    console.width = max(console.width, MIN_WIDTH)
    console.print(_funnel_table(found))
    if reasons:
        console.print(_reasons_table(found))
    console.print(f"tokens are estimated at {found.bytes_per_token:g} bytes per token", style="dim")


def _funnel_table(found: Funnel) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title="Documents through the data stages", title_justify="left", box=SIMPLE)
    for name in ("stage", "source"):
        table.add_column(name, no_wrap=True)
    for name in ("docs in", "docs kept", "kept", "bytes kept", "~tokens kept", "rejected most for"):
        table.add_column(name, justify="left" if "most" in name else "right", no_wrap=True)
    for stage in found.stages:
        rows = [row for row in found.rows if row.stage == stage]
        if len(rows) > 1:
            rows.append(found.total(stage))
        for index, row in enumerate(rows):
            style = "bold" if row.source == "all" else None
            cells = _cells(found, row, stage if index == 0 else "")
            table.add_row(*cells, style=style, end_section=index == len(rows) - 1)
    return table


def _cells(found: Funnel, row: FlowRow, stage: str) -> list[str]:
    from puna.core.units import format_bytes, format_count

    most = max(row.rejected.items(), key=lambda item: item[1].docs, default=None)
    return [
        stage,
        row.source,
        f"{row.in_docs:,}",
        f"{row.kept_docs:,}",
        f"{row.kept_docs / row.in_docs:.1%}" if row.in_docs else "-",
        format_bytes(row.kept_bytes),
        format_count(found.tokens(row.kept_bytes)),
        f"{most[0]} ({most[1].docs:,})" if most else "",
    ]


def _reasons_table(found: Funnel) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from puna.core.units import format_bytes
    from puna.data.reasons import meaning_of

    load_stages()
    table = Table(title="Rejected, by reason", title_justify="left", box=SIMPLE)
    for name in ("stage", "source", "reason"):
        table.add_column(name, no_wrap=True)
    for name in ("docs", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("meaning")
    for row in found.rows:
        for reason, one in row.rejected.items():
            table.add_row(
                row.stage, row.source, reason, f"{one.docs:,}", format_bytes(one.n_bytes),
                meaning_of(reason),
            )  # fmt: skip
    return table
