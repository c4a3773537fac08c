"""``puna run``: walk a recipe."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--rebuild", multiple=True, metavar="STAGE", help="Make a stage and what follows anew."
)
def run(recipe: Path, overrides: tuple[str, ...], rebuild: tuple[str, ...]) -> int:
    """Run RECIPE from its first stage to its report.

    Finished stages are skipped and unfinished ones resumed, so the same command continues a run
    that was killed. KEY=VALUE overrides a key of the recipe: `train.pretrain.steps=100`.
    """
    from puna.cli.common import load_stages
    from puna.cli.nodes import follow_if_told, leading
    from puna.cli.summary import print_summary
    from puna.core.progress import say
    from puna.core.recipe import load_recipe
    from puna.core.run import run_recipe
    from puna.core.units import format_duration

    load_stages()
    loaded = load_recipe(recipe, overrides)
    code = follow_if_told(loaded)
    if code is not None:
        return code
    with leading(loaded):
        result = run_recipe(loaded, rebuild=rebuild)
    if result.done:
        say(
            "run ",
            (str(result.run_dir), "bold"),
            f": {len(result.done)} stages in {format_duration(result.seconds)}"
            + (f", {len(result.skipped)} were finished before" if result.skipped else ""),
        )
    print_summary(result.run_dir)
    if not result.done:
        say(
            f"everything is up to date: {result.run_dir} ({len(result.skipped)} stages); "
            "nothing to do"
        )
    return 0
