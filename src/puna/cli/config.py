"""``puna config``: show what a recipe resolves to, where each value comes from, what keys exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.group(no_args_is_help=True)
def config() -> None:
    """Show, check and explain the configuration of a recipe."""
    from puna.cli.common import load_stages

    load_stages()


@config.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
def show(recipe: Path, overrides: tuple[str, ...], origin: bool) -> None:
    """Print the complete resolved configuration of RECIPE (TOML that reloads to the same)."""
    from puna.core.recipe import flatten, load_recipe

    resolved = load_recipe(recipe, overrides)
    if not origin:
        click.echo(resolved.dump_toml(), nl=False)
        return
    values = flatten(resolved.config.model_dump(mode="json"))
    width = min(max(map(len, values)), 60)
    for key, value in values.items():
        click.echo(
            f"{key:<{width}}  {json.dumps(value, ensure_ascii=False)}  ({resolved.origins[key]})"
        )


@config.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def check(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and print its steps in the order in which they run."""
    from puna.core.recipe import load_recipe
    from puna.core.run import plan_steps

    for name, step in plan_steps(load_recipe(recipe, overrides)).items():
        inputs = ", ".join(f"{key} <- {source}" for key, source in step.sources.items())
        click.echo(f"{name:<16} {inputs}")


@config.command()
@click.argument("stage", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the JSON schema.")
def schema(stage: str | None, as_json: bool) -> None:
    """Print every key of a recipe (or of one STAGE) with its type, default and meaning."""
    from puna.core.errors import PunaError
    from puna.core.recipe import RunSettings, recipe_schema
    from puna.core.stage import stages

    known = stages()
    if stage is not None and stage not in known:
        raise PunaError(f"unknown stage {stage!r}", f"known: {', '.join(known)}")
    if as_json:
        model = known[stage].config if stage is not None else recipe_schema()
        click.echo(json.dumps(model.model_json_schema(), indent=2, ensure_ascii=False))
        return
    if stage is None:
        click.echo("# keys at the top")
        _print_keys(RunSettings.model_json_schema())
    for name in known if stage is None else [stage]:
        click.echo(f"\n[{name}]  # {known[name].summary}")
        _print_keys(known[name].config.model_json_schema())


def _print_keys(schema: dict[str, Any]) -> None:
    definitions = schema.get("$defs", {})
    for key, field in _fields(schema, definitions, ""):
        default = f" = {json.dumps(field['default'])}" if "default" in field else " (required)"
        meaning = " ".join(str(field.get("description", "")).split())
        click.echo(f"{key}: {_type(field)}{default}\n    {meaning}")


def _fields(
    schema: dict[str, Any], definitions: dict[str, Any], prefix: str
) -> list[tuple[str, dict[str, Any]]]:
    """All keys below a JSON schema, nested objects and the members of unions included."""
    found = []
    required = set(schema.get("required", []))
    for key, field in schema.get("properties", {}).items():
        path = f"{prefix}{key}"
        nested = _references(field, definitions)
        if not nested:
            found.append((path, field if key not in required else _without_default(field)))
            continue
        many = field.get("type") == "array"
        for title, inner in nested:
            kind = inner.get("properties", {}).get("kind", {}).get("const")
            mark = f"{path}{'[]' if many else ''}" + (
                f"<{kind or title}>" if len(nested) > 1 else ""
            )
            found.append((mark, {**_without_default(field), "type": "table", "default": {}}))
            found.extend(_fields(inner, definitions, f"{mark}."))
    return found


def _without_default(field: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in field.items() if key != "default"}


def _references(
    field: dict[str, Any], definitions: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    options = [
        field,
        *field.get("anyOf", []),
        *field.get("oneOf", []),
        *field.get("allOf", []),
        *([field["items"]] if isinstance(field.get("items"), dict) else []),
        *(field.get("items", {}).get("oneOf", []) if isinstance(field.get("items"), dict) else []),
    ]
    names = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
    return [
        (name, definitions[name]) for name in names if "properties" in definitions.get(name, {})
    ]


def _type(field: dict[str, Any]) -> str:
    if "const" in field:
        return json.dumps(field["const"])
    if "enum" in field:
        return " | ".join(json.dumps(value) for value in field["enum"])
    if "anyOf" in field:
        return " | ".join(_type(option) for option in field["anyOf"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))
