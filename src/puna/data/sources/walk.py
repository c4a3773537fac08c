"""Walking local folders: every regular file with its logical path and size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from puna.core.errors import explain_environment_error
from puna.core.progress import say
from puna.data.sources.base import WorkItem

VCS_FOLDERS = frozenset((".git", ".hg", ".svn"))
"""Folders of version control: objects and bookkeeping, no documents."""


def logical(name: str) -> str:
    r"""Return a file name as valid Unicode: bytes that are none become ``\xNN``."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return name


def walk_files(
    root: str,
    prefix: str = "",
    *,
    skip_folder: Callable[[str], bool] | None = None,
    follow_links: bool = False,
    must_read: bool = True,
    stamped: bool = False,
) -> Iterator[WorkItem]:
    """Yield the files below a folder.

    Args:
        root: The folder.
        prefix: Put before the logical paths, with the slash.
        skip_folder: Called with the name of a folder; true leaves it out.
        follow_links: Follow symbolic links (each folder once); otherwise they are left out.
        must_read: A folder that may not be read is an error; otherwise it is reported and left out.
        stamped: Take the modification time as stamp.

    Raises:
        PunaError: A folder may not be read, and ``must_read``.
    """
    stack = [(root, prefix)]
    visited = {os.path.realpath(root)} if follow_links else set()
    while stack:
        folder, path = stack.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            problem = explain_environment_error(error, folder)
            if must_read:
                raise problem or error from error
            say(("warning", "yellow"), f": {problem or error}; its files are left out")
            continue
        for entry in entries:
            name = logical(entry.name)
            if entry.is_dir(follow_symlinks=follow_links):
                if skip_folder is not None and skip_folder(entry.name):
                    continue
                if follow_links:
                    real = os.path.realpath(entry.path)
                    if real in visited:
                        continue
                    visited.add(real)
                stack.append((entry.path, f"{path}{name}/"))
            elif entry.is_file(follow_symlinks=follow_links):
                stat = entry.stat(follow_symlinks=follow_links)
                stamp = str(stat.st_mtime_ns) if stamped else ""
                yield WorkItem(f"{path}{name}", entry.path, stat.st_size, stamp)
            elif follow_links and entry.is_symlink():
                yield WorkItem(f"{path}{name}", entry.path, 0)  # points to nothing: reading says so
