"""Turns pydantic's validation errors into one clear message with the nearest valid key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from puna.core.errors import PunaError

_MAX_SHOWN = 8


def explain_validation(
    error: ValidationError,
    schema: type[BaseModel],
    values: Any,
    where: str,
    overridden: set[str] | None = None,
) -> PunaError:
    """Build the message for a rejected configuration.

    Args:
        error: What pydantic found.
        schema: The model that was validated.
        values: The raw values.
        where: Name of the file, for the message.
        overridden: Dotted paths that came from overrides; they are named as such.
    """
    lines, fixes = [], []
    errors = _causes(error.errors(include_url=False))
    for item in errors[:_MAX_SHOWN]:
        path, fields = _walk(schema, values, item["loc"])
        dotted = ".".join(str(part) for part in path)
        prefixes = {".".join(str(part) for part in path[: at + 1]) for at in range(len(path))}
        source = "override" if prefixes & (overridden or set()) else where
        message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if item["type"] == "extra_forbidden":
            key = str(path[-1])
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            lines.append(f"{source}: {dotted}: unknown key {key!r}")
            hint = f"did you mean {near[0]!r}? " if near else ""
            fixes.append(f"{hint}valid keys: {', '.join(sorted(fields)) or 'none here'}")
        elif item["type"] == "missing":
            lines.append(f"{source}: {dotted}: this key is required")
            fixes.append(f"add {path[-1]} = ... to it")
        else:
            at = f"{dotted}: " if dotted else ""
            # A rule over several keys names their values itself.
            is_rule = item["type"] == "value_error" and isinstance(item["input"], Mapping)
            got = "" if is_rule else f" (got {_short(item['input'])})"
            lines.append(f"{source}: {at}{message}{got}")
            named = f"the values named{' in ' + dotted if dotted else ''}"
            fixes.append(f"correct {dotted}" if dotted and not is_rule else f"correct {named}")
    rest = len(errors) - _MAX_SHOWN
    if rest > 0:
        lines.append(f"... and {rest} more")
    return PunaError("\n".join(lines), "; ".join(dict.fromkeys(fixes)))


def _causes(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out lists that are too short only because their items were refused."""
    return [
        item
        for item in errors
        if item["type"] != "too_short"
        or not any(
            len(other["loc"]) > len(item["loc"]) and other["loc"][: len(item["loc"])] == item["loc"]
            for other in errors
        )
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _walk(
    schema: Any, values: Any, loc: Sequence[int | str]
) -> tuple[list[int | str], Sequence[str]]:
    """Follow an error's location; return it without union tags, and the keys valid at its end."""
    path: list[int | str] = []
    current: Any = schema
    fields: Sequence[str] = []
    for part in loc:
        models = models_in(current)
        tagged = [model for model in models if _tag(model) == part]
        is_key = isinstance(values, Mapping) and part in values
        if tagged and not (is_key and part in _all_fields(models)):
            current = tagged[0]
            continue
        fields = _all_fields(models)
        if part == "[key]":
            continue
        path.append(part)
        if models and isinstance(part, str):
            owner = next((model for model in models if part in model.model_fields), None)
            current = owner.model_fields[part].annotation if owner else None
        else:
            current = _item_type(current)
        values = _child(values, part)
    return path, fields


def _child(values: Any, part: int | str) -> Any:
    if isinstance(values, Mapping):
        return values.get(part)
    if isinstance(values, Sequence) and isinstance(part, int) and part < len(values):
        return values[part]
    return None


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return all models that an annotation admits (unions and Annotated unwrapped)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    if origin is Annotated:
        return models_in(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [model for arg in get_args(annotation) for model in models_in(arg)]
    return []


def _item_type(annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _item_type(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        items = [_item_type(arg) for arg in get_args(annotation)]
        return next((item for item in items if item is not None), None)
    if origin in (list, tuple, dict, Sequence, Mapping):
        arguments = [arg for arg in get_args(annotation) if arg is not Ellipsis]
        return arguments[-1] if arguments else None
    return None


def _all_fields(models: Sequence[type[BaseModel]]) -> list[str]:
    return [name for model in models for name in model.model_fields]


def _tag(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field is not None else None
