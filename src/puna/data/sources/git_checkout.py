"""What a git checkout says about itself, read from its files; git itself is not needed."""

from __future__ import annotations

import configparser
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_MAX_SYMBOLIC_REFS = 5


@dataclass(frozen=True)
class Checkout:
    """A work tree.

    Attributes:
        folder: Its top folder.
        commit: Hash of the commit that is checked out; None before the first commit.
        remote: URL of the remote `origin` (or the first one), without user and password.
    """

    folder: str
    commit: str | None
    remote: str | None


def read_checkout(folder: str) -> Checkout | None:
    """Read the checkout whose top is a folder; None when it is none.

    Work trees and submodules, whose ``.git`` is a file that names a folder, are checkouts too.
    """
    git = os.path.join(folder, ".git")
    if os.path.isfile(git):
        text = _read(git) or ""
        if not text.startswith("gitdir:"):
            return None
        git = os.path.normpath(os.path.join(folder, text.removeprefix("gitdir:").strip()))
    if not os.path.isfile(os.path.join(git, "HEAD")):
        return None
    shared = _read(os.path.join(git, "commondir"))
    common = os.path.normpath(os.path.join(git, shared.strip())) if shared else git
    return Checkout(folder, _commit(git, common), _remote(os.path.join(common, "config")))


def checkout_of(folder: str, top: str) -> Checkout | None:
    """Return the checkout that a folder lies in, looking no higher than ``top``."""
    while True:
        found = read_checkout(folder)
        if found is not None or folder == top or not folder.startswith(top):
            return found
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent


def _commit(git: str, common: str) -> str | None:
    value = (_read(os.path.join(git, "HEAD")) or "").strip()
    for _ in range(_MAX_SYMBOLIC_REFS):
        if COMMIT.fullmatch(value):
            return value
        name = value.removeprefix("ref:").strip()
        if name == value or ".." in name:
            return None
        found = _read(os.path.join(git, name)) or _read(os.path.join(common, name))
        value = found.strip() if found else _packed(os.path.join(common, "packed-refs"), name)
    return None


def _packed(path: str, name: str) -> str:
    for line in (_read(path) or "").splitlines():
        commit, _, ref = line.partition(" ")
        if ref == name:
            return commit
    return ""


def _remote(path: str) -> str | None:
    config = configparser.RawConfigParser(strict=False, allow_no_value=True)
    try:
        config.read_string(re.sub(r"(?m)^[ \t]+", "", _read(path) or ""))
    except configparser.Error:
        return None
    remotes = [name for name in config.sections() if name.startswith("remote ")]
    remotes.sort(key=lambda name: name != 'remote "origin"')
    for name in remotes:
        if url := config.get(name, "url", fallback=None):
            return without_credentials(url)
    return None


def without_credentials(url: str) -> str:
    """Remove user and password from a URL; other forms (``git@host:path``) stay."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
