"""``puna data try`` and ``puna data diff``: one document by itself, two runs side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from puna.cli.common import load_stages

if TYPE_CHECKING:
    from puna.data.trial import Trial

_SHOWN_CHARS = 2000
_MIN_WIDTH = 160


@click.command("try")
@click.argument("name", metavar="FILTER")
@click.option("--text", help="The document itself.")
@click.option("--file", type=click.Path(path_type=Path), help="Its file; - reads standard input.")
def try_filter(name: str, text: str | None, file: Path | None) -> None:
    """Judge one document and print every check with what it measured.

    FILTER is the name of a filter or of a profile.
    """
    from puna.data.trial import try_filters

    load_stages()
    if (text is None) == (file is None):
        raise click.UsageError("give the document by --text or by --file")
    if file is not None:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    assert text is not None
    _print_trial(try_filters(name, text, str(file or "")), text)


def _print_trial(trial: Trial, given: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE)
    for name in ("filter", "check", "measured", "threshold", "", "meaning"):
        justify = "right" if name in ("measured", "threshold") else "left"
        table.add_column(name, justify=justify, no_wrap=True)
    before = ""
    for check in trial.checks:
        check_name = check.reason.removeprefix(f"{check.filter}.")
        style = "red" if check.failed else None
        shown = check.filter if check.filter != before else ""
        meaning = f"{check.meaning} ({check.detail})" if check.detail else check.meaning
        table.add_row(
            shown, check_name, f"{check.value:.6g}", f"{check.threshold:g}",
            "fails" if check.failed else "", meaning, style=style,
        )  # fmt: skip
        before = check.filter
    console = Console()
    console.width = max(console.width, _MIN_WIDTH)
    console.print(table)
    if trial.text != given:
        click.echo(f"rewritten to {len(trial.text):,} of {len(given):,} characters:")
        click.echo(trial.text[:_SHOWN_CHARS])
    verdict = trial.verdict
    if verdict is None:
        click.secho("kept", fg="green")
    else:
        click.secho(f"rejected: {verdict.reason}", fg="red")


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Tell which documents changed their fate between two runs, and by which rule.

    FIRST and SECOND are the folders of runs over the same sources.
    """
    import json
    from dataclasses import asdict

    from puna.data.diff import compare_runs

    found = compare_runs(first, second)
    if as_json:
        click.echo(json.dumps(asdict(found), ensure_ascii=False, indent=2))
        return
    click.echo(f"{found.n_first:,} documents in {first}, {found.n_second:,} in {second}")
    click.echo(f"{found.n_same:,} with the same fate")
    for change in found.changes:
        click.secho(f"{change.n_docs:>10,}  {change.before} -> {change.after}", bold=True)
        for identifier, path in change.samples:
            click.echo(f"            {identifier}  {path}")
