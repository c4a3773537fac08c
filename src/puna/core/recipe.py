"""Recipes: one TOML file plus ``key=value`` overrides become one typed, complete configuration.

A section of the recipe is the dotted name of a stage (``[data.filter]``); a section that is
present, even empty, makes the stage a step of the run. Precedence: default in the code < recipe <
override; the origin of every value is kept.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, Field, ValidationError, create_model

from puna.core.config import Config, Execution, InheritMark
from puna.core.errors import PunaError
from puna.core.explain import explain_validation, models_in
from puna.core.stage import Stage, stages

DEFAULT, RECIPE, OVERRIDE = "default", "recipe", "override"


class RunSettings(Config):
    """The keys at the top of a recipe, for the run as a whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run; its folder is `<runs_dir>/<name>`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed that every stage inherits unless its section sets its own."""
    workers: Execution[int] = Field(default=0, ge=0)
    """Worker processes that every stage inherits; 0 means one per usable core."""
    engine: Execution[str] = "duckdb"
    """Data engine that every data stage inherits: `duckdb` (this machine), or a Spark master
    (`spark://host:port`)."""
    spark: Execution[dict[str, str]] = Field(default_factory=dict)
    """Settings of Spark that every data stage inherits."""
    runs_dir: Execution[str] = "runs"
    """Folder that holds the runs."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Rewiring: `"<stage>.<input>"` -> another stage of the recipe, or a finished folder."""


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        path: The file it came from; None for a recipe made in Python.
        config: The whole configuration (a pydantic model with one section per stage).
        settings: The keys at the top.
        origins: Dotted path of each value -> ``default``, ``recipe`` or ``override``, and
            ``recipe (seed)`` for an inherited one.
    """

    path: Path | None
    config: BaseModel
    settings: RunSettings
    origins: Mapping[str, str]

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.settings.runs_dir) / self.settings.name

    def stage_configs(self) -> dict[str, tuple[Stage, Config]]:
        """The stages of this recipe with their configurations, in the order of registration."""
        found = {}
        for name, stage in stages().items():
            value: Any = self.config
            for part in name.split("."):
                value = getattr(value, part, None)
            if value is not None:
                found[name] = (stage, value)
        return found

    def dump_toml(self) -> str:
        """Write the complete resolved configuration as TOML; it reloads to an equal object."""
        return tomli_w.dumps(toml_values(self.config))


def toml_values(value: Any) -> Any:
    """Turn a configuration into values that TOML has (None is left out: it is always a default)."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: toml_values(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [toml_values(item) for item in value]
    return value


def recipe_schema() -> type[BaseModel]:
    """Build the model of a whole recipe from the registered stages."""
    return _recipe_schema(tuple((name, stage.config) for name, stage in stages().items()))


@lru_cache(maxsize=8)
def _recipe_schema(known: tuple[tuple[str, type[Config]], ...]) -> type[BaseModel]:
    tree: dict[str, Any] = {}
    for name, _ in known:
        node = tree
        *parents, last = name.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = stages()[name]
    return _section_model("Recipe", tree, RunSettings)


def _section_model(name: str, tree: dict[str, Any], base: type[Config]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for key, node in tree.items():
        if isinstance(node, Stage):
            inner: type[BaseModel] = node.config
            text = node.summary
            fields[key] = (inner | None, Field(default=None, description=text))
        else:
            inner = _section_model(f"{key.capitalize()}Section", node, Config)
            text = f"The `{key}` stages."
            fields[key] = (inner, Field(default_factory=inner, description=text))
    return create_model(name, __base__=base, **fields)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: TOML file.
        overrides: ``dotted.key=value`` with a TOML value; what is no TOML value is a string.

    Raises:
        PunaError: The file is missing or not TOML, or a value is wrong; the message names the
            dotted path, the value and the nearest valid key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PunaError(f"{path}: no such recipe", "give the path of a TOML file") from error
    except IsADirectoryError as error:
        raise PunaError(f"{path} is a folder", "give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise PunaError(f"{path} is not UTF-8: {error}", "save the recipe as UTF-8") from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PunaError(f"{path} is not valid TOML: {error}", "correct that line") from error
    return resolve(raw, overrides, path=path)


def resolve(raw: dict[str, Any], overrides: Sequence[str] = (), path: Path | None = None) -> Recipe:
    """Validate raw values into a recipe; see :func:`load_recipe`."""
    where = str(path) if path is not None else "recipe"
    schema = recipe_schema()
    values = _copy(raw)
    _fill_kinds(schema, values)
    changed = apply_overrides(values, overrides)
    _fill_kinds(schema, values)
    settings_keys = set(RunSettings.model_fields)
    try:
        settings = RunSettings.model_validate(
            {key: item for key, item in values.items() if key in settings_keys}
        )
        inherited = _inherit(values, settings)
        config = schema.model_validate(values)
    except ValidationError as error:
        failed = RunSettings if error.title == RunSettings.__name__ else schema
        raise explain_validation(error, failed, values, where, changed) from error
    recipe = Recipe(path, config, settings, _origins(config, raw, changed, inherited))
    _check_inputs(recipe, where)
    return recipe


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Lay ``key=value`` overrides over raw values in place; return the overridden paths.

    Changing the tag (``kind``) of a union drops what the recipe wrote for the other kind.
    """
    changed: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", key):
            raise PunaError(
                f"override {text!r} is not of the form key=value",
                "write for example train.pretrain.steps=100",
            )
        changed[key] = _parse_value(value.strip())
    # Tags first: a reset must not drop the overrides that belong to the new kind.
    for key in sorted(changed, key=lambda key: (not key.endswith(".kind"), key.count("."))):
        _set(values, key, changed[key])
    return set(changed)


def _fill_kinds(model: type[BaseModel], values: dict[str, Any]) -> None:
    """Write the default's ``kind`` into tables of tagged unions that give none."""
    for key, field in model.model_fields.items():
        inner = values.get(key)
        if not isinstance(inner, dict):
            continue
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        if isinstance(default, Config) and "kind" in type(default).model_fields:
            inner.setdefault("kind", getattr(default, "kind"))  # noqa: B009 - not on Config
        for option in models_in(field.annotation):
            kind = option.model_fields.get("kind")
            if kind is None or kind.default == inner.get("kind"):
                _fill_kinds(option, inner)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    node: Any = values
    *parents, last = dotted.split(".")
    for position, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, dotted)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            at = ".".join(parents[: position + 1])
            raise PunaError(f"override {dotted}: {at} is {node!r}, not a table", "check the key")
    if isinstance(node, list):
        node[_index(node, last, dotted)] = value
    else:
        if last == "kind" and node.get("kind", value) != value:
            node.clear()
        node[last] = value


def _index(node: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise PunaError(
            f"override {dotted}: {part!r} is no position in a list of {len(node)}",
            f"use 0 to {len(node) - 1}" if node else "write the list as a whole, key=[...]",
        )
    return int(part)


def _inherit(values: dict[str, Any], settings: RunSettings) -> dict[str, str]:
    """Fill fields that inherit a key of the top; return their paths with the key's name."""
    filled: dict[str, str] = {}
    for name, stage in stages().items():
        node: Any = values
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            continue
        for field_name, field in stage.config.model_fields.items():
            for mark in field.metadata:
                if isinstance(mark, InheritMark) and field_name not in node:
                    node[field_name] = getattr(settings, mark.key)
                    filled[f"{name}.{field_name}"] = mark.key
    return filled


def _origins(
    config: BaseModel, raw: Mapping[str, Any], changed: set[str], inherited: Mapping[str, str]
) -> dict[str, str]:
    written = set(flatten(raw))
    origins: dict[str, str] = {}
    for key in flatten(config.model_dump(mode="json")):
        prefixes = {key} | {key[:at] for at, char in enumerate(key) if char == "."}
        if prefixes & changed:
            origins[key] = OVERRIDE
        elif key in inherited:
            source = (
                OVERRIDE
                if inherited[key] in changed
                else (RECIPE if inherited[key] in written else DEFAULT)
            )
            origins[key] = f"{source} ({inherited[key]})"
        else:
            origins[key] = RECIPE if prefixes & written else DEFAULT
    return origins


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists of dicts to dotted paths; empty ones are kept as values."""
    if isinstance(value, Mapping) and value:
        return {
            path: item
            for key, inner in value.items()
            for path, item in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {
            path: item
            for index, inner in enumerate(value)
            for path, item in flatten(inner, f"{prefix}.{index}").items()
        }
    return {prefix: value}


def _check_inputs(recipe: Recipe, where: str) -> None:
    known = {
        f"{name}.{need.rstrip('?')}"
        for name, (stage, _) in recipe.stage_configs().items()
        for need in stage.needs
    }
    for key in recipe.settings.inputs:
        if key not in known:
            raise PunaError(
                f"{where}: inputs.{key!r} names no input of a stage in this recipe",
                f"known inputs: {', '.join(sorted(known)) or 'none'}",
            )
