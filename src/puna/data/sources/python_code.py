"""Source ``python-code``: the ``.py`` files of the running Python and its installed packages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal

from puna.data.readers.files import read_file
from puna.data.readers.records import BadRecord, RawRecord
from puna.data.sources.base import SourceConfig, SourceName, WorkItem, register_source
from puna.data.sources.installed import package_files, package_of, stdlib_files
from puna.data.sources.open_files import opened, set_aside_unreadable


class PythonCodeConfig(SourceConfig):
    """Python files of the standard library (`stdlib/`) and of packages (`site-packages/`)."""

    kind: Literal["python-code"] = "python-code"
    """Kind of source."""
    name: SourceName = "code"
    """Name of the source in documents, mixture weights and reports."""


class PythonCode:
    """Lists and reads the Python files of this installation."""

    def __init__(self, config: PythonCodeConfig) -> None:
        self._config = config

    def list_items(self) -> Iterable[WorkItem]:
        """List the ``.py`` files of the standard library and of all packages but puna."""
        files = itertools.chain(stdlib_files(), package_files())
        return (item for item in files if item.path.endswith(".py"))

    def read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        """Read one file as it is."""
        return set_aside_unreadable(item, self._read(item))

    def _read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        with opened(item.location) as file:
            limit = self._config.max_record_bytes
            for record in read_file(file, item.path, "python", max_record_bytes=limit):
                if isinstance(record, RawRecord):
                    record.metadata["package"] = package_of(item.path)
                yield record


register_source("python-code", PythonCodeConfig, PythonCode)
