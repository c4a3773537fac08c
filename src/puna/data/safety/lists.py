"""Lists that the user supplies: text files with an entry per line."""

from __future__ import annotations

from pathlib import Path

from puna.core.errors import PunaError


def read_list(path: Path, what: str, key: str) -> list[str]:
    """Return the lines of a list.

    Args:
        path: The file.
        what: Its kind, for messages: ``"block list"``.
        key: The setting that names it.

    Raises:
        PunaError: The file is missing or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise PunaError(f"{what} {path} does not exist", f"check `{key}`") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise PunaError(f"{what} {path}: {error}", "give a text file in UTF-8") from None
