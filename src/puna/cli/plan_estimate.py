"""``puna plan estimate``: one job in numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

_CHOICES = {
    "schedule": ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble"),
    "sharding": ("zero1", "zero2", "zero3"),
    "recompute": ("none", "selective", "sac", "full"),
    "precision": ("bf16", "fp8", "mxfp8", "nvfp4", "fp32"),
    "software": ("plain", "tuned"),
}


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every question about a job has: model, hardware, batch."""
    return _job_options(command, required=True)


def _job_options(command: Callable[..., Any], *, required: bool) -> Callable[..., Any]:
    options = (
        click.option(
            "--model", "model_name", default="llama3-8b", show_default=True,
            help="Preset (`puna model list`) or a Hugging Face config.json.",
        ),
        click.option(
            "--gpu", default="h100", show_default=True,
            help="Preset, or a .toml or .json file of your own (docs/howto/plan.md).",
        ),
        click.option("--gpus", "n_gpus", type=click.IntRange(min=1), required=required,
                     help="GPUs of the job."),
        click.option("--fabric", default="ib:400g", show_default=True,
                     help="For example roce:400g:oversub=4:qps=16."),
        click.option("--seq-len", type=click.IntRange(min=2), default=8192, show_default=True),
        click.option("--batch", "global_batch", type=click.IntRange(min=1),
                     required=required, help="Rows per step, all GPUs."),
        click.option("--precision", type=click.Choice(_CHOICES["precision"]), default="bf16",
                     show_default=True, help="Of the layers' products."),
        click.option("--software", type=click.Choice(_CHOICES["software"]), default="plain",
                     show_default=True, help="tuned: a vendor's overlapped configuration."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _layout_options(command: Callable[..., Any]) -> Callable[..., Any]:
    positive = click.IntRange(min=1)
    options = [
        click.option(f"--{name}", type=positive, default=1, show_default=True, help=text)
        for name, text in (
            ("tp", "Ranks that share each matrix."),
            ("cp", "Ranks that share the tokens of a row."),
            ("pp", "Ranks that share the layers."),
            ("replicate", "Copies of the sharded states (HSDP)."),
            ("chunks", "Stages per pipeline rank."),
            ("micro-batch", "Rows per forward pass of a rank."),
        )
    ] + [
        click.option(f"--less-{end}", type=click.IntRange(min=0), default=0, show_default=True,
                     help=f"Layers that the {end} pipeline rank has less than the others.")
        for end in ("first", "last")
    ] + [
        click.option(f"--{name}", type=click.Choice(_CHOICES[name]), default=default,
                     show_default=True, help=text)
        for name, default, text in (
            ("schedule", "1f1b", "Order of the micro-batches."),
            ("sharding", "zero2", "zero1: Megatron's optimiser; zero2, zero3: FSDP."),
            ("recompute", "none", "What the backward pass computes again."),
        )
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


html_option = click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False),
    help="Also write one page with pictures, tables, intervals and assumptions.",
)  # fmt: skip


@click.command("estimate")
@click.option(
    "--from", "settings",
    help="Settings of Megatron-LM (.sh, .yaml) or torchtitan (.toml, .json, .py:FUNCTION) to start "
    "with; other options replace what they say.",
)  # fmt: skip
@partial(_job_options, required=False)
@_layout_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw the waterfall from the peak to what is left, as an SVG file.",
)  # fmt: skip
@html_option
@click.option(
    "--goodput", type=click.FloatRange(0, 1), default=1.0, show_default=True,
    help="Share of the time that failures leave (`puna plan failures`), for the waterfall.",
)  # fmt: skip
@click.option(
    "--stall", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="Share of the time that checkpoints stop the training for, for the waterfall.",
)  # fmt: skip
def estimate(
    settings: str | None, as_json: bool, picture: Path | None, html: Path | None,
    goodput: float, stall: float, **values: Any,
) -> None:  # fmt: skip
    """Predict step time, speed and memory of one layout, and show where the time goes."""
    from puna.cli.plan_tables import print_estimate
    from puna.core.errors import PunaError
    from puna.core.fsio import write_text
    from puna.plan.estimate import estimate as price
    from puna.plan.job import Job, Layout
    from puna.ui.plan_picture import draw_waterfall

    if picture is not None and picture.suffix != ".svg":
        raise PunaError(f"--picture {picture}: only SVG can be drawn", "end the name with .svg")
    if settings is not None:
        from puna.cli.plan_import import fill_in

        fill_in(values, settings)
    for name, option in (("n_gpus", "--gpus"), ("global_batch", "--batch")):
        if not values[name]:
            raise PunaError(f"{option} is missing", f"give {option} N, or --from FILE that says it")
    layout, model = {name: values.pop(name) for name in Layout.model_fields}, values["model_name"]
    found = price(Job(layout=Layout(**layout), **job_values(values)))
    levels = found.waterfall(goodput, stall)
    if picture is not None:
        write_text(picture, draw_waterfall(levels, found))
    if html is not None:
        from puna.ui.plan_page import write_page

        write_page(html, shown_name(model), found, levels)
    if as_json:
        values = found.to_json()
        values["waterfall_tflops"] = [level._asdict() for level in levels]
        click.echo(json.dumps(values, indent=2))
        return
    print_estimate(found, levels)
    for what, path in (("picture", picture), ("page", html)):
        if path is not None:
            click.echo(f"{what}: {path}")


def job_values(values: dict[str, Any]) -> dict[str, Any]:
    """Turn the options of :func:`job_options` into the fields of a job, without its layout.

    Raises:
        PunaError: Unknown model, GPU or fabric.
    """
    from puna.core.stage import load_plugins
    from puna.plan.fabric import parse_fabric
    from puna.plan.hardware import find_gpu
    from puna.plan.job import find_model

    load_plugins()
    rest = dict(values)
    name, model = rest.pop("model_name"), rest.pop("model", None)
    return {
        "model": model or find_model(name),
        "gpu": find_gpu(rest.pop("gpu")),
        "fabric": parse_fabric(rest.pop("fabric")),
        **rest,
    }


def shown_name(model_name: str) -> str:
    """Return what a page calls the model of ``--model``: a preset, or the folder of a file."""
    path = Path(model_name)
    return path.resolve().parent.name if path.suffix == ".json" else path.name


def choices_agree() -> bool:
    """Tell whether the choices written here, for a fast help, are those of the job's types."""
    from puna.plan import job

    types = {
        "schedule": job.Schedule, "sharding": job.Sharding, "recompute": job.Recompute,
        "precision": job.Precision, "software": job.Software,
    }  # fmt: skip
    return all(get_args(kind) == _CHOICES[name] for name, kind in types.items())
