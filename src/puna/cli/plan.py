"""``puna plan``: what a cluster will do with a Llama, before anyone pays for it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from puna.cli.plan_calibrate import calibrate
from puna.cli.plan_estimate import estimate
from puna.cli.plan_fabric import fabric
from puna.cli.plan_failures import failures
from puna.cli.plan_search import search


@click.group("plan", no_args_is_help=True)
def plan() -> None:
    """Time, memory, money, energy and failures of a training, with 90 % intervals."""


plan.add_command(estimate)
plan.add_command(search)
plan.add_command(fabric)
plan.add_command(failures)
plan.add_command(calibrate)


@plan.command("predict")
@click.argument("rows", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="CSV to write."
)
@click.option(
    "--constants", type=click.Path(path_type=Path, dir_okay=False),
    help="Constants of `puna plan calibrate`; default: those of the release.",
)  # fmt: skip
def predict(rows: Path, out: Path, constants: Path | None) -> None:
    """Copy a CSV file of jobs and add predictions, without looking at what was measured.

    ROWS has the columns of the bundled public rows (docs/howto/plan.md). The columns value, step_s
    and mem_GiB are copied and never read.
    """
    from puna.plan.predict import predict_file
    from puna.plan.shipped import read_calibration

    known = None if constants is None else read_calibration(constants.read_text("utf-8"))
    n = predict_file(rows, out, known)
    click.echo(f"{n} rows predicted: {out}")


@plan.command("validate")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw the residuals of each source, as an SVG file.",
)  # fmt: skip
def validate(as_json: bool, picture: Path | None) -> None:
    """Run every accuracy protocol anew from the bundled public rows and print its errors."""
    from puna.cli.plan_tables import print_dossier
    from puna.core.fsio import write_text
    from puna.plan.validate import validate as run
    from puna.ui.plan_picture import draw_residuals

    dossier = run()
    if picture is not None:
        write_text(picture, draw_residuals(dossier))
    if as_json:
        click.echo(json.dumps(dossier.to_json(), indent=2))
        return
    print_dossier(dossier)
    if picture is not None:
        click.echo(f"picture: {picture}")
