"""Artifacts: finished stage folders with an ``artifact.json`` that tells how they were made."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.fsio import hash_file, hash_json, write_json
from puna.core.version import VERSION

ARTIFACT_FILE = "artifact.json"
CONFIG_FILE = "config.toml"
ARTIFACT_SCHEMA_VERSION = 1
_RECORDED_PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "pyarrow",
    "duckdb",
    "ibis-framework",
    "tokenizers",
    "pydantic",
    "safetensors",
    "resiliparse",
    "py3langid",
)


class Artifact:
    """A finished stage folder.

    Args:
        path: The folder; must hold ``artifact.json``.

    Raises:
        PunaError: The folder is unfinished, or its ``artifact.json`` cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        record = path / ARTIFACT_FILE
        if not record.is_file():
            raise PunaError(
                f"{path} holds no {ARTIFACT_FILE}: not a finished artifact",
                "run the stage that makes it, or point to a finished one",
            )
        try:
            self.record: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            self.stage: str = self.record["stage"]
            self.fingerprint: str = self.record["fingerprint"]
            self.content_hash: str = self.record["content_hash"]
            self.metrics: dict[str, Any] = self.record["metrics"]
            self.config: dict[str, Any] = self.record["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise PunaError(
                f"{record} is damaged: {error!r}", f"remove {path} and run the stage again"
            ) from error

    def file(self, name: str) -> Path:
        """Return the path of a payload file.

        Raises:
            PunaError: The file is gone.
        """
        path = self.path / name
        if not path.exists():
            raise PunaError(
                f"{path} is missing from the artifact of {self.stage}",
                f"remove the folder {self.path} and run the stage again",
            )
        return path

    def read_json(self, name: str) -> Any:
        """Read a payload file that holds JSON.

        Raises:
            PunaError: The file is gone or damaged.
        """
        path = self.file(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PunaError(
                f"{path} is damaged: {error}",
                f"remove the folder {self.path} and run the stage {self.stage} again",
            ) from error

    def damaged_files(self, *, content: bool = False) -> list[str]:
        """Name the payload files that are missing or whose size (or content) has changed.

        Args:
            content: Read every file and compare its hash, not only its size.
        """
        bad = []
        for entry in self.record["files"]:
            path = self.path / entry["path"]
            if (
                not path.is_file()
                or path.stat().st_size != entry["n_bytes"]
                or (content and hash_file(path) != entry["xxh3_128"])
            ):
                bad.append(entry["path"])
        return bad

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r})"


def list_files(folder: Path) -> list[dict[str, Any]]:
    """List the payload of a folder: path, size and xxh3-128, sorted by path."""
    found = []
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in files:
            path = Path(root) / name
            relative = path.relative_to(folder).as_posix()
            if relative not in (ARTIFACT_FILE, CONFIG_FILE):
                found.append(
                    {"path": relative, "n_bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
                )
    return sorted(found, key=lambda entry: entry["path"])


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Complete a record with the file list, code and package versions, and write it last.

    Args:
        folder: The stage folder with its whole payload.
        record: Stage, configuration, fingerprint, inputs, times and metrics.
    """
    files = list_files(folder)
    write_json(
        folder / ARTIFACT_FILE,
        {
            "artifact_schema_version": ARTIFACT_SCHEMA_VERSION,
            **record,
            "content_hash": hash_json([(entry["path"], entry["xxh3_128"]) for entry in files]),
            "code": code_version(),
            "packages": package_versions(),
            "host": {"machine": platform.machine(), "n_cpus": os.cpu_count()},
            "argv": sys.argv[1:],
            "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": files,
        },
    )


@cache
def code_version() -> dict[str, Any]:
    """Return puna's version and, in a checkout, the commit and whether it has local changes."""
    here = Path(__file__).resolve().parents[1]
    found: dict[str, Any] = {"puna": VERSION, "commit": None, "dirty": None}
    try:
        # Fails where puna is no checkout, also when it is installed below another repository.
        _git(here, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(here, "rev-parse", "HEAD")
        status = _git(here, "status", "--porcelain", "--", str(here))
    except (OSError, subprocess.SubprocessError):
        return found
    return {**found, "commit": commit, "dirty": bool(status)}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()


@cache
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide numbers, plus Python's."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
