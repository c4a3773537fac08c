"""Which filters apply to which source: the part of the recipe, and the kernel that applies them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, ValidationError, model_validator

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.registry import Registry
from puna.data.filters.base import FILTERS, FilterConfig
from puna.data.filters.batch import TextBatch
from puna.data.filters.profiles import PROFILES, name_of

if TYPE_CHECKING:
    import pyarrow as pa

    from puna.data.engine.base import Shard


class FilterUse(Config):
    """A filter of a list, with its settings."""

    name: str
    """Name of the filter."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Its settings; those not given have the filter's defaults."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            made = _make(value["name"], value.get("settings", {}))
            return {**value, "settings": made.model_dump(mode="json")}
        return value

    def make(self) -> FilterConfig:
        """Return the filter itself."""
        return _make(self.name, self.settings)


class SourceRules(Config):
    """The filters of a source."""

    profile: str = "prose"
    """Named list of filters to start from: `prose`, `code`, `none` or one of a plugin."""
    override: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings that differ from the profile's: filter -> setting -> value."""
    skip: list[str] = Field(default_factory=list)
    """Filters of the profile to leave out."""
    filters: list[FilterUse] = Field(default_factory=list)
    """The ordered list of filters; given by the profile when it is not given here."""
    detect_language: bool = True
    """Name the language of kept documents; given by the profile when it is not given here."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        """Write out the profile, so that a dump of the configuration is complete."""
        if not isinstance(value, Mapping):
            return value
        profile = _get(PROFILES, value.get("profile", "prose"))
        override, skip = value.get("override", {}), value.get("skip", [])
        if not isinstance(override, Mapping) or not isinstance(skip, list):
            return value
        filters = value.get("filters") or [
            {"name": name_of(item), "settings": item.model_dump(mode="json")}
            for item in profile.filters
        ]
        uses = [FilterUse.model_validate(item).model_dump() for item in filters]
        listed = [use["name"] for use in uses]
        for name in [*override, *skip]:
            _get(FILTERS, name)
            if name in override and name not in listed:
                raise ValueError(f"override of filter {name!r}, which is not in the list: {listed}")
        uses = [
            {"name": use["name"], "settings": {**use["settings"], **override.get(use["name"], {})}}
            for use in uses
            if use["name"] not in skip
        ]
        return {"detect_language": profile.detect_language, **value, "filters": uses}

    def make(self) -> Rules:
        """Return the filters themselves."""
        return Rules(tuple(use.make() for use in self.filters), self.detect_language)


def _get(registry: Registry[Any], name: Any) -> Any:
    try:
        return registry.get(str(name))
    except PunaError as error:
        raise ValueError(f"{error.message}; {error.fix}") from None


def _make(name: str, settings: Any) -> FilterConfig:
    """Build a filter; an error names the filter, the setting and the nearest valid one."""
    filter_class = _get(FILTERS, name)
    try:
        return filter_class.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        if first["type"] != "extra_forbidden":
            raise ValueError(f"{where}: {first['msg']} (got {first['input']!r})") from None
        known = list(filter_class.model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{where}: no such setting; {hint}known: {', '.join(known)}") from None


@dataclass(frozen=True)
class Rules:
    """The filters of a source, built."""

    filters: tuple[FilterConfig, ...]
    detect_language: bool

    @property
    def rewrites(self) -> bool:
        """Whether a filter replaces texts."""
        return any(document_filter.rewrites for document_filter in self.filters)

    def judge(self, texts: pa.Array, paths: Sequence[str] | None = None) -> Verdicts:
        """Apply the filters in their order to the texts, and paths, of one source."""
        docs = TextBatch(texts, paths)
        verdicts = Verdicts.keep_all(len(docs))
        for document_filter in self.filters:
            for finding in document_filter.judge(docs):
                if finding.reason not in document_filter.reasons:
                    raise ValueError(
                        f"{type(document_filter).__name__} gave the reason {finding.reason!r}, "
                        "which it does not declare"
                    )
                verdicts.drop(docs, finding)
        if self.detect_language:
            codes, _ = docs.languages()
            for index in np.flatnonzero(docs.alive):
                verdicts.language[index] = codes[index]
        if self.rewrites:
            verdicts.text = list(docs.strings())
        return verdicts


@dataclass
class Verdicts:
    """Columns of a batch of verdicts, one entry per document; None where nothing is to say."""

    reason: list[str | None]
    value: list[float | None]
    threshold: list[float | None]
    detail: list[str | None]
    language: list[str | None]
    text: list[str | None]
    """Of documents of rules that rewrite; else the text stays."""

    @classmethod
    def keep_all(cls, n: int) -> Verdicts:
        """Return verdicts that keep everything."""
        return cls([None] * n, [None] * n, [None] * n, [None] * n, [None] * n, [None] * n)

    def drop(self, docs: TextBatch, finding: Any) -> None:
        """Write a finding into the documents that it is the first to fail."""
        newly = finding.failed & docs.alive
        for index in np.flatnonzero(newly):
            self.reason[index] = finding.reason
            self.value[index] = float(finding.value[index])
            self.threshold[index] = finding.threshold
            if finding.details is not None:
                self.detail[index] = finding.details[index]
        docs.alive &= ~newly

    def scatter(self, part: Verdicts, where: Sequence[int] | np.ndarray) -> None:
        """Copy the verdicts of some documents to their places."""
        for name in ("reason", "value", "threshold", "detail", "language", "text"):
            mine, theirs = getattr(self, name), getattr(part, name)
            for position, index in enumerate(where):
                mine[index] = theirs[position]


@dataclass(frozen=True)
class FilterKernel:
    """Applies each source's rules to a batch of documents.

    Attributes:
        default: For sources that have no rules of their own.
        by_source: Source -> rules.
    """

    default: Rules
    by_source: Mapping[str, Rules]
    columns: tuple[str, ...] = field(default=("source", "path", "text"), repr=False)

    @property
    def rewrites(self) -> bool:
        """Whether rules of any source replace texts."""
        return any(rules.rewrites for rules in (self.default, *self.by_source.values()))

    def adds(self) -> pa.Schema:
        """Return the verdict columns, ``language`` (null where it was not asked for), new texts."""
        import pyarrow as pa

        from puna.data.engine.shards import VERDICT_FIELDS

        fields = [*VERDICT_FIELDS, pa.field("language", pa.string())]
        if self.rewrites:
            fields.append(pa.field("text", pa.large_string()))
        return pa.schema(fields)

    def prepare(self) -> None:
        """Compile the kernels of every filter, on one short document per set of rules."""
        import pyarrow as pa

        text = "This is the text that the kernels are compiled with, and nothing more.\n" * 3
        for rules in {id(item): item for item in (self.default, *self.by_source.values())}.values():
            docs = TextBatch(pa.array([text], pa.large_string()))
            for document_filter in rules.filters:
                for _ in document_filter.judge(docs):
                    pass
            if rules.detect_language:
                docs.languages()

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one verdict per document."""
        import pyarrow as pa
        import pyarrow.compute as pc

        sources = batch.column("source").to_numpy(zero_copy_only=False)
        paths = batch.column("path") if "path" in batch.schema.names else None
        verdicts = Verdicts.keep_all(batch.num_rows)
        for source in sorted(set(sources)):
            where = np.flatnonzero(sources == source)
            texts = batch.column("text").take(pa.array(where))
            of_source = None if paths is None else paths.take(pa.array(where)).to_pylist()
            rules = self.by_source.get(source, self.default)
            verdicts.scatter(rules.judge(texts, of_source), where)
        columns = [verdicts.reason, verdicts.value, verdicts.threshold, verdicts.detail,
                   verdicts.language]  # fmt: skip
        schema = self.adds()
        arrays = [pa.array(items, f.type) for items, f in zip(columns, schema, strict=False)]
        if self.rewrites:
            text = pa.array(verdicts.text, pa.large_string())
            arrays.append(pc.call_function("coalesce", [text, batch.column("text")]))
        return pa.RecordBatch.from_arrays(arrays, schema=schema)
