"""Choosing work items: path patterns and deterministic sampling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import xxhash

from puna.core.errors import PunaError
from puna.data.sources.base import SourceConfig, WorkItem

_SPECIAL = re.compile(r"[*?\[{]")


def has_pattern(path: str) -> bool:
    """Tell whether a path holds pattern characters."""
    return _SPECIAL.search(path) is not None


def fixed_prefix(pattern: str) -> str:
    """Return the folder above the first pattern character, without a slash at the end."""
    found = _SPECIAL.search(pattern)
    if found is None:
        return pattern
    folder = pattern[: found.start()].rpartition("/")[0]
    return "/" if not folder and pattern.startswith("/") else folder


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a path pattern: ``*`` and ``?`` stay inside a path part, ``**`` spans parts.

    Unlike in a shell, a leading dot or underscore of a name is nothing special: no file that a
    pattern names is left out silently.

    Raises:
        PunaError: A bracket or brace is not closed.
    """
    out, at, depth = [], 0, 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "*":
            if pattern[at : at + 2] == "*/":
                out.append("(?:.*/)?")
                at += 2
            elif pattern[at : at + 1] == "*":
                out.append(".*")
                at += 1
            else:
                out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "[":
            end = pattern.find("]", at + 1)
            if end < 0:
                raise PunaError(f"pattern {pattern!r}: `[` is not closed", "write `[[]` for a `[`")
            inner = pattern[at:end].replace("\\", "\\\\").replace("[", "\\[")
            out.append(f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]")
            at = end + 1
        elif char == "{":
            out.append("(?:")
            depth += 1
        elif char in "},":
            out.append({"}": ")", ",": "|"}[char] if depth else re.escape(char))
            depth -= char == "}" and depth > 0
        else:
            out.append(re.escape(char))
    if depth:
        raise PunaError(f"pattern {pattern!r}: `{{` is not closed", "close it with `}`")
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as error:
        raise PunaError(f"pattern {pattern!r}: {error}", "correct the pattern") from error


def select_items(items: Iterable[WorkItem], config: SourceConfig) -> list[WorkItem]:
    """Apply the patterns and limits of a source; return the items sorted by path.

    A sample depends only on the paths and sizes, never on the order of the listing: items are taken
    in the order of the hash of their path as long as they fit, those of ``first`` before the rest.

    Raises:
        PunaError: Two items have the same path.
    """
    include = [compile_pattern(pattern) for pattern in config.include]
    exclude = [compile_pattern(pattern) for pattern in config.exclude]
    chosen = [item for item in items if _matches(item.path, include, exclude)]
    _refuse_twins(chosen, config.name)
    if config.max_files is not None or config.max_bytes is not None:
        chosen = _sample(chosen, config)
    return sorted(chosen, key=lambda item: item.path)


def _matches(
    path: str, include: Sequence[re.Pattern[str]], exclude: Sequence[re.Pattern[str]]
) -> bool:
    if include and not any(pattern.fullmatch(path) for pattern in include):
        return False
    return not any(pattern.fullmatch(path) for pattern in exclude)


def _sample(items: list[WorkItem], config: SourceConfig) -> list[WorkItem]:
    first = [compile_pattern(pattern) for pattern in config.first]

    def rank(item: WorkItem) -> tuple[bool, int, str]:
        is_first = any(pattern.fullmatch(item.path) for pattern in first)
        return not is_first, xxhash.xxh3_64_intdigest(item.path.encode()), item.path

    taken, n_bytes = [], 0
    for item in sorted(items, key=rank):
        if config.max_bytes is not None and n_bytes + item.n_bytes > config.max_bytes:
            continue
        if len(taken) == config.max_files:
            break
        taken.append(item)
        n_bytes += item.n_bytes
    return taken


def _refuse_twins(items: Iterable[WorkItem], source: str) -> None:
    seen: dict[str, WorkItem] = {}
    for item in items:
        twin = seen.setdefault(item.path, item)
        if twin is not item:
            raise PunaError(
                f"source {source!r}: {twin.location} and {item.location} have the same path "
                f"{item.path!r} inside the source",
                "set `root` to a folder above both, or make two sources of them",
            )
