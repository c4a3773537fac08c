"""``puna report``: make the report of a finished run anew."""

from __future__ import annotations

from pathlib import Path

import click

from puna.cli.common import run_stage


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def report(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Make the report of the run of RECIPE anew from what the run left on disk."""
    from puna.cli.common import load_stages

    load_stages()
    run_stage("report", recipe, overrides, rebuild=True)
