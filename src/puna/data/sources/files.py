"""Source ``files``: a user's corpus, by paths, patterns and URLs, in any supported format."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Literal

from pydantic import Field, field_validator

from puna.core.config import Execution
from puna.core.errors import PunaError
from puna.data.readers.archives import SEPARATOR, read_archive
from puna.data.readers.files import ARCHIVES, RECORD_FORMATS, Format, format_of, read_file
from puna.data.readers.jsonl import Fields
from puna.data.readers.records import BadRecord, RawRecord
from puna.data.sources.base import SourceConfig, WorkItem, register_source
from puna.data.sources.open_files import opened, unreadable
from puna.data.sources.remote import WEB, StorageOptions, is_remote, list_remote
from puna.data.sources.select import compile_pattern, fixed_prefix, has_pattern
from puna.data.sources.walk import VCS_FOLDERS, logical, walk_files

MediaType = Literal[
    "text/plain", "text/markdown", "text/x-rst", "text/html", "text/troff", "text/x-python",
    "text/x-source", "application/x-ipynb+json",
]  # fmt: skip
_MAX_MEMBER_BYTES = 1 << 29


class FilesConfig(SourceConfig):
    """Files of a corpus, in any supported format: records, texts, or archives of them.

    JSON Lines, CSV and TSV, Parquet, WARC and WET; plain text, Markdown, rst, HTML, man pages,
    code, Jupyter notebooks; tar and zip archives of all these. Gzip, Zstandard, xz and bzip2 are
    undone. Folders of version control (`.git`) are left out.
    """

    kind: Literal["files"] = "files"
    """Kind of source."""
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (with all below them), patterns (`data/**/*.jsonl.gz`) or URLs of a store or
    web server (`s3://bucket/data/*.parquet`). Each must match something."""
    root: Execution[str | None] = None
    """Folder or URL that the paths are relative to; document ids depend on the path below it.
    Without it, they depend on the path below the folder before the first `*`."""
    format: Format | None = None
    """Format of all files; by default the file name tells. Members of archives go by their own
    names always."""
    members: tuple[str, ...] = ()
    """Of archives, read only the members whose path in the archive fits one of these patterns;
    all when empty. Members of an archive inside are called `inner.zip!/path`."""
    encoding: str | None = None
    """Character encoding of all files; by default UTF-8, or found out for whole-file formats."""
    text_field: str = "text"
    """Field (JSON Lines) or column (CSV, Parquet) that holds the text."""
    id_field: str | None = None
    """Field or column that identifies a record; by default file and line or row."""
    metadata_fields: tuple[str, ...] = ()
    """Fields or columns to keep as metadata; `["*"]` keeps all others."""
    media_type: MediaType = "text/plain"
    """What the texts inside JSON Lines, CSV and Parquet are: `text/html` has them extracted."""
    delimiter: str | None = Field(default=None, pattern=r'^[^"\r\n]$')
    """What stands between the fields of CSV; by default `,`, and a tab for `.tsv`."""
    quotes: bool = True
    """Double quotes may enclose a field of CSV, as spreadsheets write it; else they are text."""
    storage_options: Execution[StorageOptions] = Field(default_factory=dict)
    """Options for the store (fsspec), such as `anon` or `endpoint_url`. They are recorded with the
    run, so secrets are refused: they belong into the environment or the store's own files."""

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                is_ascii_based = "\n".encode(value) == b"\n" and b"\n".decode(value) == "\n"
            except LookupError as error:
                raise ValueError(f"unknown encoding {value!r}") from error
            if not is_ascii_based:
                raise ValueError(f"{value!r} is not based on ASCII; convert the files to UTF-8")
        return value


class Files:
    """Lists and reads the files of a corpus."""

    def __init__(self, config: FilesConfig) -> None:
        self._config = config
        self._fields = Fields(config.text_field, config.id_field, config.metadata_fields)
        self._members = [compile_pattern(pattern) for pattern in config.members]
        self._looks_inside = any(SEPARATOR in pattern for pattern in config.members)

    def list_items(self) -> Iterable[WorkItem]:
        """List the files that the paths name.

        Raises:
            PunaError: A path or pattern matches nothing, or a folder may not be read.
        """
        found: dict[str, WorkItem] = {}
        for path in self._config.paths:
            items = list(self._list(path))
            if not items:
                raise PunaError(
                    f"source {self._config.name!r}: {path!r} matches no file",
                    "check `paths` (and `root`); relative paths start at the working directory",
                )
            for item in items:
                twin = found.setdefault(item.location, item)
                if twin.path != item.path:
                    raise PunaError(
                        f"source {self._config.name!r}: {item.location} is listed twice, as "
                        f"{twin.path!r} and as {item.path!r}",
                        "set `root`, or let only one of `paths` name the file",
                    )
        return found.values()

    def _list(self, path: str) -> Iterator[WorkItem]:
        root = self._config.root
        if root is not None and not is_remote(path) and not os.path.isabs(path):
            path = f"{root.rstrip('/')}/{path}"
        is_query = path.startswith(WEB) and "?" in path  # an address, not a pattern
        is_pattern = has_pattern(path) and not is_query and not os.path.exists(path)
        base = fixed_prefix(path) if is_pattern else path
        if is_pattern and base.startswith(WEB):
            base += "/"  # the page that lists the files
        pattern = compile_pattern(path) if is_pattern else None
        listing = self._list_remote(base) if is_remote(path) else _list_local(base, pattern is None)
        top = root.rstrip("/") if root is not None else None
        for location, item in listing:
            if pattern is not None and not pattern.fullmatch(location):
                continue
            start = top if top is not None else _folder_of(base, location)
            if start and not location.startswith(f"{start}/"):
                raise PunaError(
                    f"source {self._config.name!r}: {location} is not below `root` {root!r}",
                    "make `root` a folder above all paths",
                )
            inner = location[len(start) + 1 :] if start else location.lstrip("/")
            yield WorkItem(logical(inner), item.location, item.n_bytes, item.stamp)

    def _list_remote(self, base: str) -> Iterator[tuple[str, WorkItem]]:
        for url, n_bytes, stamp in list_remote(base, self._config.storage_options):
            yield url, WorkItem(url, url, n_bytes, stamp)

    def read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        """Read the records of one file.

        Raises:
            PunaError: The file is gone or may not be read, or lacks the column of the texts.
        """
        config = self._config
        format = config.format or format_of(item.path)
        if format is None:
            yield _no_format(item.path, item.n_bytes)
            return
        with opened(item.location, config.storage_options) as file:
            if format in ARCHIVES:
                yield from read_archive(
                    file, item.path, format, self._read_member, wanted=self._is_wanted,
                    max_member_bytes=self._member_limit, format_inside=_archive_format,
                )  # fmt: skip
            else:
                yield from self._read_as(file, item.path, format)

    def _member_limit(self, member: str) -> int:
        """Files of many records may be larger than a record, but members are held in memory."""
        is_whole = format_of(member) not in RECORD_FORMATS | ARCHIVES
        limit = self._config.max_record_bytes
        return limit if is_whole else max(limit, _MAX_MEMBER_BYTES)

    def _is_wanted(self, member: str) -> bool:
        """Tell whether a member is read: it, or an archive that it stands in, fits a pattern.

        An archive is also opened when a pattern names members of inner archives (``!/``).
        """
        if not self._members:
            return True
        parts = member.split(SEPARATOR)
        paths = [SEPARATOR.join(parts[: n + 1]) for n in range(len(parts))]
        if any(pattern.fullmatch(path) for pattern in self._members for path in paths):
            return True
        return _archive_format(member) is not None and self._looks_inside

    def _read_member(self, file: BinaryIO, path: str) -> Iterator[RawRecord | BadRecord]:
        format = format_of(path)
        if format is None:
            yield _no_format(path, len(file.read()))
        else:
            yield from self._read_as(file, path, format)

    def _read_as(self, file: BinaryIO, path: str, format: str) -> Iterator[RawRecord | BadRecord]:
        config = self._config
        return read_file(
            file, path, format, fields=self._fields, media_type=config.media_type,
            delimiter=config.delimiter, quotes=config.quotes, encoding=config.encoding,
            max_record_bytes=config.max_record_bytes,
        )  # fmt: skip


def _archive_format(path: str) -> str | None:
    format = format_of(path)
    return format if format in ARCHIVES else None


def _no_format(path: str, n_bytes: int) -> BadRecord:
    return BadRecord(
        path, "format", "the file name tells no format: set `format`, or `exclude` it", n_bytes
    )


def _list_local(base: str, is_exact: bool) -> Iterator[tuple[str, WorkItem]]:
    """Yield (path as the user would write it, item) of a file or of all files below a folder."""
    folder = base.rstrip("/") or ("/" if base.startswith("/") else ".")
    try:
        found = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise unreadable(error, base) from error
    if not stat.S_ISDIR(found.st_mode):
        if is_exact and not stat.S_ISREG(found.st_mode):
            raise PunaError(f"{base} is no regular file", "write its content to a file first")
        if is_exact:
            yield base, WorkItem(base, base, found.st_size, str(found.st_mtime_ns))
        return
    prefix = "/" if folder == "/" else f"{folder}/"
    for item in walk_files(
        folder, prefix if base else "", skip_folder=VCS_FOLDERS.__contains__, follow_links=True,
        stamped=True,
    ):  # fmt: skip
        yield item.path, item


def _folder_of(base: str, location: str) -> str:
    """Return the folder that logical paths start below: the base, or a single file's folder."""
    return location.rpartition("/")[0] if location == base else base.rstrip("/")


register_source("files", FilesConfig, Files)
