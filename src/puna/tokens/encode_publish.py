"""The end of ``tokens.encode``: chunks to shards per split and source, documents ordered by id.

Nothing here trusts the counters of the workers: documents are counted again, in the input and in
what was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from puna.core.errors import PunaError
from puna.core.fsio import remove_tree, write_json
from puna.tokens.encode_unit import DOCUMENTS_FILE, Unit
from puna.tokens.shard_files import write_shard
from puna.tokens.shards import (
    INDEX_FILE,
    INDEX_SCHEMA_VERSION,
    SPLITS,
    TOKENS_FILE,
    TokenShards,
    token_dtype,
)
from puna.tokens.tokenizer import Tokenizer

_OPEN_CHUNKS = 128
"""Chunks mapped at once; each takes a file descriptor."""
_BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class _Group:
    """The documents of one split and source, over all chunks, ordered by id."""

    ids: np.ndarray
    chunk: np.ndarray
    start: np.ndarray
    n_tokens: np.ndarray
    n_bytes: np.ndarray
    repeat: np.ndarray


def publish(
    units: Sequence[Unit], states: Sequence[dict[str, Any]], tokenizer: Tokenizer, out: Path
) -> dict[str, Any]:
    """Write the shards and ``index.json`` from the finished chunks and check that nothing is lost.

    Args:
        units: What was encoded.
        states: The state of each unit.
        tokenizer: What it was encoded with.
        out: Folder of the stage.

    Returns:
        ``docs``, ``tokens``, ``bytes``, ``bytes_per_token``, ``ids_digest`` and the same per split
        and source under ``splits``, there with ``tokens_read``: tokens of one pass, repetitions
        counted.

    Raises:
        PunaError: Two documents have the same id.
        RuntimeError: The shards do not hold the documents of the input (never seen; a guard).
    """
    _check_distinct(units)
    dtype = token_dtype(tokenizer.vocab_size)
    sources = sorted({source for state in states for _, source in state["groups"]})
    splits: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        remove_tree(out / split)  # what a killed attempt had begun to write
        for source in sources:
            group = _gather(units, states, split, source)
            splits[split][source] = _write_group(group, units, dtype, out / split / source)
    index = {
        "schema_version": INDEX_SCHEMA_VERSION,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer_digest": tokenizer.digest,
        "splits": splits,
    }
    write_json(out / INDEX_FILE, index)
    n_docs, digest = _check_conservation(units, out)
    every = [counts for by_source in splits.values() for counts in by_source.values()]
    n_tokens, n_bytes = (sum(c[key] for c in every) for key in ("n_tokens", "n_bytes"))
    return {
        "docs": n_docs,
        "tokens": n_tokens,
        "bytes": n_bytes,
        "bytes_per_token": n_bytes / max(n_tokens, 1),
        "ids_digest": digest,
        "vocab_size": tokenizer.vocab_size,
        "splits": {
            split: {source: _summary(counts) for source, counts in by_source.items()}
            for split, by_source in splits.items()
        },
    }


def _summary(counts: dict[str, Any]) -> dict[str, Any]:
    n_tokens, n_bytes = counts["n_tokens"], counts["n_bytes"]
    return {
        "docs": counts["n_docs"],
        "tokens": n_tokens,
        "tokens_read": counts.get("n_tokens_read", n_tokens),
        "bytes": n_bytes,
        "bytes_per_token": n_bytes / n_tokens if n_tokens else None,
    }


def _check_distinct(units: Sequence[Unit]) -> None:
    """Refuse two documents with the same id, also when they are of different splits."""
    parts = []
    for unit in units:
        with np.load(unit.chunk / DOCUMENTS_FILE, allow_pickle=False) as arrays:
            parts.append(arrays["id"])
    ids = np.sort(np.concatenate(parts))
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        raise PunaError(f"two documents have the id {ids[twice[0]].decode()}",
                        "give every document its own source and path")  # fmt: skip


def _gather(
    units: Sequence[Unit], states: Sequence[dict[str, Any]], split: str, source: str
) -> _Group:
    """Collect where the documents of a split and source stand, ordered by id."""
    parts: list[tuple[np.ndarray, ...]] = []
    for number, (unit, state) in enumerate(zip(units, states, strict=True)):
        if [split, source] not in state["groups"]:
            continue
        with np.load(unit.chunk / DOCUMENTS_FILE, allow_pickle=False) as arrays:
            mine = arrays["group"] == state["groups"].index([split, source])
            ends = np.cumsum(arrays["n_tokens"])
            starts = ends - arrays["n_tokens"]
            chunk = np.full(int(mine.sum()), number, np.int64)
            parts.append((arrays["id"][mine], chunk, starts[mine], arrays["n_tokens"][mine],
                          arrays["n_bytes"][mine], arrays["repeat"][mine]))  # fmt: skip
    if not parts:
        none = np.empty(0, np.int64)
        return _Group(np.empty(0, "S32"), none, none, none, none, np.empty(0, np.int32))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return _Group(*(column[order] for column in columns))


def _write_group(
    group: _Group, units: Sequence[Unit], dtype: np.dtype[Any], folder: Path
) -> dict[str, Any]:
    """Write the shard of a split and source; return its entry of the index."""

    @lru_cache(_OPEN_CHUNKS)
    def chunk(number: int) -> np.ndarray:
        return np.memmap(units[number].chunk / TOKENS_FILE, dtype=dtype, mode="r")

    def blocks() -> Iterator[np.ndarray]:
        for number, start, end in _runs(group):
            for first in range(start, end, _BLOCK_TOKENS):
                yield chunk(number)[first : min(end, first + _BLOCK_TOKENS)]

    return write_shard(folder, blocks(), group.n_tokens, group.ids, group.n_bytes, group.repeat)


def _runs(group: _Group) -> Iterable[tuple[int, int, int]]:
    """Join documents that follow each other in the same chunk: (chunk, start, end)."""
    if not len(group.ids):
        return []
    ends = group.start + group.n_tokens
    follows = (group.chunk[1:] == group.chunk[:-1]) & (group.start[1:] == ends[:-1])
    firsts = np.concatenate([[0], np.flatnonzero(~follows) + 1])
    lasts = np.concatenate([firsts[1:] - 1, [len(group.ids) - 1]])
    columns = (group.chunk[firsts], group.start[firsts], ends[lasts])
    return zip(*(column.tolist() for column in columns), strict=True)


def _check_conservation(units: Sequence[Unit], out: Path) -> tuple[int, str]:
    """Compare the documents of the input with those of the shards: their number and their ids."""
    given = _Tally()
    for unit in units:
        for batch in unit.piece.batches(("id",)):
            given.add(text.encode() for text in batch.column("id").to_pylist())
    written = _Tally()
    shards = TokenShards(out)
    for split in shards.splits:
        for source in shards.counts(split):
            written.add(shards.open(split, source).ids.tolist())
    if (given.n, given.sum) != (written.n, written.sum):
        raise RuntimeError(
            f"{given.n} documents went in (ids {given.sum:016x}), {written.n} came out "
            f"(ids {written.sum:016x})"
        )
    return written.n, f"{written.sum:016x}"


class _Tally:
    """Number of ids and a digest that does not depend on their order."""

    def __init__(self) -> None:
        self.n, self.sum = 0, 0

    def add(self, ids: Iterable[bytes]) -> None:
        for document_id in ids:
            self.n += 1
            self.sum = (self.sum + xxhash.xxh3_64_intdigest(document_id)) % 2**64
