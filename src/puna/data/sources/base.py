"""The extension point for document sources: what a source is, and how a new kind is registered.

A source lists *work items* (files, mostly) cheaply and in a fixed order, and reads one item into
raw records. Listing happens once, in the stage; reading happens in the worker processes, so a
source is rebuilt there from its configuration and keeps nothing between items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import Field

from puna.core.config import Config
from puna.core.registry import Registry
from puna.data.extract_config import ExtractConfig
from puna.data.readers.records import DEFAULT_MAX_RECORD_BYTES, BadRecord, RawRecord


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A unit of reading, usually a file.

    Attributes:
        path: Logical path, unique in the source and independent of where the source lies.
        location: Where to read it: a path, a URL, or what else the source understands.
        n_bytes: Size as stored; decides how items are grouped into shards, and sampling.
        stamp: Changes when the content may have changed (modification time, ETag); may be empty.
    """

    path: str
    location: str
    n_bytes: int
    stamp: str = ""


class DocumentSource(Protocol):
    """Where documents come from. Third parties implement this and call :func:`register_source`."""

    def list_items(self) -> Iterable[WorkItem]:
        """List all items; order does not matter, the stage sorts by path.

        Raises:
            PunaError: The source is not there or may not be read.
        """
        ...

    def read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        """Read the records of an item, always in the same order.

        What cannot be used is yielded as :class:`BadRecord`, never dropped.

        Raises:
            PunaError: The item is gone, or may not be read.
        """
        ...


SourceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
"""A name that is safe as a folder name."""


class SourceConfig(Config):
    """What the configurations of all sources share."""

    name: SourceName
    """Name of the source in documents, mixture weights and reports."""
    include: tuple[str, ...] = ()
    """Only items whose logical path fits one of these patterns (`*`, `**`, `?`, `[ab]`, `{a,b}`);
    all when empty."""
    exclude: tuple[str, ...] = ()
    """No items whose logical path fits one of these patterns."""
    max_files: int | None = Field(default=None, ge=1)
    """At most this many items, chosen by a hash of the logical path."""
    max_bytes: int | None = Field(default=None, ge=1)
    """At most this many bytes as stored, chosen by a hash of the logical path."""
    first: tuple[str, ...] = ()
    """Under `max_files` or `max_bytes`, items whose logical path fits one of these patterns are
    taken before all others."""
    max_record_bytes: int = Field(default=DEFAULT_MAX_RECORD_BYTES, ge=1)
    """Larger records are set aside (reason `quarantine.too-large`)."""
    extract: ExtractConfig = Field(default=ExtractConfig())
    """How texts are extracted from what is read."""


@dataclass(frozen=True)
class SourceKind:
    """A registered kind of source.

    Attributes:
        config: Class of its configuration (or, for a plugin, of its `options`).
        build: Makes the source from a configuration object; called in every process.
    """

    config: type[Config]
    build: Callable[[Any], DocumentSource]


SOURCES: Registry[SourceKind] = Registry("document source")
"""All kinds of sources by name."""


def register_source(
    kind: str, config: type[Config], build: Callable[[Any], DocumentSource]
) -> None:
    """Register a kind of source.

    Args:
        kind: Its name: the tag ``kind`` of a built-in, the key ``plugin`` of a third party's.
        config: Its configuration class.
        build: Makes the source from a configuration; a class whose constructor takes one will do.
    """
    SOURCES.register(kind, SourceKind(config, build))
