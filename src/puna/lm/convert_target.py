"""The place of a conversion's result: free, large enough, and taken only by what is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from puna.core.errors import PunaError
from puna.core.fsio import commit_dir, fsync_dir, remove_tree
from puna.core.units import format_bytes

_MARKS = ("config.json", "params.json")


def check_target(source: Path, out: Path, *, overwrite: bool) -> None:
    """Check that the result may take its place.

    Args:
        source: The checkpoint that is read.
        out: Where the result is to stand.
        overwrite: Another checkpoint may be replaced.

    Raises:
        PunaError: It stands in the way of the source, its parent is missing, or something is there
            that is not to be replaced.
    """
    origin, target = source.resolve(), out.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        raise PunaError(
            f"{out} and the checkpoint {source} lie one in the other",
            "choose another place for the result",
        )
    if not out.parent.is_dir():
        raise PunaError(f"{out.parent} does not exist", "make the folder first")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise PunaError(
            f"{out} exists already", "choose another place, or pass --overwrite to replace it"
        )
    is_checkpoint = any((out / name).is_file() for name in _MARKS)
    if out.is_dir() and not is_checkpoint and not list(out.glob("*.gguf")):
        raise PunaError(
            f"{out} is no checkpoint: it is not replaced, --overwrite or not",
            "choose another place for the result",
        )


def check_space(out: Path, n_bytes: int) -> None:
    """Check that the disk has room for the weights.

    Raises:
        PunaError: It has not.
    """
    free = shutil.disk_usage(out.parent).free
    if free < n_bytes:
        raise PunaError(
            f"{out.parent}: the result needs {format_bytes(n_bytes)}, the disk has "
            f"{format_bytes(free)} left",
            "free some space, or choose another disk or a smaller --dtype",
        )


def publish(out: Path, write: Callable[[Path], None]) -> int:
    """Write beside the place, then take it; return the bytes of weights.

    Whatever goes wrong, what stood there stays, and nothing else is left.

    Args:
        out: The place: a folder, or a ``.gguf`` file.
        write: Writes to the path that it is given; a folder exists already.
    """
    is_file = out.suffix == ".gguf"
    partial = out.with_name(f".{out.name}.partial")
    old = out.with_name(f".{out.name}.old")
    remove_tree(partial)  # of a conversion that was killed
    try:
        if not is_file:
            partial.mkdir()
        write(partial)
        n_bytes = _weight_bytes(partial)
        if out.exists():
            remove_tree(old)
            os.rename(out, old)
        try:
            if is_file:
                os.rename(partial, out)
                fsync_dir(out.parent)
            else:
                commit_dir(partial, out)
        except BaseException:
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
    finally:
        with contextlib.suppress(OSError):
            remove_tree(partial)
    remove_tree(old)
    return n_bytes


def _weight_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    files = [*path.glob("*.safetensors"), *path.glob("*.pth")]
    return sum(file.stat().st_size for file in files)
