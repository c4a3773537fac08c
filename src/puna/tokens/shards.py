"""Token shards: what ``tokens.encode`` writes and everything later reads, memory-mapped.

::

    index.json                       dtype, vocab_size, per split and source: n_docs, n_tokens, ...
    <split>/<source>/tokens.bin      uint16 or uint32: bos + text + eos, document after document
    <split>/<source>/offsets.npy     int64 [n_docs+1], start of each document in tokens.bin
    <split>/<source>/ids.npy         S32 [n_docs], document ids, ascending
    <split>/<source>/n_bytes.npy     int64 [n_docs], UTF-8 bytes of each document's text
    <split>/<source>/repeats.npy     int32 [n_docs], how often a pass reads each document; only when
                                     the index has n_tokens_read (tokens of a pass, copies counted)
    <split>/<source>/blocks.npy      uint64, xxh3-64 of each 64 KiB of tokens.bin

The index has a hash of each of these files (``files``); tokens.bin is checked block by block as it
is read (:mod:`.integrity`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32, Int64

from puna.core.errors import PunaError
from puna.core.fsio import hash_file, hash_json
from puna.tokens.integrity import BLOCK_BYTES, CheckedTokens, DamagedBlocksError, TokenArray

if TYPE_CHECKING:
    from puna.tokens.remote import Cache, Store

INDEX_FILE = "index.json"
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.npy"
IDS_FILE = "ids.npy"
N_BYTES_FILE = "n_bytes.npy"
REPEATS_FILE = "repeats.npy"
BLOCKS_FILE = "blocks.npy"
SPLITS = ("train", "heldout")
INDEX_SCHEMA_VERSION = 1

_HASHED_AT_OPEN = frozenset((OFFSETS_FILE, REPEATS_FILE, BLOCKS_FILE))
"""What decides which tokens are read; a file of a store is checked as it arrives, too."""
_SOURCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_REBUILD = "remove the folder {folder} and run the stage tokens.encode again"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of stored tokens: uint16 below 65536 ids, else uint32."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.uint32)


def is_remote(location: str) -> bool:
    """Tell whether shards are in a store and not in a folder here."""
    return "://" in location


def check_source_name(source: str) -> str:
    """Return a source's name when it can name a folder.

    Raises:
        PunaError: It holds a slash or another character that is not safe in paths.
    """
    if not _SOURCE_NAME.fullmatch(source):
        raise PunaError(
            f"source name {source!r} cannot name a folder of token shards",
            "rename the source; letters, digits and . _ + - are allowed",
        )
    return source


class DamagedTokensError(PunaError):
    """Tokens of some documents are not those that were written."""


@dataclass(frozen=True)
class SourceShard:
    """The documents of one source in one split.

    Attributes:
        source: Name of the source.
        folder: Where the files stand: a path or a URL.
        tokens: Ids of all documents, uint16 or uint32: mapped, checked as they are read, or far
            away.
        offsets: Start of each document in ``tokens``, and the end of the last.
        ids: Document ids, S32.
        n_bytes: UTF-8 bytes of each document's text.
        repeats: How often a pass over the source reads each document; None: each once.
    """

    source: str
    folder: str
    tokens: TokenArray
    offsets: Int64[np.ndarray, " n_docs+1"]
    ids: np.ndarray
    n_bytes: Int64[np.ndarray, " n_docs"]
    repeats: Int32[np.ndarray, " n_docs"] | None = None

    @property
    def n_docs(self) -> int:
        """Number of documents."""
        return len(self.ids)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, with the begin and end token of each document."""
        return len(self.tokens)

    @property
    def n_tokens_read(self) -> int:
        """Tokens of one pass over the source: those of a repeated document count each time."""
        if self.repeats is None:
            return self.n_tokens
        return int((np.diff(self.offsets) * self.repeats).sum())

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of a document: bos + text + eos (a view of the file).

        Raises:
            DamagedTokensError: They are not those that were written.
        """
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def read(self, start: int, end: int) -> np.ndarray:
        """Return tokens by their places in the shard.

        Raises:
            DamagedTokensError: They are not those that were written.
        """
        try:
            return self.tokens[start:end]
        except DamagedBlocksError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: DamagedBlocksError) -> DamagedTokensError:
        first = int(np.searchsorted(self.offsets, error.first, side="right")) - 1
        last = int(np.searchsorted(self.offsets, error.end - 1, side="right")) - 1
        width = self.tokens.dtype.itemsize
        return DamagedTokensError(
            f"{self.folder}/{TOKENS_FILE}, bytes {error.first * width} to {error.end * width}: "
            f"{error.why}; documents {first} to {last} of source {self.source!r} "
            f"({self.document_id(first)} to {self.document_id(last)}) lie there",
            'bring an undamaged copy, or set on_damage = "skip" to train without these documents',
        )

    def fetch(self, documents: Iterable[int]) -> None:
        """Bring documents from a store, many at a time, before they are asked for one by one."""
        fetch = getattr(self.tokens, "fetch", None)
        if fetch is not None:
            fetch((int(self.offsets[i]), int(self.offsets[i + 1])) for i in documents)

    def document_id(self, index: int) -> str:
        """Return the id of a document."""
        return self.ids[index].decode("ascii")

    def find(self, document_id: str) -> int | None:
        """Return the index of a document by its id, or None when it is not here."""
        key = np.bytes_(document_id.encode("ascii", "replace"))
        index = int(np.searchsorted(self.ids, key))
        return index if index < len(self.ids) and self.ids[index] == key else None


class TokenShards:
    """A folder of token shards, checked when it is opened.

    Args:
        folder: The output of ``tokens.encode``, or its URL.
        cache: Keeps what is downloaded; needed for a URL.

    Raises:
        PunaError: There is no index, it is damaged, or the store cannot be reached.
    """

    def __init__(self, folder: Path | str, cache: Cache | None = None) -> None:
        self.location = str(folder)
        self._store: Store | None = None
        if is_remote(self.location):
            from puna.tokens.remote import Store

            if cache is None:
                raise ValueError("shards in a store need a cache")
            self._store = Store(self.location, cache)
            text = self._store.read(INDEX_FILE).decode("utf-8", "replace")
        else:
            self.location = str(Path(folder))
            path = Path(folder) / INDEX_FILE
            if not path.is_file():
                raise PunaError(f"{folder} holds no {INDEX_FILE}: not a folder of token shards",
                                "give the output folder of the stage tokens.encode")  # fmt: skip
            text = path.read_text(encoding="utf-8", errors="replace")
        try:
            self.index: dict[str, Any] = json.loads(text)
            self.vocab_size = int(self.index["vocab_size"])
            self.dtype = np.dtype(self.index["dtype"])
            self._splits: dict[str, dict[str, dict[str, Any]]] = dict(self.index["splits"])
        except (ValueError, KeyError, TypeError) as error:
            raise PunaError(f"{self.location}/{INDEX_FILE} is damaged: {error!r}",
                            _REBUILD.format(folder=folder)) from error  # fmt: skip

    @property
    def absolute(self) -> str:
        """The location, as it is found from anywhere."""
        return self.location if self._store else str(Path(self.location).resolve())

    @property
    def digest(self) -> str:
        """Identity of the content: a digest of the index, which holds digests of all shards."""
        return hash_json(self.index)

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self._splits)

    def counts(self, split: str) -> dict[str, dict[str, Any]]:
        """Return per source ``n_docs``, ``n_tokens`` and ``n_bytes`` of a split.

        With repetitions also ``n_tokens_read``, the tokens of one pass.

        Raises:
            PunaError: No such split.
        """
        if split not in self._splits:
            raise PunaError(f"{self.location} has no split {split!r}",
                            f"choose one of {', '.join(self._splits)}")  # fmt: skip
        return self._splits[split]

    def open(self, split: str, source: str, *, tolerant: bool = False) -> SourceShard:
        """Map the documents of a source into memory.

        Args:
            split: The split.
            source: The source.
            tolerant: A ``tokens.bin`` that was cut short is opened all the same; what is missing
                shows as damage when it is read.

        Raises:
            PunaError: No such split or source, or a file is missing, cut short, damaged or
                inconsistent. Damage inside ``tokens.bin`` shows when it is read.
        """
        counts = self.counts(split)
        if source not in counts:
            raise PunaError(f"{self.location}/{split} has no source {source!r}",
                            f"choose one of {', '.join(counts) or '(none)'}")  # fmt: skip
        folder, entry = f"{split}/{source}", counts[source]
        n_docs, n_tokens = entry["n_docs"], entry["n_tokens"]

        def array(name: str, dtype: type | str, length: int) -> np.ndarray:
            return self._array(f"{folder}/{name}", entry, np.dtype(dtype), length)

        offsets = array(OFFSETS_FILE, np.int64, n_docs + 1)
        ids = array(IDS_FILE, "S32", n_docs)
        n_bytes = array(N_BYTES_FILE, np.int64, n_docs)
        if offsets[0] != 0 or offsets[-1] != n_tokens or (np.diff(offsets) < 0).any():
            raise self._damaged(f"{folder}/{OFFSETS_FILE}",
                                f"its offsets do not cover 0..{n_tokens} in order")  # fmt: skip
        hashes = None
        if BLOCKS_FILE in entry.get("files", {}):
            n_blocks = -(-n_tokens * self.dtype.itemsize // BLOCK_BYTES)
            hashes = array(BLOCKS_FILE, np.uint64, n_blocks)
        tokens = self._tokens(folder, entry, hashes, tolerant)
        shard = SourceShard(source, f"{self.location}/{folder}", tokens, offsets, ids, n_bytes)
        n_read = entry.get("n_tokens_read")
        if n_read is None:
            return shard
        repeats = array(REPEATS_FILE, np.int32, n_docs)
        shard = replace(shard, repeats=repeats)
        if (repeats < 1).any() or shard.n_tokens_read != n_read:
            raise self._damaged(
                f"{folder}/{REPEATS_FILE}", f"its repetitions do not give {n_read} tokens"
            )
        return shard

    def _tokens(
        self, folder: str, entry: dict[str, Any], hashes: np.ndarray | None, tolerant: bool
    ) -> TokenArray:
        n_tokens, name = entry["n_tokens"], f"{folder}/{TOKENS_FILE}"
        if self._store is not None:
            from puna.tokens.remote import RemoteTokens

            if hashes is None:
                raise PunaError(
                    f"{self.location} has no hashes of blocks: an earlier version wrote it",
                    "run the stage tokens.encode again and upload its folder",
                )
            key = entry["xxh3_128"]
            return RemoteTokens(self._store, name, key, self.dtype, n_tokens, hashes)
        path = Path(self.location, name)
        want_bytes = n_tokens * self.dtype.itemsize
        if not path.is_file():
            raise self._damaged(name, "it is missing")
        size_bytes = path.stat().st_size
        if size_bytes < want_bytes and tolerant and hashes is not None:
            n_left = size_bytes // self.dtype.itemsize
            left = np.memmap(path, self.dtype, "r", shape=(n_left,)) if n_left else np.empty(0)
            return CheckedTokens(left.astype(self.dtype, copy=False), hashes, n_tokens)
        if size_bytes != want_bytes:
            raise self._damaged(name, f"it has {size_bytes} bytes, {INDEX_FILE} says {want_bytes}")
        if n_tokens == 0:
            return np.empty(0, self.dtype)
        mapped = np.memmap(path, dtype=self.dtype, mode="r", shape=(n_tokens,))
        return mapped if hashes is None else CheckedTokens(mapped, hashes)

    def _array(
        self, name: str, entry: dict[str, Any], dtype: np.dtype[Any], length: int
    ) -> np.ndarray:
        digest = entry.get("files", {}).get(name.rpartition("/")[2])
        if self._store is None:
            path = Path(self.location, name)
        elif digest is None:
            raise self._damaged(INDEX_FILE, f"it has no hash of {name}")
        else:
            path = self._store.whole(name, digest)
        hashed = path.name in _HASHED_AT_OPEN
        try:
            if hashed and digest is not None and hash_file(path) != digest:
                raise self._damaged(name, "it does not have the hash that the index names")
            array = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
        except FileNotFoundError:
            raise self._damaged(name, "it is missing") from None
        except (ValueError, OSError, EOFError) as error:
            raise self._damaged(name, str(error)) from error
        if array.dtype != dtype or array.shape != (length,):
            raise self._damaged(name, f"it holds {array.dtype} {list(array.shape)}, {INDEX_FILE} "
                                      f"says {dtype} [{length}]")  # fmt: skip
        return array

    def _damaged(self, name: str, why: str) -> PunaError:
        return PunaError(f"{self.location}/{name} is damaged: {why}",
                         _REBUILD.format(folder=self.location))  # fmt: skip
