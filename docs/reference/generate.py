"""Writes the generated pages of the reference: every command's help and every key of a recipe.

Run ``python docs/reference/generate.py`` after a change of a command or of a configuration; the
tests fail while the pages are stale (``--check``).
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import click

from puna.cli.common import load_stages
from puna.cli.config import schema
from puna.cli.main import cli

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/reference/generate.py; do not edit. -->\n\n"


def commands_page() -> str:
    """The help of every command, as Markdown."""
    return f"{NOTE}# Commands\n\n" + "\n".join(_help_of(cli, "puna", None))


def _help_of(command: click.Command, name: str, parent: click.Context | None) -> list[str]:
    context = click.Context(
        command, info_name=name.split()[-1], parent=parent, max_content_width=96
    )
    context.terminal_width = 96
    parts = [f"## `{name}`\n\n```text\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group):
        for sub_name in command.list_commands(context):
            sub = command.get_command(context, sub_name)
            if sub is not None:
                parts += _help_of(sub, f"{name} {sub_name}", context)
    return parts


def recipe_page() -> str:
    """Every key of a recipe, as printed by ``puna config schema``."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        schema.main([], standalone_mode=False)
    return f"{NOTE}# Keys of a recipe\n\n```text\n{text.getvalue().strip()}\n```\n"


def main(arguments: list[str]) -> int:
    """Write the pages, or with ``--check`` say which are stale."""
    load_stages()
    pages = {HERE / "commands.md": commands_page(), HERE / "recipe.md": recipe_page()}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} is stale: run python docs/reference/generate.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
