"""Source ``code-tree``: programs in git checkouts, folders and archives, with their origin."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Literal

from pydantic import Field, field_validator

from puna.core.config import Execution
from puna.data.readers.archives import SEPARATOR, read_archive
from puna.data.readers.files import ARCHIVES, format_of, read_file
from puna.data.readers.languages import LANGUAGES, language_of
from puna.data.readers.records import BadRecord, RawRecord
from puna.data.sources.base import SourceConfig, WorkItem, register_source
from puna.data.sources.files import Files, FilesConfig
from puna.data.sources.git_checkout import COMMIT, Checkout, checkout_of
from puna.data.sources.open_files import opened
from puna.data.sources.remote import StorageOptions, is_remote
from puna.data.sources.select import fixed_prefix, has_pattern

_MAX_LICENCE_BYTES = 1 << 20
_MAX_LICENCE_DEPTH = 3


class CodeTreeConfig(SourceConfig):
    """Programs below folders (git checkouts or not) and in tar and zip archives.

    A document is a file whose name tells a language; other files are not listed. It keeps
    `language`; `repository` and `commit` of its checkout (from the files of `.git`, or the comment
    that `git archive` writes); and `licence`, the SPDX identifier in its own first lines or of the
    nearest licence file above it.
    """

    kind: Literal["code-tree"] = "code-tree"
    """Kind of source."""
    paths: tuple[str, ...] = Field(min_length=1)
    """Folders, archives, patterns (`repos/**/*.rs`, `archives/*.tar.gz`), or URLs of a store."""
    root: Execution[str | None] = None
    """Folder or URL that the paths are relative to; see the kind `files`."""
    languages: tuple[str, ...] = ()
    """Only these languages (`python`, `c++`, `rust`); all when empty."""
    storage_options: Execution[StorageOptions] = Field(default_factory=dict)
    """Options for the object store (fsspec); see the kind `files`."""

    @field_validator("languages")
    @classmethod
    def _known_languages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(value) - set(LANGUAGES)):
            raise ValueError(f"unknown language {unknown[0]!r}; known: {', '.join(LANGUAGES)}")
        return value


class CodeTree:
    """Lists and reads programs."""

    def __init__(self, config: CodeTreeConfig) -> None:
        self._config = config
        self._files = Files(
            FilesConfig(
                name=config.name, paths=config.paths, root=config.root,
                storage_options=config.storage_options,
            )
        )  # fmt: skip
        self._tops = sorted((self._top(path) for path in config.paths), key=len, reverse=True)
        self._checkouts: dict[str, Checkout | None] = {}
        self._licences: dict[str, str | None] = {}

    def _top(self, path: str) -> str:
        root = self._config.root
        if root is not None and not is_remote(path) and not os.path.isabs(path):
            path = f"{root.rstrip('/')}/{path}"
        is_pattern = has_pattern(path) and not os.path.exists(path)
        return (fixed_prefix(path) if is_pattern else path).rstrip("/")

    def list_items(self) -> Iterable[WorkItem]:
        """List programs and archives.

        Raises:
            PunaError: A path or pattern matches nothing, or a folder may not be read.
        """
        for item in self._files.list_items():
            if format_of(item.path) in ARCHIVES or self._is_wanted(item.path):
                yield item

    def _is_wanted(self, path: str) -> bool:
        language, wanted = language_of(path), self._config.languages
        return language is not None and (not wanted or language in wanted)

    def read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        """Read one program, or all programs of an archive.

        Raises:
            PunaError: The file is gone or may not be read.
        """
        format = format_of(item.path)
        with opened(item.location, self._config.storage_options) as file:
            if format in ARCHIVES:
                yield from self._read_archive(file, item, format)
            else:
                origin = {} if is_remote(item.location) else self._origin(item.location)
                yield from self._read_program(file, item.path, origin)

    def _read_program(
        self, file: BinaryIO, path: str, origin: dict[str, str]
    ) -> Iterator[RawRecord | BadRecord]:
        from puna.data.extract.licences import spdx_tag

        language = language_of(path) or ""
        format = "python" if language == "python" else "code"
        for record in read_file(file, path, format, max_record_bytes=self._config.max_record_bytes):
            if isinstance(record, RawRecord):
                record.metadata = {"language": language, **origin}
                if tag := spdx_tag(_head(record.content)):
                    record.metadata["licence"] = tag
            yield record

    def _origin(self, location: str) -> dict[str, str]:
        """Return repository, commit and licence of a local file, as far as they are known."""
        folder = os.path.dirname(location)
        top = next((t for t in self._tops if location == t or location.startswith(f"{t}/")), folder)
        if top == location:
            top = folder
        if folder not in self._checkouts:
            self._checkouts[folder] = checkout_of(folder, top)
        checkout = self._checkouts[folder]
        found = {}
        if checkout is not None:
            top = checkout.folder
            found = {"repository": checkout.remote, "commit": checkout.commit}
        found["licence"] = self._licence_above(folder, top)
        return {key: value for key, value in found.items() if value is not None}

    def _licence_above(self, folder: str, top: str) -> str | None:
        """Return the licence of the nearest recognised licence file, up to the folder ``top``."""
        if folder not in self._licences:
            found = _licence_in(folder)
            if found is None and folder != top and folder.startswith(top):
                found = self._licence_above(os.path.dirname(folder), top)
            self._licences[folder] = found
        return self._licences[folder]

    def _read_archive(
        self, file: BinaryIO, item: WorkItem, format: str
    ) -> Iterator[RawRecord | BadRecord]:
        licences, commit = self._scan_archive(file, item, format)
        file.seek(0)

        def read_member(member: BinaryIO, path: str) -> Iterator[RawRecord | BadRecord]:
            origin = {"commit": commit} if commit else {}
            folder = path.partition(SEPARATOR)[2].rpartition("/")[0]
            while folder not in licences and folder:
                folder = folder.rpartition("/")[0]
            if folder in licences:
                origin["licence"] = licences[folder]
            return self._read_program(member, path, origin)

        yield from read_archive(
            file, item.path, format, read_member, wanted=self._is_wanted,
            max_member_bytes=lambda _: self._config.max_record_bytes,
        )  # fmt: skip

    def _scan_archive(
        self, file: BinaryIO, item: WorkItem, format: str
    ) -> tuple[dict[str, str], str | None]:
        """Look for licence files (folder -> licence) and the commit, before the programs are read.

        A licence may stand behind the files that it is for.
        """
        from puna.data.extract.licences import is_licence_file, licence_of

        licences: dict[str, str] = {}
        comments: list[str] = []

        def read_member(member: BinaryIO, path: str) -> Iterator[RawRecord | BadRecord]:
            folder = path.partition(SEPARATOR)[2].rpartition("/")[0]
            if found := licence_of(member.read().decode("utf-8", "replace")):
                licences.setdefault(folder, found)
            return iter(())

        def is_wanted(path: str) -> bool:
            name = path.rpartition("/")[2]
            return path.count("/") < _MAX_LICENCE_DEPTH and is_licence_file(name)

        for _ in read_archive(
            file, item.path, format, read_member, wanted=is_wanted,
            max_member_bytes=lambda path: _MAX_LICENCE_BYTES if is_wanted(path) else 0,
            comments=comments,
        ):  # fmt: skip
            pass  # damage is reported by the reading proper
        commit = next((text.strip() for text in comments if COMMIT.fullmatch(text.strip())), None)
        return licences, commit


def _licence_in(folder: str) -> str | None:
    from puna.data.extract.licences import is_licence_file, licence_of

    try:
        names = sorted(filter(is_licence_file, os.listdir(folder)))
    except OSError:
        return None
    for name in names:
        try:
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                found = licence_of(file.read(_MAX_LICENCE_BYTES))
        except OSError:  # a folder LICENSES, or a broken link
            continue
        if found is not None:
            return found
    return None


def _head(content: bytes | str) -> str:
    return content[:4096].decode("utf-8", "replace") if isinstance(content, bytes) else content


register_source("code-tree", CodeTreeConfig, CodeTree)
