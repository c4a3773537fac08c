"""``puna model``: presets, inspection, comparison: what a model is and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from puna.cli.common import stage_group
from puna.cli.model_convert import convert

_DTYPES = ("float32", "bfloat16", "float16", "float8", "int8")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
_DTYPE = click.option(
    "--dtype", type=click.Choice(_DTYPES), default="bfloat16", show_default=True
)  # fmt: skip

model = stage_group("model", "Presets; inspect, compare and convert models.")
model.add_command(convert)


@model.command("list")
@_JSON
@_DTYPE
def list_presets(as_json: bool, dtype: str) -> None:
    """List the presets with their size; a recipe names one as `preset`."""
    from puna.cli.model_tables import print_presets
    from puna.core.stage import load_plugins
    from puna.model.accounting import account
    from puna.model.config import PRESETS

    load_plugins()
    rows = sorted(
        ((name, account(PRESETS.get(name))) for name in PRESETS), key=lambda row: row[1].n_params
    )
    if as_json:
        click.echo(json.dumps({name: cost.to_json(dtype) for name, cost in rows}, indent=2))
        return
    print_presets(rows, dtype)


@model.command("inspect")
@click.argument("name_or_path")
@_JSON
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True,
    help="Sequences of the byte plan.",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens of each; default: full context."
)
@click.option("--dtype", type=click.Choice(_DTYPES), help="Of the weights; default: as stored.")
@click.option(
    "--rope-factor", type=float,
    help="For a Meta folder whose params.json only says that RoPE is scaled.",
)  # fmt: skip
@click.option(
    "--deep", is_flag=True, help="Read every weight: not finite, unfit for float16, wrong layout."
)
def inspect_one(
    name_or_path: str, as_json: bool, batch: int, context: int | None, dtype: str | None,
    rope_factor: float | None, deep: bool,
) -> None:  # fmt: skip
    """Show what a model is and what running it costs, before a weight is loaded.

    NAME_OR_PATH is a preset (`puna model list`), a Hugging Face or Meta folder, a .gguf file, a run
    or one of its stages. Only headers are read, unless --deep is given.
    """
    from puna.cli.model_inspect import print_inspection
    from puna.core.stage import load_plugins
    from puna.lm.inspect import inspect_model

    load_plugins()
    found = inspect_model(
        name_or_path, batch=batch, context=context, dtype=dtype, rope_factor=rope_factor, deep=deep
    )
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        print_inspection(found)


@model.command("compare")
@click.argument("a")
@click.argument("b")
@_JSON
@_DTYPE
@click.option(
    "--seq-len", type=click.IntRange(min=1), help="Sequence of the FLOPs; default: full context."
)
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw where the bytes went, as an SVG file.",
)  # fmt: skip
def compare_models(
    a: str, b: str, as_json: bool, dtype: str, seq_len: int | None, picture: Path | None
) -> None:
    """Show part by part what model B costs more than model A, without allocating either.

    A and B are whatever `puna model inspect` takes.
    """
    from puna.cli.model_tables import print_comparison
    from puna.core.errors import PunaError
    from puna.core.fsio import write_text
    from puna.core.stage import load_plugins
    from puna.lm.inspect import open_model
    from puna.model.accounting import compare
    from puna.ui.model_picture import draw_comparison

    load_plugins()
    if picture is not None and picture.suffix != ".svg":
        raise PunaError(f"--picture {picture}: only SVG can be drawn", "end the name with .svg")
    first, second = open_model(a), open_model(b)
    comparison = compare(first.config, second.config, dtype)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_text(picture, draw_comparison(comparison, a, b))
    if as_json:
        values = comparison.to_json(seq_len)
        values["a"] |= {"name": a, **first.to_json()}
        values["b"] |= {"name": b, **second.to_json()}
        click.echo(json.dumps(values, indent=2))
        return
    print_comparison(comparison, a, b, (first.stored, second.stored), seq_len)
    if picture is not None:
        click.echo(f"picture: {picture}")
