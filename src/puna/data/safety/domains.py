"""Lists of blocked domains and addresses: the format of the public UT1 and hosts lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import xxhash

from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.data.safety.lists import read_list

_HOSTS_ADDRESSES = frozenset(("0.0.0.0", "127.0.0.1", "::", "::1"))
_HOSTS_NAMES = frozenset(("localhost", "localhost.localdomain", "local", "broadcasthost",
                          "ip6-localhost", "ip6-loopback", "0.0.0.0"))  # fmt: skip
_ENTRY = re.compile(r"[^\s/]+(?:/\S*)?")


def read_block_list(path: Path) -> Iterator[str]:
    """Yield the entries of a list: a domain, or a domain with a path, per line.

    Empty lines, what follows ``#``, a leading ``http://``, ``*.`` or ``.``, and the address in
    front of a name (hosts files) are ignored.

    Raises:
        PunaError: The file is missing, not UTF-8, or a line is none of these.
    """
    for number, line in enumerate(read_list(path, "block list", "block_lists"), start=1):
        words = line.partition("#")[0].split()
        if len(words) == 2 and words[0] in _HOSTS_ADDRESSES:
            words = [] if words[1] in _HOSTS_NAMES else words[1:]
        if not words:
            continue
        entry = words[0].lower().removeprefix("http://").removeprefix("https://")
        entry = entry.removeprefix("*").removeprefix(".")
        if len(words) > 1 or not _ENTRY.fullmatch(entry):
            raise PunaError(
                f"block list {path}, line {number}: {line.strip()!r} is no domain",
                "write one domain per line, or `0.0.0.0 domain`; comments begin with #",
            )
        yield _ascii_host(entry)


@dataclass(frozen=True)
class BlockList:
    """The files of a category; read when first used, in each process.

    Attributes:
        category: Name for the detail of a rejection.
        files: Path and content hash of each file (the hash makes the identity of the list).
    """

    category: str
    files: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, category: str, paths: Iterable[str]) -> BlockList:
        """Name the files of a category.

        Raises:
            PunaError: A file is missing or holds a line that is no domain.
        """
        named = []
        for path in paths:
            for _ in read_block_list(Path(path)):
                pass
            named.append((path, hash_file(Path(path))))
        return cls(category, tuple(named))

    def match(self, url: str) -> str | None:
        """Return the entry that a URL or host name falls under; None when there is none."""
        keys = _keys(self.files)
        for candidate in _candidates(url):
            key = np.uint64(xxhash.xxh3_64_intdigest(candidate.encode()))
            at = int(np.searchsorted(keys, key))
            if at < len(keys) and keys[at] == key:
                return candidate
        return None


@lru_cache(maxsize=64)
def _keys(files: tuple[tuple[str, str], ...]) -> np.ndarray:
    """Hash the entries: uint64, sorted; eight bytes per entry however long the list is."""
    keys = {
        xxhash.xxh3_64_intdigest(entry.encode())
        for path, _ in files
        for entry in read_block_list(Path(path))
    }
    return np.array(sorted(keys), np.uint64)


def _candidates(url: str) -> Iterator[str]:
    """Yield what an entry could be: the host and its parents, with shorter and shorter paths."""
    host, path = split_url(url)
    if not host:
        return
    labels = host.split(".")
    hosts = [".".join(labels[i:]) for i in range(len(labels))] if not _is_address(host) else [host]
    parts = [part for part in path.split("/") if part]
    for name in hosts:
        yield name
    for name in hosts:
        for n in range(1, len(parts) + 1):
            prefix = f"{name}/{'/'.join(parts[:n])}"
            yield prefix
            yield f"{prefix}/"


def _is_address(host: str) -> bool:
    return host.replace(".", "").isdigit() or ":" in host


def split_url(url: str) -> tuple[str, str]:
    """Return host (lower case, ASCII) and path of a URL; an empty host when it has none."""
    if "://" not in url:
        return "", ""
    try:
        parts = urlsplit(url.strip())
        host = parts.hostname or ""
    except ValueError:  # a damaged IPv6 address
        return "", ""
    return _ascii_host(host.rstrip(".")), parts.path.lower()


def _ascii_host(text: str) -> str:
    """Write the host of an entry in ASCII (punycode), as lists and addresses may differ in it."""
    if text.isascii():
        return text
    host, slash, path = text.partition("/")
    try:
        return host.encode("idna").decode() + slash + path
    except UnicodeError:
        return text


def url_of(path: str, metadata: str) -> str | None:
    """Return a document's URL: its ``path``, or ``url`` of its metadata."""
    if "://" in path[:16]:
        return path
    if '"url"' in metadata:
        url = json.loads(metadata).get("url")
        if isinstance(url, str):
            return url
    return None
