"""``puna plan estimate --from``: what another trainer's settings fill in."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource


def fill_in(values: dict[str, Any], settings: str) -> None:
    """Put in what a file says, except where an option was given.

    Args:
        values: Options of the command, changed; a model's shape comes in as ``model``.
        settings: Path of the file.

    Raises:
        PunaError: The file cannot be read, or says nothing about a Llama.
    """
    from puna.core.progress import say
    from puna.plan.importers import import_settings

    found = import_settings(settings)
    context = click.get_current_context()
    given = {
        name for name in values if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }  # fmt: skip
    rows = found.values.pop("rows_per_replica", 0)
    values |= {name: value for name, value in found.values.items() if name not in given}
    if found.model is not None and "model_name" not in given:
        values |= {"model": found.model, "model_name": Path(settings.partition(".py:")[0]).stem}
    if rows and not values["global_batch"] and values["n_gpus"]:
        ranks = values["tp"] * values["cp"] * values["pp"]
        values["global_batch"] = rows * max(values["n_gpus"] // ranks, 1)
    shown = {"n_gpus": "gpus", "global_batch": "batch"}
    filled = [
        f"{shown.get(name, name)} {values[name]}"
        for name in ("n_gpus", "global_batch", *found.values)
        if name in values and values[name] and name not in given
    ]  # fmt: skip
    say(f"{found.source}: {', '.join(dict.fromkeys(filled))}")
    for note in found.notes:
        say(("note: ", "yellow"), note)
    if found.unknown:
        text = textwrap.shorten(", ".join(found.unknown), 1200, placeholder=" ...")
        say(f"not used ({len(found.unknown)}): {text}")
