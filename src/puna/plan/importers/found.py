"""What a file of another trainer says, in the planner's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from puna.model.config import LlamaConfig


class Settings:
    """Settings by name that remember which of them were asked for.

    Args:
        values: Name to value; None counts as absent.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._used: set[str] = set()

    def get(self, *names: str) -> Any:
        """Return the value of the first name that is there, or None."""
        self._used.update(names)
        return next((self._values[name] for name in names if name in self._values), None)

    def number(self, *names: str, default: int = 0) -> int:
        """Return a whole number.

        Raises:
            ValueError: It is none.
        """
        value = self.get(*names)
        if value is None:
            return default
        try:
            return int(str(value).replace("_", ""))
        except ValueError:
            raise ValueError(f"{names[0]} = {value!r} is no whole number") from None

    def flag(self, *names: str) -> bool:
        """Tell whether a setting is on."""
        return str(self.get(*names)).lower() in ("true", "1", "yes", "on")

    def unused(self) -> list[str]:
        """Names that nobody asked for, sorted."""
        return sorted(set(self._values) - self._used)


@dataclass
class Imported:
    """A job of another trainer.

    Attributes:
        source: ``Megatron-LM`` or ``torchtitan``.
        model: Its shape; None when the file does not say it.
        values: Options of ``puna plan estimate`` by name, those that the file decides.
        notes: What is priced in another way than the file says, and why.
        unknown: Settings that were not looked at.
    """

    source: str
    model: LlamaConfig | None
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
