"""Document sources: the built-in kinds, and the extension point for more.

A third party's source is a class and one call, in a module that an entry point ``puna.plugins``
names::

    class WikiConfig(Config):
        dump: str
        \"\"\"Path of the dump.\"\"\"

    class Wiki:
        def __init__(self, config: WikiConfig) -> None: ...
        def list_items(self) -> Iterable[WorkItem]: ...
        def read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]: ...

    register_source("wiki", WikiConfig, Wiki)

and in the recipe ``{kind = "plugin", plugin = "wiki", name = "wiki", options = {dump = "..."}}``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from puna.core.errors import PunaError
from puna.core.stage import load_plugins
from puna.data.readers.records import BadRecord, RawRecord
from puna.data.sources.base import (
    SOURCES,
    DocumentSource,
    SourceConfig,
    SourceKind,
    WorkItem,
    register_source,
)
from puna.data.sources.code_tree import CodeTreeConfig
from puna.data.sources.files import FilesConfig
from puna.data.sources.hf_dataset import HfDatasetConfig
from puna.data.sources.python_code import PythonCodeConfig
from puna.data.sources.python_docs import PythonDocsConfig
from puna.data.sources.python_reference import PythonReferenceConfig
from puna.data.sources.select import select_items


class PluginConfig(SourceConfig):
    """A source that a third party has registered."""

    kind: Literal["plugin"] = "plugin"
    """Kind of source."""
    plugin: str
    """Name under which the source is registered."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of that source."""


AnySourceConfig = Annotated[
    PythonCodeConfig
    | PythonReferenceConfig
    | PythonDocsConfig
    | FilesConfig
    | HfDatasetConfig
    | CodeTreeConfig
    | PluginConfig,
    Field(discriminator="kind"),
]
"""An entry of ``[[data.ingest.sources]]``."""


def open_source(config: SourceConfig) -> DocumentSource:
    """Build the source of a configuration.

    Raises:
        PunaError: A plugin is unknown, or its options are wrong.
    """
    if not isinstance(config, PluginConfig):
        kind = SOURCES.get(getattr(config, "kind"))  # noqa: B009 - each member of the union has one
        return kind.build(config)
    if config.plugin not in SOURCES:
        load_plugins()  # in a worker process nobody has done so yet
    kind = SOURCES.get(config.plugin)
    try:
        options = kind.config.model_validate(config.options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PunaError(
            f"source {config.name!r}: options.{where}: {first['msg']}",
            f"see the documentation of the plugin {config.plugin!r}",
        ) from error
    return kind.build(options)


def list_source(config: SourceConfig) -> list[WorkItem]:
    """List the chosen items of a source, sorted by path.

    Raises:
        PunaError: The source cannot be listed, or two items have the same path.
    """
    return select_items(open_source(config).list_items(), config)


__all__ = [
    "SOURCES",
    "AnySourceConfig",
    "BadRecord",
    "DocumentSource",
    "PluginConfig",
    "RawRecord",
    "SourceConfig",
    "SourceKind",
    "WorkItem",
    "list_source",
    "open_source",
    "register_source",
]
