"""How documented names become reference documents with metadata for question/answer pairs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from puna.data.readers.records import RawRecord
from puna.data.sources.docstrings import Documented, summarise

_MEDIA_TYPE = "text/plain"


def reference_records(
    path: str,
    module: str,
    doc: str,
    objects: list[Documented],
    *,
    home: Callable[[str], str | None],
    min_object_chars: int,
    package: str,
) -> Iterator[RawRecord]:
    """Make the documents of one module.

    Long classes and functions get a document each (``path#name``). The module's docstring and its
    short objects share one (``path``). Metadata: ``kind`` = "docstring"; ``name``, ``signature``
    and ``summary`` of what the document is about; and, when it documents several names, all of them
    as ``entries``.

    Args:
        path: Path of the module inside the source.
        module: Public name of the module; empty for the built-in names.
        doc: Docstring of the module.
        objects: Its documented objects.
        home: Tells the public module of an object; None leaves the object out.
        min_object_chars: Docstrings (of a class with its methods) of this length stand alone.
        package: Kept as metadata.
    """
    small: list[tuple[str, Documented]] = []
    for item in objects:
        owner = home(item.name)
        if owner is None:
            continue
        n_chars = len(item.doc) + sum(len(member.doc) for member in item.members)
        if n_chars < min_object_chars:
            small.append((owner, item))
            continue
        text = "\n".join(_object_lines(owner, item, ""))
        yield _record(f"{path}#{item.name}", text, _entries(owner, item), package)
    if not doc and not small:
        return
    name = module or "builtins"
    entries = [{"name": name, "signature": "", "summary": summarise(doc)}]
    lines = [f"module {name}", ""]
    if doc:
        lines += [doc, ""]
    for owner, item in small:
        entries += _entries(owner, item)
        lines += [*_object_lines(owner, item, "    "), ""]
    yield _record(path, "\n".join(lines), entries, package)


def _entries(module: str, item: Documented) -> list[dict[str, str]]:
    return [_entry(module, item), *(_entry(module, member) for member in item.members)]


def _record(path: str, text: str, entries: list[dict[str, Any]], package: str) -> RawRecord:
    metadata: dict[str, Any] = {"kind": "docstring", "package": package, **entries[0]}
    if len(entries) > 1:
        metadata["entries"] = [entry for entry in entries if entry["summary"]]
    text = text.rstrip() + "\n"
    return RawRecord(path, _MEDIA_TYPE, text, len(text.encode("utf-8", "replace")), metadata)


def _entry(module: str, item: Documented) -> dict[str, str]:
    return {
        "name": f"{module}.{item.name}" if module else item.name,
        "signature": item.signature,
        "summary": summarise(item.doc),
    }


def _object_lines(module: str, item: Documented, indent: str) -> Iterator[str]:
    yield ("class " if item.is_class else "") + _full_signature(module, item)
    if item.doc:
        yield ""
        yield textwrap.indent(item.doc, indent) if indent else item.doc
    for member in item.members:
        yield ""
        yield _full_signature("", member)
        yield ""
        yield textwrap.indent(member.doc, "    ")


def _full_signature(module: str, item: Documented) -> str:
    """Return the dotted name with its arguments: ``os.path.join(a, *p)``."""
    owner = item.name.rpartition(".")[0]
    prefix = ".".join(part for part in (module, owner) if part)
    return f"{prefix}.{_call(item)}" if prefix else _call(item)


def _call(item: Documented) -> str:
    return item.signature or item.name.rpartition(".")[2]
