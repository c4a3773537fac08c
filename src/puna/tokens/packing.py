"""Packing one source: its documents, shuffled in each epoch, laid end to end and cut into rows.

The source is an endless stream of tokens: all documents in the order of epoch 0, then all in the
order of epoch 1, and so on. A document that is to be repeated stands ``repeats`` times in each
epoch, its copies shuffled like other documents. Row m holds the tokens [m*T, (m+1)*T) of that
stream, so any row is found without the rows before it, no token is dropped and none is padding.

A document may run over the border of a row. Its continuation starts a segment of its own in the
next row, with positions from 0: attention cannot reach into the other row, so positions that go on
counting would promise a context that is not there, and would pass ``seq_len`` for long documents.
Documents of at most T tokens that are cut lose the context before the cut and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash
from jaxtyping import Int64

from puna.tokens.shards import SourceShard

_EPOCHS_KEPT = 2


class Segment(NamedTuple):
    """A run of tokens of one document inside one row.

    Attributes:
        document: Index of the document in its shard.
        start: First token, counted from the document's begin token.
        end: One past the last token.
        epoch: Which pass over the source it belongs to.
    """

    document: int
    start: int
    end: int
    epoch: int


def shuffled(n_docs: int, seed: int, source: str, epoch: int) -> Int64[np.ndarray, " n_docs"]:
    """Return the order of a source's documents in an epoch.

    The order comes from the raw output of Philox, a counter-based generator (Salmon et al. 2011),
    keyed by seed, source and epoch: it needs no state, does not depend on other sources, and stays
    the same across versions of numpy (whose ``permutation`` makes no such promise).
    """
    key = xxhash.xxh3_128_intdigest(f"order\0{seed}\0{source}\0{epoch}".encode())
    draws = np.random.Philox(key=key).random_raw(n_docs)
    return np.argsort(draws, kind="stable")


class SourceStream:
    """The endless stream of one source.

    Args:
        shard: Its documents; at least one token.
        seq_len: Tokens of a row, T.
        seed: Decides the order of the documents.
    """

    def __init__(self, shard: SourceShard, seq_len: int, seed: int) -> None:
        if shard.n_tokens == 0:
            raise ValueError(f"source {shard.source} has no tokens")
        self.shard, self.seq_len, self.seed = shard, seq_len, seed
        self._lengths = np.diff(shard.offsets)
        self._n_tokens = shard.n_tokens_read
        self._orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def epochs(self, n_rows: int) -> float:
        """Return how often ``n_rows`` rows pass over the source."""
        return n_rows * self.seq_len / self._n_tokens

    def segments(self, row: int) -> Iterator[Segment]:
        """Yield the segments of a row in order; together they hold exactly ``seq_len`` tokens."""
        epoch, at = divmod(row * self.seq_len, self._n_tokens)
        order, starts = self._order(epoch)
        # the last document that starts at or before `at`; empty documents do not exist (bos + eos)
        index = int(np.searchsorted(starts, at, side="right")) - 1
        left = self.seq_len
        while left:
            if index == len(order):
                epoch, at, index = epoch + 1, 0, 0
                order, starts = self._order(epoch)
            document = int(order[index])
            start = at - int(starts[index])
            end = min(int(self._lengths[document]), start + left)
            if end > start:
                yield Segment(document, start, end, epoch)
            left -= end - start
            at += end - start
            index += 1

    def tokens(self, segment: Segment) -> tuple[np.ndarray, int | None]:
        """Return a segment's tokens and the document's next token (None at its end).

        Raises:
            DamagedTokensError: Some token of the document, in this segment or not, is not as it was
                written.
        """
        document = self.shard.document(segment.document)
        more = segment.end < len(document)
        window = document[segment.start : segment.end]
        return window, int(document[segment.end]) if more else None

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of an epoch in order, and where each starts in the epoch."""
        found = self._orders.get(epoch)
        if found is None:
            repeats = self.shard.repeats
            if repeats is None:
                order = shuffled(self.shard.n_docs, self.seed, self.shard.source, epoch)
            else:
                copies = np.repeat(np.arange(self.shard.n_docs), repeats)
                order = copies[shuffled(len(copies), self.seed, self.shard.source, epoch)]
            ends = np.cumsum(self._lengths[order])
            found = (order, ends - self._lengths[order])
            self._orders[epoch] = found
            while len(self._orders) > _EPOCHS_KEPT:
                self._orders.popitem(last=False)
        else:
            self._orders.move_to_end(epoch)
        return found
