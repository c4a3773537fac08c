"""Registries: the extension points of puna, each a name -> object table that plugins may extend."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from puna.core.errors import PunaError

T = TypeVar("T")


class Registry(Generic[T]):
    """A named table of implementations.

    Args:
        what: What is registered, for messages: ``"document filter"``.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add an entry.

        Raises:
            ValueError: The name is taken by another object.
        """
        if self._entries.get(name, entry) is not entry:
            raise ValueError(f"{self.what} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def get(self, name: str) -> T:
        """Return an entry.

        Raises:
            PunaError: No such name; the message proposes the nearest.
        """
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PunaError(f"unknown {self.what} {name!r}", f"{hint}known: {', '.join(self)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries
