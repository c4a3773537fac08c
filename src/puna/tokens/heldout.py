"""Held-out documents as sets of windows, one per source: what bits per byte are measured on.

Bits per byte = negative log2-likelihood of all tokens of a document after the first (its text and
the end-of-text token) / UTF-8 bytes of its text. It is comparable between tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from puna.tokens.remote import Cache
from puna.tokens.rows import Piece
from puna.tokens.shards import SourceShard, TokenShards
from puna.tokens.windows import document_windows

HELD_OUT = "heldout"
"""Name of the split."""


@dataclass(frozen=True)
class TextSet:
    """What one likelihood is summed over.

    Attributes:
        name: Source of the documents, or ``answers``.
        pieces: Windows or conversations.
        n_docs: Documents or conversations.
        n_tokens: Scored tokens.
        n_bytes: UTF-8 bytes that the scored tokens stand for.
        n_left_out: Documents or conversations not measured, over the limit.
    """

    name: str
    pieces: Sequence[Piece]
    n_docs: int
    n_tokens: int
    n_bytes: int
    n_left_out: int


def choose_documents(shard: SourceShard, max_tokens: int, seed: int) -> list[int]:
    """Choose whole documents up to a number of tokens, in an order given by a hash of their ids.

    Documents that no longer fit are passed over. Empty when each is larger than the limit.
    """
    lengths = np.diff(shard.offsets)
    keys = [xxhash.xxh3_64_intdigest(f"{seed}\0".encode() + bytes(id_)) for id_ in shard.ids]
    chosen, left = [], max_tokens
    for index in np.argsort(np.array(keys, dtype=np.uint64), kind="stable"):
        if lengths[index] <= left:
            chosen.append(int(index))
            left -= int(lengths[index])
    return sorted(chosen)


def document_sets(
    shards: TokenShards, seq_len: int, overlap: float, max_tokens: int, seed: int
) -> Iterator[TextSet]:
    """Yield the held-out documents of each source that has any.

    Args:
        shards: Output of the stage ``tokens.encode``.
        seq_len: Longest window.
        overlap: Share of a window that repeats earlier tokens as context, unscored.
        max_tokens: Of a source; see :func:`choose_documents`.
        seed: Chooses the documents.
    """
    if HELD_OUT not in shards.splits:
        return
    for source in shards.counts(HELD_OUT):
        shard = shards.open(HELD_OUT, source)
        chosen = choose_documents(shard, max_tokens, seed)
        shard.fetch(chosen)
        documents = [shard.document(index) for index in chosen]
        n_bytes = int(shard.n_bytes[chosen].sum()) if chosen else 0
        if n_bytes == 0:
            continue
        n_again = int(overlap * seq_len)
        pieces = [
            piece for tokens in documents for piece in document_windows(tokens, seq_len, n_again)
        ]
        n_tokens = sum(len(tokens) - 1 for tokens in documents)
        left_out = shard.n_docs - len(chosen)
        yield TextSet(source, pieces, len(chosen), n_tokens, n_bytes, left_out)


def held_out_sets(
    folder: str, seq_len: int, overlap: float, max_tokens: int, seed: int,
    cache: dict[str, Any] | None = None,
) -> list[TextSet]:  # fmt: skip
    """Open the sets from JSON values (the factory of training processes).

    Args:
        folder: Output of the stage ``tokens.encode``, or its URL.
        seq_len: See :func:`document_sets`, as the next three.
        overlap: Share of a window.
        max_tokens: Of a source.
        seed: Of the choice.
        cache: See :meth:`puna.tokens.remote.Cache.of`; for shards in a store.
    """
    shards = TokenShards(folder, None if cache is None else Cache.of(cache))
    return list(document_sets(shards, seq_len, overlap, max_tokens, seed))
