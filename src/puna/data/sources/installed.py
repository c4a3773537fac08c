"""Where the running Python keeps its standard library and installed packages."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache

from puna.data.sources.base import WorkItem
from puna.data.sources.walk import walk_files

STDLIB = "stdlib/"
PACKAGES = "site-packages/"
DISTRIBUTIONS = "distributions/"
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")
_OURSELVES = "puna"


def stdlib_folder() -> str:
    """Return the folder of the standard library."""
    return sysconfig.get_paths()["stdlib"]


def package_folders() -> list[str]:
    """Return the folders of installed packages on the import path, in its order."""
    folders: list[str] = []
    for entry in sys.path:
        real = os.path.realpath(entry)
        if os.path.basename(real) in _PACKAGE_FOLDERS and os.path.isdir(real):
            folders.append(real)
    return list(dict.fromkeys(folders))


def is_ourselves(path: str) -> bool:
    """Tell whether a path inside the packages belongs to puna itself."""
    top = path.partition("/")[0]
    return top == _OURSELVES or top.startswith((f"{_OURSELVES}-", f"__editable__.{_OURSELVES}"))


def stdlib_files() -> Iterator[WorkItem]:
    """Yield the files of the standard library as ``stdlib/...``."""
    folder = stdlib_folder()
    yield from _walk_once(folder, STDLIB, os.stat(folder).st_mtime_ns)


def package_files() -> Iterator[WorkItem]:
    """Yield the files of packages as ``site-packages/...``; the first on the import path wins."""
    seen: set[str] = set()
    for folder in package_folders():
        for item in _walk_once(folder, PACKAGES, os.stat(folder).st_mtime_ns):
            if item.path not in seen and not is_ourselves(item.path[len(PACKAGES) :]):
                seen.add(item.path)
                yield item


@lru_cache(maxsize=8)
def _walk_once(folder: str, prefix: str, changed_ns: int) -> tuple[WorkItem, ...]:
    """Walk a folder of the installation; several sources look at it, and each more than once.

    Args:
        folder: The folder.
        prefix: Begin of the logical paths.
        changed_ns: Modification time of the folder; installing a package changes it.
    """
    skipped = {"__pycache__", *_PACKAGE_FOLDERS}
    return tuple(walk_files(folder, prefix, skip_folder=skipped.__contains__, must_read=False))


def package_of(path: str) -> str:
    """Return the package that a logical path belongs to: ``torch``, or ``stdlib``."""
    if not path.startswith(PACKAGES):
        return "stdlib"
    return path[len(PACKAGES) :].partition("/")[0].removesuffix(".py")
