"""Typed configuration: one frozen pydantic model per part, its identity and its fields' meaning.

A stage's configuration holds two kinds of fields. *Identity* fields change the numbers (data, seed,
dtype, batch) and are part of the fingerprint. *Execution* fields do not (worker count, device,
logging) and are marked with :data:`Execution`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


@dataclass(frozen=True)
class ExecutionMark:
    """Marks a field that changes how a stage runs but not what it computes."""


@dataclass(frozen=True)
class InheritMark:
    """Marks a field that takes the value of a key at the top of the recipe when it is not given."""

    key: str


Execution = Annotated[T, ExecutionMark()]
"""``n_workers: Execution[int] = 0``: outside the fingerprint."""

Seed = Annotated[int, InheritMark("seed")]
"""A seed that follows the recipe's ``seed`` unless the section sets its own."""

Workers = Annotated[int, ExecutionMark(), InheritMark("workers")]
"""Worker processes; follows the recipe's ``workers``; 0 means one per usable core."""

DataEngine = Annotated[str, ExecutionMark(), InheritMark("engine")]
"""Where data stages run; follows the recipe's ``engine``."""

SparkSettings = Annotated[dict[str, str], ExecutionMark(), InheritMark("spark")]
"""Settings of a Spark session; follow the recipe's ``spark``."""


class Config(BaseModel):
    """Base of every configuration: frozen, no unknown keys, attribute docstrings are the help.

    Write ``lr: float = Field(default=3e-4, gt=0)`` with the keyword ``default``.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def has_mark(metadata: list[Any], mark: type) -> bool:
    """Tell whether a pydantic field's metadata carries a mark."""
    return any(isinstance(item, mark) for item in metadata)


def identity(value: Any) -> Any:
    """Reduce a configuration to JSON values of the fields that change the numbers.

    Args:
        value: A :class:`Config` or any part of one.

    Returns:
        Nested dicts, lists and scalars without the execution fields.
    """
    if isinstance(value, BaseModel):
        return {
            name: identity(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not has_mark(field.metadata, ExecutionMark)
        }
    if isinstance(value, dict):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
