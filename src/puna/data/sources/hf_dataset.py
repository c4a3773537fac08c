"""Source ``hf-dataset``: a folder in the layout of the Hugging Face Hub, with its card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from puna.core.config import Execution
from puna.core.errors import PunaError
from puna.data.readers.dataset_card import (
    DatasetCard,
    legacy_licence,
    missing_shards,
    read_card,
    split_of,
)
from puna.data.readers.files import format_of, read_file
from puna.data.readers.jsonl import Fields
from puna.data.readers.records import BadRecord, RawRecord
from puna.data.sources.base import SourceConfig, WorkItem, register_source
from puna.data.sources.files import Files, FilesConfig, MediaType
from puna.data.sources.open_files import opened
from puna.data.sources.remote import StorageOptions
from puna.data.sources.select import compile_pattern, has_pattern

_CARD, _INFOS = "README.md", "dataset_infos.json"
_NO_DATA = frozenset((_CARD, _INFOS, "dataset_info.json", "state.json", ".gitattributes"))
_DATA_FORMATS = frozenset(("jsonl", "csv", "tsv", "parquet", "text"))
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class HfDatasetConfig(SourceConfig):
    """A dataset folder: `README.md` with its YAML, shards of Parquet, JSON Lines, CSV or text.

    The licence of the card, the configuration and the split stay with each document.
    """

    kind: Literal["hf-dataset"] = "hf-dataset"
    """Kind of source."""
    path: Execution[str]
    """The folder, or its URL (`hf://datasets/owner/name`, `s3://bucket/name`)."""
    config: str | None = None
    """Configuration (subset) of the dataset; by default the one that the card marks."""
    splits: tuple[str, ...] = ("train",)
    """Splits to read; `["*"]` reads all."""
    allow_missing_shards: bool = False
    """Read a dataset of which shards are missing (`-00003-of-00010`); otherwise an error."""
    text_field: str = "text"
    """Column or field that holds the text."""
    id_field: str | None = None
    """Column or field that identifies a record; by default file and row."""
    metadata_fields: tuple[str, ...] = ()
    """Columns or fields to keep as metadata; `["*"]` keeps all others."""
    media_type: MediaType = "text/plain"
    """What the texts are: `text/html` has them extracted."""
    storage_options: Execution[StorageOptions] = Field(default_factory=dict)
    """Options for the object store (fsspec); see the kind `files`."""


class HfDataset:
    """Lists and reads the shards of a dataset folder."""

    def __init__(self, config: HfDatasetConfig) -> None:
        self._config = config
        self._fields = Fields(config.text_field, config.id_field, config.metadata_fields)
        self._files = Files(
            FilesConfig(
                name=config.name, paths=(config.path,), root=config.path,
                storage_options=config.storage_options,
            )
        )  # fmt: skip
        self._card: DatasetCard | None = None

    def list_items(self) -> Iterable[WorkItem]:
        """List the shards of the chosen configuration and splits.

        Raises:
            PunaError: No such folder, configuration or split; shards are missing.
        """
        found = {item.path: item for item in self._files.list_items()}
        splits = self._splits(self._read_card(), [path for path in found if _is_data(path)])
        chosen = self._config.splits
        wanted = list(splits) if chosen == ("*",) else list(chosen)
        for split in wanted:
            if not splits.get(split):
                known = ", ".join(sorted(name for name, paths in splits.items() if paths))
                raise self._error(
                    f"split {split!r} has no file; splits: {known or 'none'}", "set `splits`"
                )
        paths = [path for split in wanted for path in splits[split]]
        lost = missing_shards(paths)
        if lost and not self._config.allow_missing_shards:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise self._error(
                f"the shard {lost[0]}{more} is missing",
                "download the rest, or set `allow_missing_shards = true`",
            )
        return [found[path] for path in dict.fromkeys(paths)]

    def _splits(self, card: DatasetCard, paths: Sequence[str]) -> dict[str, list[str]]:
        """Return split -> paths of the chosen configuration."""
        patterns = self._patterns(card)
        splits: dict[str, list[str]] = {}
        for split, wanted in patterns.items():
            compiled = [
                compile_pattern(
                    pattern if has_pattern(pattern) else f"{pattern.rstrip('/')}{{,/**}}"
                )
                for pattern in wanted
            ]
            for path in paths:
                if any(pattern.fullmatch(path) for pattern in compiled):
                    splits.setdefault(split or split_of(path), []).append(path)
        return splits

    def _patterns(self, card: DatasetCard) -> dict[str, Sequence[str]]:
        config = self._config.config
        if not card.configs:
            if config is None:
                return {"": ["**"]}
            return {"": [f"{config}/**", f"data/{config}/**"]}  # subsets by folder
        name = config if config is not None else card.default
        if name is None or name not in card.configs:
            known = ", ".join(card.configs)
            if config is None:
                raise self._error(f"it has several configurations: {known}", "set `config` to one")
            raise self._error(f"no configuration {config!r}; known: {known}", "correct `config`")
        return dict(card.configs[name])

    def _read_card(self) -> DatasetCard:
        if self._card is None:
            place = f"{self._config.path.rstrip('/')}/{_CARD}"
            text = self._text_of(_CARD)
            card = read_card(text, place) if text is not None else DatasetCard()
            if card.licence is None and (infos := self._text_of(_INFOS)) is not None:
                licence = legacy_licence(infos)
                card = DatasetCard(card.configs, card.default, licence, card.languages)
            self._card = card
        return self._card

    def _text_of(self, name: str) -> str | None:
        """Return a file at the top of the folder; None when it is not there."""
        location = f"{self._config.path.rstrip('/')}/{name}"
        try:
            with opened(location, self._config.storage_options) as file:
                return file.read().decode("utf-8", "replace")
        except PunaError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def _error(self, what: str, fix: str) -> PunaError:
        return PunaError(f"source {self._config.name!r}: {self._config.path}: {what}", fix)

    def read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        """Read the records of one shard.

        Raises:
            PunaError: The file is gone or may not be read, or lacks the column of the texts.
        """
        config, card = self._config, self._read_card()
        format = _format_of(item.path)
        more = self._more(card, item.path)
        with opened(item.location, config.storage_options) as file:
            head = file.read(len(_LFS_POINTER))
            file.seek(0)
            if head == _LFS_POINTER or format is None:
                what = "only a Git LFS pointer is here: run `git lfs pull`"
                reason = "lfs-pointer" if format is not None else "format"
                what = what if format is not None else f"files like {item.path} are not read"
                yield BadRecord(item.path, reason, what, item.n_bytes, None, 0)
                return
            for record in read_file(
                file, item.path, format, fields=self._fields, media_type=config.media_type,
                max_record_bytes=config.max_record_bytes,
            ):  # fmt: skip
                if isinstance(record, RawRecord):
                    record.metadata = {**more, **record.metadata}
                yield record

    def _more(self, card: DatasetCard, path: str) -> dict[str, Any]:
        """Return what the card says about all documents of a file."""
        splits = self._splits(card, [path])
        more: dict[str, Any] = {"split": next(iter(splits), split_of(path))}
        name = self._config.config or card.default
        if name is not None:
            more["config"] = name
        if card.licence is not None:
            more["licence"] = card.licence
        return more


def _format_of(path: str) -> str | None:
    """Return the format of a data file; on the Hub, ``.json`` files are JSON Lines too."""
    if ".json" in path.lower() and (found := format_of(_as_jsonl(path))) == "jsonl":
        return found
    format = format_of(path)
    return format if format in _DATA_FORMATS else None


def _as_jsonl(path: str) -> str:
    lower = path.lower()
    at = lower.rfind(".json")
    rest = lower[at + len(".json") :]
    return f"{path[:at]}.jsonl{rest}" if rest in ("", ".gz", ".zst", ".zstd", ".xz") else path


def _is_data(path: str) -> bool:
    """Tell whether a file may hold records; documentation and pictures beside them do not."""
    name = path.rpartition("/")[2]
    return name not in _NO_DATA and not name.startswith(".") and _format_of(path) is not None


register_source("hf-dataset", HfDatasetConfig, HfDataset)
