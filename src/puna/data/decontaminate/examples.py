"""Evaluation sets: the files that the user names, read completely or not at all."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.data.extract.normalise import normalise
from puna.data.readers.compression import decompressed
from puna.data.readers.jsonl import ALL_FIELDS, Fields, read_jsonl
from puna.data.readers.parquet import read_parquet
from puna.data.readers.records import BadRecord


class EvalSetConfig(Config):
    """One evaluation set."""

    name: str = Field(min_length=1)
    """Name in reasons and reports."""
    paths: tuple[str, ...] = Field(min_length=1)
    """Its files or patterns: JSON Lines (also gzip, Zstandard) or Parquet, one example a record."""
    fields: tuple[str, ...] = Field(default=("text",), min_length=1)
    """The fields of a record that make the example, in this order: texts or lists of texts, such as
    `question`, `choices`, `answer`. Fields that are null or missing in a record count as empty,
    but not the first."""

    @field_validator("paths", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def files(self) -> list[Path]:
        """List the files, in order.

        Raises:
            PunaError: A path or pattern finds nothing.
        """
        found: list[Path] = []
        for pattern in self.paths:
            paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
            if not paths:
                raise PunaError(
                    f"evaluation set {self.name!r}: there is no file {pattern}",
                    f"correct `paths` of the set {self.name!r} under [data.decontaminate]",
                )
            found += [path for path in paths if path.is_file() and path not in found]
        return found


@dataclass(frozen=True)
class Example:
    """One example of an evaluation set.

    Attributes:
        set_name: Name of the set.
        index: Number of the record in the set, over all its files, from 0.
        place: File and record, for errors and reports.
        parts: Its fields, those without text left out.
    """

    set_name: str
    index: int
    place: str
    parts: tuple[str, ...]


def read_examples(cfg: EvalSetConfig) -> Iterator[Example]:
    """Read a set.

    Raises:
        PunaError: A file is missing or damaged, or a record has no such field or no text: a set of
            which a part is not looked for would pass as clean.
    """
    index = 0
    fields = Fields(text=cfg.fields[0], metadata=(ALL_FIELDS,))
    for path in cfg.files():
        with path.open("rb") as file:
            if file.read(4) == b"PAR1":
                records = read_parquet(file, str(path), fields, "text/plain")
            else:
                file.seek(0)
                records = read_jsonl(decompressed(file), str(path), fields, "text/plain")
            for record in records:
                if isinstance(record, BadRecord):
                    raise _unusable(cfg, f"{path}, record {record.record}", record.error)
                if not isinstance(record.content, str):
                    raise _unusable(cfg, record.path, "the text is not valid UTF-8")
                values = [record.content]
                values += [record.metadata.get(name) for name in cfg.fields[1:]]
                parts = [text for name, value in zip(cfg.fields, values, strict=True)
                         for text in _texts(cfg, record.path, name, value)]  # fmt: skip
                yield Example(cfg.name, index, record.path, tuple(filter(None, parts)))
                index += 1
    if not index:
        raise _unusable(cfg, ", ".join(cfg.paths), "the files hold no record")


def _texts(cfg: EvalSetConfig, place: str, name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):  # such as {"label": [...], "text": [...]}
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(cfg, place, name, item)]
    if isinstance(value, bool | int | float):
        return [str(value)]
    if not isinstance(value, str):
        raise _unusable(cfg, place, f"field {name!r} holds {type(value).__name__}, not text")
    return [normalise(value)]


def _unusable(cfg: EvalSetConfig, place: str, why: str) -> PunaError:
    return PunaError(
        f"evaluation set {cfg.name!r}, {place}: {why}",
        f"correct the file, or `fields` of the set {cfg.name!r} under [data.decontaminate]",
    )


def sets_state(sets: tuple[EvalSetConfig, ...]) -> dict[str, Any]:
    """Tell what the sets' files hold now: set -> file -> digest, or the error."""
    try:
        return {one.name: {str(path): hash_file(path) for path in one.files()} for one in sets}
    except (PunaError, OSError) as error:
        return {"unavailable": str(error)}
