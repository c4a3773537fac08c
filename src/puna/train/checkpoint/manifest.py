"""The manifest of a checkpoint: its files with size and xxh3-128, and what it belongs to.

safetensors, DCP and ``torch.load`` all load a file with flipped bits without complaint; only a hash
notices. A folder without a manifest is no checkpoint. Imports no torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puna.core.fsio import hash_file, write_json

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1
_LENGTH_BYTES = 8  # of the header's length, at the start of a safetensors file
_STEP_DIR = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Manifest:
    """What stands in ``manifest.json``.

    Attributes:
        step: Steps done; the next step has this number.
        world: Ranks that wrote it; any number may load it.
        identity: Digest of the job (:meth:`puna.train.spec.JobSpec.identity`).
        dtype: Dtype of the matrix products so far.
        files: ``path``, ``n_bytes`` and ``xxh3_128`` of each file.
    """

    step: int
    world: int
    identity: str
    dtype: str
    files: tuple[dict[str, Any], ...]

    @property
    def n_bytes(self) -> int:
        """Size of the checkpoint."""
        return sum(entry["n_bytes"] for entry in self.files)


def step_dir(folder: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` steps."""
    return folder / f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [_STEP_DIR.fullmatch(path.name) for path in folder.iterdir()]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def seal(folder: Path, *, step: int, world: int, identity: str, dtype: str) -> Manifest:
    """Hash the files of a written checkpoint and write its manifest.

    Equal states give equal files: safetensors writes its header in random order, here it is sorted.
    """
    for path in sorted(folder.glob("*.safetensors")):
        _sort_header(path)
    files = tuple(
        {
            "path": path.relative_to(folder).as_posix(),
            "n_bytes": path.stat().st_size,
            "xxh3_128": hash_file(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    manifest = Manifest(step, world, identity, dtype, files)
    write_json(folder / MANIFEST_FILE, {"schema_version": SCHEMA_VERSION, **asdict(manifest)})
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: It is missing or unreadable.
    """
    try:
        values: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        version = values.pop("schema_version")
        manifest = Manifest(files=tuple(values.pop("files")), **values)
        for entry in manifest.files:
            _ = entry["path"], entry["n_bytes"], entry["xxh3_128"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST_FILE} is not readable: {error}") from error
    if version != SCHEMA_VERSION:
        raise DamagedCheckpointError(f"{MANIFEST_FILE} has the unknown schema version {version}")
    return manifest


def verify(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint and check every file against it.

    Raises:
        DamagedCheckpointError: The manifest is missing or unreadable, or a file is missing, of
            another size, or of another content.
    """
    manifest = read_manifest(folder)
    for entry in manifest.files:
        path, n_bytes, digest = folder / entry["path"], entry["n_bytes"], entry["xxh3_128"]
        if not path.is_file():
            raise DamagedCheckpointError(f"{path.name} is missing")
        if path.stat().st_size != n_bytes:
            raise DamagedCheckpointError(
                f"{path.name} has {path.stat().st_size} bytes instead of {n_bytes}"
            )
        if hash_file(path) != digest:
            raise DamagedCheckpointError(
                f"{path.name} has another content than it was written with"
            )
    return manifest


def _sort_header(path: Path) -> None:
    """Put the metadata in a safetensors header in order, in place (same text, same length)."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            notes = header.pop("__metadata__")
            header = {"__metadata__": dict(sorted(notes.items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{path}: the header does not fit")
        file.seek(_LENGTH_BYTES)
        file.write(text.ljust(length))


class DamagedCheckpointError(Exception):
    """A checkpoint that must not be loaded."""
