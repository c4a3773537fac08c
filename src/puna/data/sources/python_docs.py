"""Source ``python-docs``: descriptions of installed packages, and the documentation of the system.

It holds what real corpora hold: licence texts repeated hundreds of times, changelogs, manual pages
in many languages, HTML with menus, old encodings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from email import message_from_string
from email.message import Message
from functools import cache
from typing import Literal

from puna.core.progress import say
from puna.data.readers.compression import read_all
from puna.data.readers.files import format_of, read_file
from puna.data.readers.records import BadRecord, RawRecord, UnusableError
from puna.data.sources.base import SourceConfig, SourceName, WorkItem, register_source
from puna.data.sources.installed import DISTRIBUTIONS, PACKAGES, package_files, package_of
from puna.data.sources.open_files import opened, set_aside_unreadable
from puna.data.sources.walk import walk_files

_NO_TEXT = frozenset(
    ("png", "gif", "jpg", "jpeg", "svg", "ico", "webp", "pdf", "ps", "eps", "dvi", "css", "js",
     "map", "mjs", "woff", "woff2", "ttf", "otf", "eot", "tar", "tgz", "zip", "bz2", "xz", "lzma",
     "jar", "class", "so", "o", "a", "pyc", "db", "sqlite", "gpg", "sig", "pem", "crt", "key",
     "json", "xml", "csv", "tsv", "po", "mo", "inv", "buildinfo", "doctree", "pickle", "mp3", "mp4",
     "wav", "ogg", "odt", "ods")
)  # fmt: skip
_DESCRIPTION = re.compile(r"([^/]+)\.dist-info/METADATA")
_README = re.compile(
    r"(?:README|LICEN[CS]E|NOTICE|AUTHORS|CHANGE|CHANGES|CHANGELOG|COPYING|HISTORY|CONTRIBUTING|"
    r"THIRD.?PARTY)[^/]*|[^/]+\.(?:md|rst)",
    re.IGNORECASE,
)
_MANUAL = re.compile(r"man/(?:([a-z]{2}(?:_[A-Z]{2})?)(?:[.@][^/]*)?/)?man\w+/")
_DESCRIPTION_TYPES = {"text/markdown": "text/markdown", "text/x-rst": "text/x-rst"}
_OLD_INDENT = re.compile(r"^(?: {8}| {7}\|)", re.MULTILINE)


class PythonDocsConfig(SourceConfig):
    """Texts of installed packages, and the system's documentation and manual pages."""

    kind: Literal["python-docs"] = "python-docs"
    """Kind of source."""
    name: SourceName = "docs"
    """Name of the source in documents, mixture weights and reports."""
    installed: bool = True
    """Take descriptions (`distributions/`) and README, licence and change files of packages."""
    folders: tuple[str, ...] = ("/usr/share/doc", "/usr/share/man")
    """Folders of documentation; a path begins with the folder's name. Absent ones are left out."""


class PythonDocs:
    """Lists and reads the documentation of this machine."""

    def __init__(self, config: PythonDocsConfig) -> None:
        self._config = config

    def list_items(self) -> Iterable[WorkItem]:
        """List descriptions, README files and the files of the documentation folders."""
        if self._config.installed:
            yield from _installed_texts()
        for folder in self._config.folders:
            if not os.path.isdir(folder):
                _note_absent(folder)
                continue
            prefix = f"{os.path.basename(os.path.normpath(folder))}/"
            for item in walk_files(folder, prefix, must_read=False):
                if not _is_no_text(item.path):
                    yield item

    def read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        """Read one file."""
        return set_aside_unreadable(item, self._read(item))

    def _read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        limit = self._config.max_record_bytes
        with opened(item.location) as file:
            if item.path.startswith(DISTRIBUTIONS):
                try:
                    data = read_all(file, limit)
                except UnusableError as error:
                    yield BadRecord(item.path, error.reason, error.error, item.n_bytes)
                    return
                yield _description(item, data)
                return
            format = format_of(item.path)
            if format in (None, "jsonl", "parquet", "warc"):
                format = "text"
            for record in read_file(file, item.path, format, max_record_bytes=limit):
                if isinstance(record, RawRecord):
                    record.metadata.update(_describe(item.path))
                yield record


@cache
def _note_absent(folder: str) -> None:
    say((f"there is no folder {folder} here; it is left out", "dim"))


def _installed_texts() -> Iterator[WorkItem]:
    described = set()
    for item in package_files():
        inner = item.path[len(PACKAGES) :]
        description = _DESCRIPTION.fullmatch(inner)
        if description is not None:
            name = description[1].rpartition("-")[0] or description[1]
            if name not in described:
                described.add(name)
                yield WorkItem(f"{DISTRIBUTIONS}{name}/METADATA", item.location, item.n_bytes)
        elif (
            _README.fullmatch(inner.rpartition("/")[2])
            and not inner.endswith(".py")
            and not _is_no_text(inner)
        ):
            yield item


def _is_no_text(path: str) -> bool:
    name = path.rpartition("/")[2].lower().removesuffix(".gz")
    return name.rpartition(".")[2] in _NO_TEXT or ".tar." in name


def _describe(path: str) -> dict[str, str]:
    manual = _MANUAL.match(path)
    if manual is not None:
        return {"language": manual[1] or "en"}
    if path.startswith(PACKAGES):
        return {"package": package_of(path)}
    return {"package": path.split("/")[1]} if path.startswith("doc/") else {}


def _description(item: WorkItem, data: bytes) -> RawRecord:
    """Cut the long description out of a METADATA file (core metadata specification)."""
    head = message_from_string(data.decode("utf-8", "replace"))
    body = _body(data)
    if not body.strip() and head.get("Description"):
        body = _OLD_INDENT.sub("", str(head["Description"])).encode()
    declared = str(head.get("Description-Content-Type", "")).partition(";")[0].strip().lower()
    metadata = {
        "package": item.path[len(DISTRIBUTIONS) :].partition("/")[0],
        **_known(head, version="Version", summary="Summary"),
    }
    if license := head.get("License-Expression") or head.get("License"):
        metadata["license"] = str(license).splitlines()[0][:100]
    media_type = _DESCRIPTION_TYPES.get(declared, "text/plain")
    return RawRecord(item.path, media_type, body, len(data), metadata)


def _body(data: bytes) -> bytes:
    ends = [at for at in (data.find(b"\n\n"), data.find(b"\r\n\r\n")) if at >= 0]
    return data[min(ends) :].lstrip(b"\r\n") if ends else b""


def _known(head: Message, **fields: str) -> dict[str, str]:
    return {key: str(head[field]) for key, field in fields.items() if head.get(field)}


register_source("python-docs", PythonDocsConfig, PythonDocs)
