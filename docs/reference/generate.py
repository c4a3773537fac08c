"""Writes the generated pages of the reference: every command's help, key of a recipe, and filter.

Run ``python docs/reference/generate.py`` after a change of a command or of a configuration; the
tests fail while the pages are stale (``--check``).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import sys
from pathlib import Path

import click

from puna.cli.common import load_stages
from puna.cli.config import schema
from puna.cli.main import cli
from puna.data.filters import FILTERS, PROFILES
from puna.data.filters.profiles import name_of

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


def filters_page() -> str:
    """Every filter of documents with its reasons and settings, and every profile."""
    parts = [f"{NOTE}# Filters\n\nUsed by `data.filter`, `puna data try` and `puna data label`.\n"]
    parts.append("## Profiles\n\n| profile | filters, in their order |\n|---|---|")
    for name in PROFILES:
        names = ", ".join(f"`{name_of(one)}`" for one in PROFILES.get(name).filters)
        parts.append(f"| `{name}` | {names or 'none'} |")
    for name in FILTERS:
        one = FILTERS.get(name)
        if not one.__module__.startswith("puna."):
            continue  # of a plugin
        text = inspect.cleandoc(one.__doc__ or "")
        rewrites = "\n\nRewrites the text of what it keeps." if one.rewrites else ""
        parts.append(f"\n## `{name}`\n\n{text}{rewrites}\n\n| setting | default | |\n|---|---|---|")
        defaults = one().model_dump(mode="json")
        for key, field in one.model_fields.items():
            shown = json.dumps(defaults[key], ensure_ascii=False)
            shown = shown if len(shown) < 200 else f"{len(defaults[key])} entries"
            parts.append(f"| `{key}` | {_cell(f'`{shown}`')} | {_cell(field.description or '')} |")
        parts.append("\n| reason | |\n|---|---|")
        parts += [f"| `{code}` | {_cell(meaning)} |" for code, meaning in one.reasons.items()]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main(arguments: list[str]) -> int:
    """Write the pages, or with ``--check`` say which are stale."""
    load_stages()
    pages = {
        HERE / "commands.md": commands_page(),
        HERE / "filters.md": filters_page(),
        HERE / "recipe.md": recipe_page(),
    }
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
