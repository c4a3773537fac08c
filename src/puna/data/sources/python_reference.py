"""Source ``python-reference``: docstrings of public names, and language reference topics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from pydantic import Field

from puna.data.readers.compression import read_all
from puna.data.readers.records import BadRecord, RawRecord, UnusableError
from puna.data.sources.base import SourceConfig, SourceName, WorkItem, register_source
from puna.data.sources.builtin_names import PUBLIC_NAMES, available_modules, describe_module
from puna.data.sources.docstrings import parse_module, summarise
from puna.data.sources.installed import (
    PACKAGES,
    STDLIB,
    package_files,
    package_of,
    stdlib_files,
)
from puna.data.sources.open_files import opened, set_aside_unreadable
from puna.data.sources.reexports import Publisher
from puna.data.sources.reference_entries import reference_records

_BUILTIN = "builtin/"
_TOPICS = "topics"
_NOMINAL_BUILTIN_BYTES = 16_384
_SKIPPED_PARTS = frozenset(
    ("test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "lib-dynload", "encodings",
     "pydoc_data", "ensurepip", "__main__", "conftest", "setup")
)  # fmt: skip
_ALIASES = {  # private module -> the name under which people know it
    "posixpath": "os.path", "genericpath": "os.path", "_pydecimal": "decimal",
    "_collections_abc": "collections.abc", "_pydatetime": "datetime",
    "_weakrefset": "weakref",
}  # fmt: skip
_OPEN_FOLDERS = frozenset(("_core",))  # private folders whose content a package exports, by custom
_OTHER_SYSTEMS = frozenset(("ntpath", "nturl2path", "_osx_support", "macpath"))


class PythonReferenceConfig(SourceConfig):
    """Docstrings of public modules, classes and functions, and the language reference topics."""

    kind: Literal["python-reference"] = "python-reference"
    """Kind of source."""
    name: SourceName = "reference"
    """Name of the source in documents, mixture weights and reports."""
    first: tuple[str, ...] = ("builtin/*", "topics", "stdlib/**")
    """Under `max_files` or `max_bytes`, these are taken before all others."""
    packages: bool = True
    """Take installed packages (`site-packages/`) next to the standard library (`stdlib/`), the
    built-in names (`builtin/`) and the topics (`topics`)."""
    min_object_chars: int = Field(default=400, ge=0)
    """A class or function with at least this much docstring is a document of its own; shorter ones
    share the document of their module."""


class PythonReference:
    """Lists modules and reads their documented names."""

    def __init__(self, config: PythonReferenceConfig) -> None:
        self._config = config

    def list_items(self) -> Iterable[WorkItem]:
        """List public modules, C modules of the standard library, and the topics."""
        files = stdlib_files()
        if self._config.packages:
            files = itertools.chain(files, package_files())
        yield from (item for item in files if module_parts(item.path) is not None)
        for name in available_modules():
            yield WorkItem(f"{_BUILTIN}{name}", name, _NOMINAL_BUILTIN_BYTES)
        n_bytes = sum(len(text) for text in _topics().values())
        yield WorkItem(_TOPICS, _TOPICS, n_bytes)

    def read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        """Read the reference documents of one module."""
        return set_aside_unreadable(item, self._read(item))

    def _read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        if item.path == _TOPICS:
            yield from _topic_records()
            return
        try:
            if item.path.startswith(_BUILTIN):
                module = PUBLIC_NAMES[item.location]
                doc, objects = describe_module(item.location)
            else:
                module = ".".join(module_parts(item.path) or ())
                with opened(item.location) as file:
                    source = read_all(file, self._config.max_record_bytes)
                doc, objects = parse_module(source)
        except UnusableError as error:
            yield BadRecord(item.path, error.reason, error.error, item.n_bytes)
            return
        is_source = not item.path.startswith(_BUILTIN)
        if is_source and _is_private(module):
            doc = ""
        yield from reference_records(
            item.path, _ALIASES.get(module, module), doc, objects,
            home=_home(item, module) if is_source else lambda _: module,
            min_object_chars=self._config.min_object_chars, package=package_of(item.path),
        )  # fmt: skip


def module_parts(path: str) -> tuple[str, ...] | None:
    """Return the dotted name of the module in a file, in parts; None when nothing there is public.

    A private module (``concurrent/futures/_base.py``) may hold what a public package exports.
    """
    if not path.endswith(".py"):
        return None
    prefix = STDLIB if path.startswith(STDLIB) else PACKAGES
    parts = path[len(prefix) : -len(".py")].split("/")
    if parts[-1] == "__init__":
        parts.pop()
    if not parts or not _SKIPPED_PARTS.isdisjoint(parts) or not all(map(str.isidentifier, parts)):
        return None
    if prefix == STDLIB and len(parts) == 1:
        if parts[0] in _OTHER_SYSTEMS:
            return None
        if parts[0] in _ALIASES:
            return (parts[0],)
    if any(part.startswith("_") and part not in _OPEN_FOLDERS for part in parts[:-1]):
        return None
    return None if parts[0].startswith("_") else tuple(parts)


def _is_private(module: str) -> bool:
    return module == "genericpath" or any(part.startswith("_") for part in module.split("."))


def _home(item: WorkItem, module: str) -> Callable[[str], str | None]:
    if module in _ALIASES:
        return lambda _: _ALIASES[module]
    return Publisher(item.location, module.split(".")).public_module


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _topic_records() -> Iterator[RawRecord]:
    for name, text in sorted(_topics().items()):
        body = text.strip() + "\n"
        metadata = {"kind": "topic", "name": name, "package": "stdlib",
                    "summary": summarise("\n".join(body.split("\n")[2:]))}  # fmt: skip
        yield RawRecord(f"{_TOPICS}#{name}", "text/plain", body, len(body.encode()), metadata)


register_source("python-reference", PythonReferenceConfig, PythonReference)
