"""The manifest of a checkpoint: its shards with their hashes, their root, and what they belong to.

A shard is what one rank has of one tensor: a range of a safetensors file. Each has an xxh3-128, and
a Merkle tree over these and over what the checkpoint belongs to ends in the root, so that no shard,
no order of shards and no field of the manifest changes unnoticed. safetensors, DCP and
``torch.load`` all load a file with flipped bits without complaint; only a hash notices. A folder
without a manifest is no checkpoint. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from puna.core.fsio import write_json

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 2
_LENGTH_BYTES = 8  # of the header's length, at the start of a safetensors file
_READ_BYTES = 4 << 20
_STEP_DIR = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Shard:
    """A range of a file.

    Attributes:
        name: Of the tensor; empty for what comes before the tensors, and for a file of another
            kind.
        offset: Where it begins.
        n_bytes: How long it is.
        xxh3_128: Hash of its content, in hexadecimal.
    """

    name: str
    offset: int
    n_bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class ShardedFile:
    """A file of a checkpoint.

    Attributes:
        path: In the checkpoint's folder.
        shards: One after the other, without a gap.
    """

    path: str
    shards: tuple[Shard, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return sum(shard.n_bytes for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """What stands in ``manifest.json``.

    Attributes:
        step: Steps done; the next step has this number.
        world: Ranks that wrote it; any number may load it.
        identity: Digest of the job (:meth:`puna.train.spec.JobSpec.identity`).
        dtype: Dtype of the matrix products so far.
        files: With their shards.
        root: Root of the Merkle tree over all of this.
    """

    step: int
    world: int
    identity: str
    dtype: str
    files: tuple[ShardedFile, ...]
    root: str

    @classmethod
    def make(
        cls, step: int, world: int, identity: str, dtype: str, files: tuple[ShardedFile, ...]
    ) -> Manifest:
        """Compute the root."""
        bare = cls(step, world, identity, dtype, files, "")
        return cls(step, world, identity, dtype, files, bare.compute_root())

    @property
    def n_bytes(self) -> int:
        """Size of the checkpoint."""
        return sum(file.n_bytes for file in self.files)

    def compute_root(self) -> str:
        """Return the root that fits the rest."""
        leaves: list[Any] = [[self.step, self.world, self.identity, self.dtype]]
        leaves += [
            [file.path, shard.name, shard.offset, shard.n_bytes, shard.xxh3_128]
            for file in self.files
            for shard in file.shards
        ]
        return merkle_root(json.dumps(leaf) for leaf in leaves)

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest and compare its root.

        Raises:
            DamagedCheckpointError: It is unreadable, or the root is another one.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("schema_version")
            files = tuple(
                ShardedFile(file["path"], tuple(Shard(**shard) for shard in file["shards"]))
                for file in values.pop("files")
            )
            manifest = cls(files=files, **values)
            root = manifest.compute_root()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{MANIFEST_FILE} is not readable: {error}") from error
        if version != SCHEMA_VERSION:
            raise DamagedCheckpointError(f"{MANIFEST_FILE} has unknown schema version {version}")
        if manifest.root != root:
            raise DamagedCheckpointError(f"{MANIFEST_FILE} has another root than its hashes")
        return manifest


def merkle_root(leaves: Iterable[str]) -> str:
    """Return the root of a binary Merkle tree, xxh3-128 in hexadecimal.

    Leaves and inner nodes are hashed with different first bytes, so that no node passes for a leaf
    (as in RFC 6962, section 2.1); one without a partner moves up as it is.
    """
    level = [xxhash.xxh3_128_digest(b"\0" + leaf.encode()) for leaf in leaves]
    while len(level) > 1:
        pairs = [
            xxhash.xxh3_128_digest(b"\1" + left + right)
            for left, right in zip(level[::2], level[1::2], strict=False)
        ]
        level = [*pairs, *level[len(pairs) * 2 :]]
    return level[0].hex() if level else xxhash.xxh3_128_hexdigest(b"")


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
        ShardedFile(path.relative_to(folder).as_posix(), _hash_shards(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    manifest = Manifest.make(step, world, identity, dtype, files)
    write_json(folder / MANIFEST_FILE, manifest.to_json())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: It is missing or unreadable, or its root does not fit.
    """
    try:
        text = (folder / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{MANIFEST_FILE} is not readable: {error}") from error
    return Manifest.from_json(text)


def find_damage(folder: Path, manifest: Manifest) -> dict[str, list[Shard]]:
    """Return the files that are not as they were written, with the shards that are damaged.

    A file without any such shard has bytes too many. One that the manifest does not name counts as
    well: whoever reads the folder would read it.
    """
    found: dict[str, list[Shard]] = {}
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file():
            found[file.path] = list(file.shards)
            continue
        with path.open("rb") as opened:
            bad = [s for s in file.shards if _hash_range(opened, s.offset, s.n_bytes) != s.xxh3_128]
        if bad or path.stat().st_size != file.n_bytes:
            found[file.path] = bad
    known = {MANIFEST_FILE, *(file.path for file in manifest.files)}
    foreign = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - known
    return {**found, **{path: [] for path in sorted(foreign)}}


def verify(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint and check every shard against it.

    Raises:
        DamagedCheckpointError: The manifest is missing or unreadable, or a file is missing, of
            another size, or of another content.
    """
    manifest = read_manifest(folder)
    damage = find_damage(folder, manifest)
    if damage:
        raise DamagedCheckpointError(explain_damage(folder, manifest, damage))
    return manifest


def explain_damage(folder: Path, manifest: Manifest, damage: Mapping[str, list[Shard]]) -> str:
    """Say in words what is wrong with the first damaged file."""
    path = next(iter(damage))
    sizes = {file.path: file.n_bytes for file in manifest.files}
    if path not in sizes:
        return f"{path} does not belong to the checkpoint"
    if not (folder / path).is_file():
        return f"{path} is missing"
    size = (folder / path).stat().st_size
    if size != sizes[path]:
        return f"{path} has {size} bytes instead of {sizes[path]}"
    names = ", ".join(shard.name or "the header" for shard in damage[path][:3])
    more = " and more" if len(damage[path]) > 3 else ""
    return f"{path} has another content than it was written with ({names}{more})"


def _hash_shards(path: Path) -> tuple[Shard, ...]:
    """Divide a file into its header and its tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ranges = [("", 0, size)]
        if path.suffix == ".safetensors":
            start = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(start - _LENGTH_BYTES))
            header.pop("__metadata__", None)
            spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
            ranges = [("", 0, start)]
            ranges += [(name, start + at, end - at) for at, end, name in spans]
        if sum(n_bytes for _, _, n_bytes in ranges) != size:
            raise ValueError(f"{path}: the tensors do not fill the file")
        return tuple(Shard(*span, _hash_range(file, span[1], span[2])) for span in ranges)


def read_shard(path: Path, offset: int, n_bytes: int, xxh3_128: str) -> bytes | None:
    """Return a range of a file; None when the file is gone or the hash is another one."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(n_bytes)
    return data if xxhash.xxh3_128_hexdigest(data) == xxh3_128 else None


def _hash_range(file: BinaryIO, offset: int, n_bytes: int) -> str:
    digest = xxhash.xxh3_128()
    file.seek(offset)
    while n_bytes and (block := file.read(min(n_bytes, _READ_BYTES))):
        digest.update(block)
        n_bytes -= len(block)
    return digest.hexdigest() if n_bytes == 0 else ""


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
