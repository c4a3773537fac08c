"""Under which name an object is public: what the ``__init__.py`` above a module exports from it.

``torch/nn/modules/linear.py`` defines ``Linear``; people call it ``torch.nn.Linear``, because the
packages above import it. Only syntax trees are read.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from puna.data.readers.records import UnusableError
from puna.data.sources.docstrings import all_names, parse, statements

_STAR = "*"
_MAX_INIT_BYTES = 1 << 20


@dataclass
class Exports:
    """What a package's ``__init__.py`` exports.

    Attributes:
        imports: Absolute module -> the names that are imported from it (``*`` for all).
        listed: Names in ``__all__`` (a package may load them lazily).
    """

    imports: dict[str, set[str]] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)


class Publisher:
    """Finds the public module of the objects of one source file.

    Args:
        location: Path of the file.
        parts: Its dotted module name, in parts, private parts included.
    """

    def __init__(self, location: str, parts: Sequence[str]) -> None:
        self._module = list(parts)
        folder = os.path.dirname(location)
        if os.path.basename(location) == "__init__.py":
            folder = os.path.dirname(folder)
        self._packages: list[tuple[str, Exports]] = []
        for depth in range(len(parts) - 1, 0, -1):
            package = ".".join(parts[:depth])
            exports = package_exports(os.path.join(folder, "__init__.py"), package)
            self._packages.append((package, exports))
            folder = os.path.dirname(folder)

    def public_module(self, name: str) -> str | None:
        """Return the shortest module that exports an object of the file; None when none is public.

        Args:
            name: Name of the object in the file.
        """
        known = ".".join(self._module)
        aliases = {known}
        direct_child = True
        for package, exports in self._packages:
            imported = any(exports.imports.get(alias, set()) & {name, _STAR} for alias in aliases)
            if imported or (direct_child and name in exports.listed):
                aliases.add(package)
                known = package
            direct_child = False
        return None if any(part.startswith("_") for part in known.split(".")) else known


@lru_cache(maxsize=1024)
def package_exports(path: str, package: str) -> Exports:
    """Read what a package exports; a package without a readable ``__init__.py`` exports nothing."""
    exports = Exports()
    try:
        if os.path.getsize(path) > _MAX_INIT_BYTES:
            return exports
        with open(path, "rb") as file:
            tree = parse(file.read())
    except (OSError, UnusableError):
        return exports  # the file itself is an item of its own, and is set aside there
    exports.listed = all_names(tree.body) or set()
    for node in statements(tree.body):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names if alias.asname in (None, alias.name)}
            exports.imports.setdefault(_absolute(node, package), set()).update(names)
    return exports


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])
