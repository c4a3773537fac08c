"""Documented names of the standard library's C modules, which have no source to parse.

Only modules of the standard library are imported here, never those of third parties.
"""

from __future__ import annotations

import importlib
import importlib.util
import types
from typing import Any

from puna.data.readers.records import UnusableError
from puna.data.sources.docstrings import Documented, clean, signature_in

PUBLIC_NAMES = {
    "builtins": "", "math": "math", "cmath": "cmath", "itertools": "itertools", "time": "time",
    "sys": "sys", "gc": "gc", "array": "array", "binascii": "binascii", "zlib": "zlib",
    "select": "select", "unicodedata": "unicodedata", "posix": "os", "_io": "io",
    "_collections": "collections", "_struct": "struct", "_csv": "csv", "_functools": "functools",
    "_random": "random", "_socket": "socket", "_sqlite3": "sqlite3", "_weakref": "weakref",
    "_codecs": "codecs", "_contextvars": "contextvars", "_signal": "signal", "marshal": "marshal",
    "fcntl": "fcntl", "mmap": "mmap", "resource": "resource", "_locale": "locale",
    "atexit": "atexit", "faulthandler": "faulthandler", "_bz2": "bz2", "_lzma": "lzma",
    "_queue": "queue", "_thread": "_thread", "pwd": "pwd", "grp": "grp", "syslog": "syslog",
}  # fmt: skip
"""C module -> module under which its names are public ("" for the built-in names)."""


def available_modules() -> list[str]:
    """Return the C modules of the table that this Python has."""
    return [name for name in PUBLIC_NAMES if importlib.util.find_spec(name) is not None]


def describe_module(name: str) -> tuple[str, list[Documented]]:
    """Return the docstring of a C module and its documented public classes and functions.

    Raises:
        UnusableError: The module cannot be imported here (``unreadable``).
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UnusableError("unreadable", str(error)) from error
    found = []
    for key in sorted(vars(module)):
        item = getattr(module, key)
        is_class = isinstance(item, type)
        if key.startswith("_") or not (is_class or isinstance(item, types.BuiltinFunctionType)):
            continue
        if is_class and item.__name__ != key:
            continue  # another name of a class that is listed already
        documented = _document(key, item, is_class)
        if documented is not None:
            found.append(documented)
    public = PUBLIC_NAMES[name]
    own_doc = clean(module.__doc__ or "") if public == name or not public else ""
    return own_doc, found


def _document(name: str, item: Any, is_class: bool) -> Documented | None:
    doc = clean(item.__doc__ or "")
    members = []
    if is_class:
        for key, member in sorted(vars(item).items()):
            if key.startswith("_") or not isinstance(member, types.MethodDescriptorType):
                continue
            member_doc = clean(member.__doc__ or "")
            if member_doc:
                members.append(Documented(f"{name}.{key}", _signature(key, member), member_doc))
    if not doc and not members:
        return None
    return Documented(name, _signature(name, item), doc, is_class, members)


def _signature(name: str, item: Any) -> str:
    text = getattr(item, "__text_signature__", None)
    if not text:
        return signature_in(clean(item.__doc__ or ""), name)
    inner = " ".join(text.split())[1:-1]
    first, _, rest = inner.partition(",")
    if first.strip().startswith("$"):
        inner = rest.strip().removeprefix("/").removeprefix(",").strip()
    return f"{name}({inner})"
