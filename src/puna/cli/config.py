"""``puna config``: show what a recipe resolves to, where each value comes from, what keys exist."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pydantic import BaseModel


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
    from puna.core.plan import plan_steps
    from puna.core.recipe import load_recipe

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
        click.echo(json.dumps(_json_schema(model), indent=2, ensure_ascii=False))
        return
    if stage is None:
        click.echo("# keys at the top")
        _print_keys(_json_schema(RunSettings))
    for name in known if stage is None else [stage]:
        click.echo(f"\n[{name}]  # {known[name].summary}")
        _print_keys(_json_schema(known[name].config))


def _json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model with all defaults, those that a function makes included."""
    from pydantic import BaseModel
    from pydantic.json_schema import GenerateJsonSchema

    class WithDefaults(GenerateJsonSchema):
        def get_default_value(self, schema: Any) -> Any:
            factory = schema.get("default_factory")
            if factory is None:
                return super().get_default_value(schema)
            made = factory()
            if isinstance(factory, type) and isinstance(made, BaseModel):
                return made.model_dump(include={"kind"})  # all else are its keys' own defaults
            return made

    return model.model_json_schema(schema_generator=WithDefaults)


def _print_keys(schema: dict[str, Any]) -> None:
    for path, key_type, default, meaning in _keys(schema, schema.get("$defs", {}), ""):
        click.echo(f"{path}: {key_type}{default}\n    {' '.join(meaning.split())}")


def _keys(
    schema: dict[str, Any], definitions: dict[str, Any], prefix: str
) -> Iterator[tuple[str, str, str, str]]:
    """Path, type, default and meaning of all keys below a JSON schema, those of tables included."""
    required = schema.get("required", [])
    for key, field in schema.get("properties", {}).items():
        path, meaning = f"{prefix}{key}", str(field.get("description", ""))
        mark, tables = _tables(field, definitions)
        if not tables or mark:
            yield path, _type(field), _default(field, key in required), meaning
        for table in tables:
            kind = table.get("properties", {}).get("kind", {}).get("const")
            inner = f"{path}{mark}<{kind}>" if len(tables) > 1 else f"{path}{mark}"
            if not mark:
                yield inner, _type(field), _table_default(field, table, key in required), meaning
            elif len(tables) > 1:
                yield inner, "table", "", str(table.get("description", ""))
            yield from _keys(table, definitions, f"{inner}.")


def _tables(field: dict[str, Any], definitions: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The tables that a key can hold, and what stands behind its name when it holds several.

    Returns:
        ``""``, ``"[]"`` (a list of tables) or ``".*"`` (tables under names that the user chooses);
        the schemas of the tables.
    """
    for mark, part in ((".*", "additionalProperties"), ("[]", "items"), ("", None)):
        value = field if part is None else field.get(part)
        if not isinstance(value, dict):
            continue
        options = [value, *value.get("anyOf", []), *value.get("oneOf", [])]
        options += [part for option in options[1:] for part in option.get("oneOf", [])]
        names = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
        found = [definitions[name] for name in names if "properties" in definitions[name]]
        if found:
            return mark, found
    return "", []


def _default(field: dict[str, Any], required: bool) -> str:
    return " (required)" if required else f" = {json.dumps(field.get('default'))}"


def _table_default(field: dict[str, Any], table: dict[str, Any], required: bool) -> str:
    """What is taken for a table that is left out, as far as its keys' own defaults do not say."""
    if required:
        return " (required)"
    default, keys = field.get("default"), table.get("properties", {})
    if default is None:
        return " = null"
    if "kind" in keys and keys["kind"].get("const") != default.get("kind"):
        return ""
    own = {key: value for key, value in default.items() if value != keys[key].get("default")}
    return f" = {json.dumps(own)}"


def _type(field: dict[str, Any]) -> str:
    if "const" in field:
        return json.dumps(field["const"])
    if "enum" in field:
        return " | ".join(json.dumps(value) for value in field["enum"])
    options = field.get("anyOf") or field.get("oneOf")
    if options:
        return " | ".join(dict.fromkeys(map(_type, options)))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    if "$ref" in field:
        return "table"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"table of {_type(values)}" if isinstance(values, dict) and values else "table"
    return str(field.get("type", "any"))
