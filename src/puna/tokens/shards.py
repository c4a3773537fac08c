"""Token shards: what ``tokens.encode`` writes and everything later reads, memory-mapped.

::

    index.json                       dtype, vocab_size, per split and source: n_docs, n_tokens, ...
    <split>/<source>/tokens.bin      uint16 or uint32: bos + text + eos, document after document
    <split>/<source>/offsets.npy     int64 [n_docs+1], start of each document in tokens.bin
    <split>/<source>/ids.npy         S32 [n_docs], document ids, ascending
    <split>/<source>/n_bytes.npy     int64 [n_docs], UTF-8 bytes of each document's text
    <split>/<source>/repeats.npy     int32 [n_docs], how often a pass reads each document; only when
                                     the index has n_tokens_read (tokens of a pass, copies counted)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from puna.core.errors import PunaError
from puna.core.fsio import hash_json

INDEX_FILE = "index.json"
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.npy"
IDS_FILE = "ids.npy"
N_BYTES_FILE = "n_bytes.npy"
REPEATS_FILE = "repeats.npy"
SPLITS = ("train", "heldout")
INDEX_SCHEMA_VERSION = 1

_SOURCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_REBUILD = "remove the folder {folder} and run the stage tokens.encode again"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of stored tokens: uint16 below 65536 ids, else uint32."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.uint32)


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


@dataclass(frozen=True)
class SourceShard:
    """The documents of one source in one split.

    Attributes:
        source: Name of the source.
        folder: Where the files stand.
        tokens: Ids of all documents, memory-mapped, uint16 or uint32.
        offsets: Start of each document in ``tokens``, and the end of the last.
        ids: Document ids, S32.
        n_bytes: UTF-8 bytes of each document's text.
        repeats: How often a pass over the source reads each document; None: each once.
    """

    source: str
    folder: Path
    tokens: np.ndarray
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
        """Return the tokens of a document: bos + text + eos (a view of the file)."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

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
        folder: The output of ``tokens.encode``.

    Raises:
        PunaError: There is no index, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX_FILE
        if not path.is_file():
            raise PunaError(f"{folder} holds no {INDEX_FILE}: not a folder of token shards",
                            "give the output folder of the stage tokens.encode")  # fmt: skip
        try:
            self.index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.vocab_size = int(self.index["vocab_size"])
            self.dtype = np.dtype(self.index["dtype"])
            self._splits: dict[str, dict[str, dict[str, Any]]] = dict(self.index["splits"])
        except (ValueError, KeyError, TypeError) as error:
            raise PunaError(f"{path} is damaged: {error!r}",
                            _REBUILD.format(folder=folder)) from error  # fmt: skip

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
            raise PunaError(f"{self.folder} has no split {split!r}",
                            f"choose one of {', '.join(self._splits)}")  # fmt: skip
        return self._splits[split]

    def open(self, split: str, source: str) -> SourceShard:
        """Map the documents of a source into memory.

        Raises:
            PunaError: No such split or source, or a file is missing, cut short or inconsistent.
        """
        counts = self.counts(split)
        if source not in counts:
            raise PunaError(f"{self.folder}/{split} has no source {source!r}",
                            f"choose one of {', '.join(counts) or '(none)'}")  # fmt: skip
        folder = self.folder / split / source
        n_docs, n_tokens = counts[source]["n_docs"], counts[source]["n_tokens"]
        offsets = self._array(folder / OFFSETS_FILE, np.dtype(np.int64), n_docs + 1)
        ids = self._array(folder / IDS_FILE, np.dtype("S32"), n_docs)
        n_bytes = self._array(folder / N_BYTES_FILE, np.dtype(np.int64), n_docs)
        if offsets[0] != 0 or offsets[-1] != n_tokens or (np.diff(offsets) < 0).any():
            raise self._damaged(folder / OFFSETS_FILE,
                                f"its offsets do not cover 0..{n_tokens} in order")  # fmt: skip
        tokens = self._tokens(folder / TOKENS_FILE, n_tokens)
        shard = SourceShard(source, folder, tokens, offsets, ids, n_bytes)
        n_read = counts[source].get("n_tokens_read")
        if n_read is None:
            return shard
        repeats = self._array(folder / REPEATS_FILE, np.dtype(np.int32), n_docs)
        shard = replace(shard, repeats=repeats)
        if (repeats < 1).any() or shard.n_tokens_read != n_read:
            raise self._damaged(
                folder / REPEATS_FILE, f"its repetitions do not give {n_read} tokens"
            )
        return shard

    def _tokens(self, path: Path, n_tokens: int) -> np.ndarray:
        want_bytes = n_tokens * self.dtype.itemsize
        if not path.is_file():
            raise self._damaged(path, "it is missing")
        size_bytes = path.stat().st_size
        if size_bytes != want_bytes:
            raise self._damaged(path, f"it has {size_bytes} bytes, {INDEX_FILE} says {want_bytes}")
        if n_tokens == 0:
            return np.empty(0, self.dtype)
        return np.memmap(path, dtype=self.dtype, mode="r", shape=(n_tokens,))

    def _array(self, path: Path, dtype: np.dtype[Any], length: int) -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
        except FileNotFoundError:
            raise self._damaged(path, "it is missing") from None
        except (ValueError, OSError, EOFError) as error:
            raise self._damaged(path, str(error)) from error
        if array.dtype != dtype or array.shape != (length,):
            raise self._damaged(path, f"it holds {array.dtype} {list(array.shape)}, {INDEX_FILE} "
                                      f"says {dtype} [{length}]")  # fmt: skip
        return array

    def _damaged(self, path: Path, why: str) -> PunaError:
        return PunaError(f"{path} is damaged: {why}", _REBUILD.format(folder=self.folder))
