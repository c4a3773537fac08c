"""Errors that a user can act on, and how the system's own errors become such errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

USER_ERROR_EXIT_CODE = 2


class PunaError(Exception):
    """Bad input or a bad environment: one clear message and a fix; the command line exits with 2.

    Programmer errors (broken invariants) raise ordinary exceptions and keep their traceback.

    Args:
        message: What is wrong; names the file, field or record and the value.
        fix: What to do about it, as an imperative sentence.
    """

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  fix: {self.fix}"

    def __reduce__(self) -> tuple[type[PunaError], tuple[str, str | None]]:
        """Survive the trip back from a worker process with both fields."""
        return (type(self), (self.message, self.fix))


_ENVIRONMENT_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space, then run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then run the same command again"),
    errno.EFBIG: ("the file is too large for this system", "raise the limit (`ulimit -f`)"),
    errno.EROFS: ("the file system is read-only", "choose a writable folder (key `runs_dir`)"),
    errno.EACCES: ("permission denied", "change the permissions, or choose another folder"),
    errno.EPERM: ("operation not permitted", "change the permissions, or choose another folder"),
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.ENOTDIR: ("a part of the path is not a folder", "check the path"),
    errno.EISDIR: ("this is a folder, not a file", "check the path"),
    errno.EMFILE: ("too many open files", "raise the limit (`ulimit -n`)"),
    errno.EIO: ("the device reported an input/output error", "check the disk"),
}
_DISK_FULL_WORDS = ("no space left on device", "disk quota exceeded", "not enough space")


def explain_environment_error(
    error: BaseException, path: Path | str | None = None
) -> PunaError | None:
    """Turn an error of the machine (full disk, no permission) into a message with a fix.

    Libraries wrap such errors in their own types, so their text is looked at as well.

    Args:
        error: Any exception.
        path: Named in the message when the error itself names no file.

    Returns:
        The error to show, or None when this is not an error of the environment.
    """
    if isinstance(error, PunaError):
        return error
    for cause in _chain(error):
        code = cause.errno if isinstance(cause, OSError) else None
        if code is None and any(word in str(cause).lower() for word in _DISK_FULL_WORDS):
            code = errno.ENOSPC
        if code in _ENVIRONMENT_ERRORS:
            what, fix = _ENVIRONMENT_ERRORS[code]
            name = getattr(cause, "filename", None) or path
            where = f"{os.fspath(name)}: " if name else ""
            detail = "" if name or not str(cause) else f" ({str(cause).splitlines()[0]})"
            return PunaError(f"{where}{what}{detail}", fix)
    return None


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain
