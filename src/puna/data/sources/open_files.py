"""Opening what a work item points to, with errors that a user understands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from puna.core.errors import PunaError, explain_environment_error
from puna.data.readers.records import BadRecord, RawRecord
from puna.data.sources.base import WorkItem
from puna.data.sources.remote import is_remote, open_remote


@contextlib.contextmanager
def opened(location: str, storage_options: dict[str, Any] | None = None) -> Iterator[BinaryIO]:
    """Open a local path or a URL (``s3://``, ``https://``) for reading bytes; it can be sought in.

    Raises:
        PunaError: The file is gone or may not be read, or the store cannot be reached.
    """
    try:
        if is_remote(location):
            with open_remote(location, storage_options or {}) as file:
                yield file
        else:
            with open(location, "rb") as file:
                yield file
    except OSError as error:
        raise unreadable(error, location) from error


def unreadable(error: BaseException, location: str) -> PunaError:
    """Make the message for a file or store that cannot be read."""
    explained = explain_environment_error(error, location)
    if explained is not None:
        return explained
    return PunaError(f"{location}: {error!r}", "check the path or URL and the access to it")


def set_aside_unreadable(
    item: WorkItem, records: Iterator[RawRecord | BadRecord]
) -> Iterator[RawRecord | BadRecord]:
    """Turn "cannot be read" into a bad record, for files of the machine that no user named."""
    try:
        yield from records
    except PunaError as error:
        yield BadRecord(item.path, "unreadable", error.message, item.n_bytes)
