"""What the command files share: groups that hold the stages' commands, loading of stages."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from puna.core.stage import Stage, arrange, load_plugins, stages

if TYPE_CHECKING:
    from pydantic import BaseModel

C = TypeVar("C", bound="BaseModel")

STAGE_MODULES = (
    "puna.data.ingest",
    "puna.data.filter",
    "puna.data.safety",
    "puna.data.lines",
    "puna.data.dedup",
    "puna.data.semantic",
    "puna.data.quality",
    "puna.data.substrings",
    "puna.data.decontaminate",
    "puna.data.split",
    "puna.tokens.train",
    "puna.tokens.use",
    "puna.tokens.count",
    "puna.data.compose",
    "puna.tokens.encode",
    "puna.tokens.import_stage",
    "puna.train.stage",
    "puna.post.pairs",
    "puna.post.annotated",
    "puna.post.sft",
    "puna.eval.bpb",
    "puna.eval.samples",
    "puna.ui.report.stage",
)
"""The modules that register the built-in stages, in the order of the story; none imports torch."""


def load_stages() -> None:
    """Register the built-in stages and those of plugins."""
    for module in STAGE_MODULES:
        importlib.import_module(module)
    load_plugins()
    arrange(STAGE_MODULES)


def config_of(schema: type[C], overrides: Sequence[str]) -> C:
    """Make the configuration of a command from its ``KEY=VALUE`` arguments.

    Raises:
        PunaError: A key is unknown or a value is wrong.
    """
    from pydantic import ValidationError

    from puna.core.explain import explain_validation
    from puna.core.recipe import apply_overrides

    values: dict[str, Any] = {}
    changed = apply_overrides(values, overrides)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise explain_validation(error, schema, values, "command", changed) from error


def run_stage(stage_name: str, recipe: Path, overrides: tuple[str, ...], rebuild: bool) -> int:
    """Run one stage of a recipe; the same call as the step inside ``puna run``."""
    from puna.cli.nodes import follow_if_told, leading
    from puna.core.progress import say
    from puna.core.recipe import load_recipe
    from puna.core.run import run_recipe

    loaded = load_recipe(recipe, overrides)
    code = follow_if_told(loaded)
    if code is not None:
        return code
    with leading(loaded):
        result = run_recipe(loaded, only=stage_name, rebuild=[stage_name] if rebuild else [])
    if result.skipped:
        say(f"{stage_name} is finished already: {result.run_dir / stage_name}; nothing to do")
    return 0


def stage_command(stage: Stage) -> click.Command:
    """Make the command of a stage: ``puna data filter RECIPE [KEY=VALUE ...]``."""

    def call(recipe: Path, overrides: tuple[str, ...], rebuild: bool) -> int:
        return run_stage(stage.name, recipe, overrides, rebuild)

    return click.Command(
        stage.name.rpartition(".")[2],
        callback=call,
        params=[
            click.Argument(["recipe"], type=click.Path(path_type=Path)),
            click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]..."),
            click.Option(["--rebuild"], is_flag=True, help="Make it anew though it is finished."),
        ],
        help=f"{stage.summary}\n\nStage `{stage.name}` of a recipe; its keys stand under "
        f"[{stage.name}] (see `puna config schema {stage.name}`).",
        short_help=stage.summary,
    )


class StageGroup(click.Group):
    """A group with one command per registered stage of its prefix, beside its own commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the group's own commands and of its stages."""
        return [*super().list_commands(ctx), *self._stages()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command of the group, or the command of one of its stages."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        found = self._stages().get(cmd_name)
        return stage_command(found) if found is not None else None

    def _stages(self) -> dict[str, Stage]:
        load_stages()
        prefix = f"{self.name}."
        return {
            name.removeprefix(prefix): stage
            for name, stage in stages().items()
            if name.startswith(prefix)
        }


def stage_group(prefix: str, text: str) -> StageGroup:
    """Make the command group of a layer.

    Args:
        prefix: Name of the group and first part of its stages' names.
        text: Its help.
    """
    return StageGroup(prefix, help=text, no_args_is_help=True)
