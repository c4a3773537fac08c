"""The loader: the batch of a step, as a pure function of the step.

Shapes: B rows of the global batch (or of one rank's part), T ``seq_len``.

There is no iterator and no state to save. Which source a row comes from (:mod:`.mixing`) and which
tokens it holds (:mod:`.packing`) are computed from the row's number, so that training resumes at
any step, on any number of ranks, with the same tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from jaxtyping import Int32, Int64

from puna.core.errors import PunaError
from puna.tokens.curriculum import Curriculum, plan_weights
from puna.tokens.mixing import Assignment
from puna.tokens.packing import Segment, SourceStream
from puna.tokens.ramp import Ramp, Stair, cut_rows
from puna.tokens.remote import Cache
from puna.tokens.shards import DamagedTokensError, TokenShards

F = TypeVar("F", bound=Callable[..., Any])
OnDamage = Literal["stop", "skip"]
_FACTORY_MARK = "__puna_batch_factory__"
NO_LABEL = -100
"""Label of a position without loss (the ignored index of PyTorch's cross-entropy)."""


@dataclass(frozen=True)
class Batch:
    """Rows to train on.

    Attributes:
        tokens_BT: Inputs.
        labels_BT: The token that follows, -100 where there is no loss.
        doc_ids_BT: Number of the segment inside its row; positions of different segments do not
            see each other; -1 is padding.
        positions_BT: Position inside the segment, from 0.
        sources: Names of all sources of the training, on every rank the same; none when it has
            no sources.
        source_B: Number of each row's source among them.
    """

    tokens_BT: Int64[np.ndarray, "B T"]
    labels_BT: Int64[np.ndarray, "B T"]
    doc_ids_BT: Int32[np.ndarray, "B T"]
    positions_BT: Int32[np.ndarray, "B T"]
    sources: tuple[str, ...] = ()
    source_B: Int64[np.ndarray, " B"] | None = None


@dataclass(frozen=True)
class LeftOut:
    """A document that is not trained on because its tokens are damaged.

    Its places in the rows stay, without labels and unseen by other documents: so all other rows are
    what they would be, and it does not matter when the damage was found.

    Attributes:
        source: Its source.
        document: Its number in the shard.
        document_id: Its id.
        why: Where the damage is.
    """

    source: str
    document: int
    document_id: str
    why: str


class BatchSource(Protocol):
    """Where training takes its batches from."""

    @property
    def n_rows(self) -> int:
        """Rows of the global batch, B."""
        ...

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Return rows [rank*B/world, (rank+1)*B/world) of the global batch of a step."""
        ...

    def lineage(self, step: int) -> list[dict[str, Any]]:
        """Return, per row of the global batch, the documents and token ranges in it."""
        ...


def rank_rows(n_rows: int, rank: int, world: int) -> range:
    """Return the rows of the global batch that a rank takes.

    Raises:
        PunaError: The number of ranks does not divide the batch; names the nearest that do.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    if n_rows % world:
        worlds = [w for w in range(1, n_rows + 1) if n_rows % w == 0]
        near = sorted(sorted(worlds, key=lambda w: abs(w - world))[:2])
        low = n_rows // world * world
        batches = " or ".join(str(n) for n in (low, low + world) if n)
        raise PunaError(
            f"a global batch of {n_rows} rows cannot be divided among {world} ranks",
            f"set the global batch to {batches}, or use {' or '.join(map(str, near))} ranks",
        )
    n_local = n_rows // world
    return range(rank * n_local, (rank + 1) * n_local)


class PackedLoader:
    """Mixes the sources of token shards by weight and packs their documents into rows.

    Args:
        folder: Output of the stage ``tokens.encode``.
        split: ``train`` or ``heldout``.
        weights: Source -> weight on any scale, 0 leaves a source out; None weighs sources by the
            tokens of a pass, repeated documents counted each time.
        seq_len: Tokens of a row, T.
        global_batch: Rows of a step over all ranks, B.
        seed: Decides the order of the documents.
        curriculum: How the weights change over the run, and how often a source may be read.
        on_damage: ``stop`` raises at a document whose tokens are damaged, ``skip`` leaves it out
            (see :class:`LeftOut`).
        cache: Keeps what is downloaded when ``folder`` is a URL.
        stairs: Smaller batches at the beginning of the run.

    Raises:
        PunaError: The shards are damaged, the weights do not fit the sources, or a source would be
            read more often than it may be.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        weights: Mapping[str, float] | None,
        seq_len: int,
        global_batch: int,
        seed: int,
        curriculum: Curriculum | None = None,
        *,
        on_damage: OnDamage = "stop",
        cache: Cache | None = None,
        stairs: Sequence[Stair] = (),
    ) -> None:
        for name, value in (("seq_len", seq_len), ("global_batch", global_batch)):
            if value < 1:
                raise PunaError(f"`{name}` is {value}", f"set `{name}` to 1 or more")
        self.shards = TokenShards(folder, cache)
        self.on_damage, self.cache = on_damage, cache
        self._left_out: dict[tuple[str, int], LeftOut] = {}
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self._weights = None if weights is None else dict(weights)
        self._ramp = Ramp(global_batch, tuple(stairs))
        counts = self.shards.counts(split)
        n_tokens = {name: c.get("n_tokens_read", c["n_tokens"]) for name, c in counts.items()}
        self._curriculum = curriculum or Curriculum()
        self._stretches = plan_weights(
            weights, self._curriculum, n_tokens, f"{folder}/{split}",
            seq_len=seq_len, ramp=self._ramp,
        )  # fmt: skip
        self._assignment = Assignment(self._stretches[0][1], self._stretches[1:])
        self._streams = [
            SourceStream(self.shards.open(split, name, tolerant=on_damage == "skip"), seq_len, seed)
            for name in self._assignment.sources
        ]

    @property
    def n_rows(self) -> int:
        """Rows of the global batch, B; after the ramp."""
        return self._ramp.n_rows

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer that made the shards."""
        return self.shards.vocab_size

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Return a rank's rows of the global batch of a step.

        Args:
            step: Step number, from 0.
            rank: This process, 0..world-1.
            world: Number of processes that share the batch.

        Raises:
            PunaError: ``world`` does not divide the global batch.
        """
        stair = self._ramp.at(step)
        mine = rank_rows(stair.n_rows, rank, world)
        first = self._ramp.rows_before(step) + mine.start
        source_n, row_n = self._assignment.rows(first, len(mine))
        shape = (len(mine), self.seq_len)
        tokens_BT = np.zeros(shape, np.int64)
        labels_BT = np.full(shape, NO_LABEL, np.int64)
        doc_ids_BT = np.empty(shape, np.int32)
        positions_BT = np.empty(shape, np.int32)
        rows = [
            (self._streams[source], list(self._streams[source].segments(int(row))))
            for source, row in zip(source_n, row_n, strict=True)
        ]
        for one in {source: self._streams[source] for source in source_n}.values():
            wanted = (segments for stream, segments in rows if stream is one)
            one.shard.fetch(segment.document for segments in wanted for segment in segments)
        for i, (stream, segments) in enumerate(rows):
            at = 0
            for number, segment in enumerate(segments):
                here = slice(at, at + segment.end - segment.start)
                doc_ids_BT[i, here] = number
                positions_BT[i, here] = np.arange(here.stop - at, dtype=np.int32)
                at = here.stop
                found = self._tokens(stream, segment)
                if found is not None:
                    window, following = found
                    tokens_BT[i, here] = window
                    labels_BT[i, here.start : at - 1] = window[1:]
                    labels_BT[i, at - 1] = NO_LABEL if following is None else following
        names = tuple(self._assignment.sources)
        whole = Batch(
            tokens_BT, labels_BT, doc_ids_BT, positions_BT, names, source_n.astype(np.int64)
        )
        return cut_rows(whole, stair.n_pieces)

    def _tokens(
        self, stream: SourceStream, segment: Segment
    ) -> tuple[np.ndarray, int | None] | None:
        """Return the tokens of a segment; None when its document is left out."""
        source, document = stream.shard.source, segment.document
        if (source, document) in self._left_out:
            return None
        try:
            return stream.tokens(segment)
        except DamagedTokensError as error:
            if self.on_damage == "stop":
                raise
            name = stream.shard.document_id(document)
            self.leave_out([LeftOut(source, document, name, error.message)])
            return None

    def leave_out(self, documents: Iterable[LeftOut]) -> None:
        """Leave documents out from here on: their places are kept, without a label."""
        for one in documents:
            self._left_out.setdefault((one.source, one.document), one)

    @property
    def left_out(self) -> list[LeftOut]:
        """Documents that are left out because their tokens are damaged, as far as is known."""
        return list(self._left_out.values())

    def lineage(self, step: int) -> list[dict[str, Any]]:
        """Return the documents behind each row of the global batch of a step.

        Returns:
            Per row ``{"row", "source", "segments": [{"document_id", "source", "tokens": [start,
            end), "epoch"}]}``; token numbers count from the document's begin token.
        """
        first = self._ramp.rows_before(step)
        source_n, row_n = self._assignment.rows(first, self._ramp.at(step).n_rows)
        rows = []
        for i, (source, row) in enumerate(zip(source_n, row_n, strict=True)):
            stream = self._streams[source]
            name = stream.shard.source
            segments = [
                {
                    "document_id": stream.shard.document_id(segment.document),
                    "source": name,
                    "tokens": [segment.start, segment.end],
                    "epoch": segment.epoch,
                }
                for segment in stream.segments(int(row))
            ]
            rows.append({"row": i, "source": name, "segments": segments})
        return rows

    @property
    def weights(self) -> dict[str, float]:
        """Shares of the sources at the start."""
        return self.weights_at(0)

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the shares of the sources at a step; a source that is left out has none."""
        firsts = [first for first, _ in self._stretches]
        at = bisect.bisect_right(firsts, self._ramp.rows_before(step)) - 1
        return {name: float(share) for name, share in self._stretches[at][1].items()}

    def mean_weights(self, n_steps: int) -> dict[str, float]:
        """Return the mean share of each source over the first steps, one at least."""
        n_steps = max(n_steps, 1)
        n_rows = self._ramp.rows_before(n_steps)
        return {source: n / n_rows for source, n in self.planned_rows(n_steps).items()}

    def planned_rows(self, step: int) -> dict[str, float]:
        """Return how many rows of each source the shares of the first ``step`` steps mean."""
        n_rows = self._ramp.rows_before(step)
        ends = [*(first for first, _ in self._stretches[1:]), n_rows]
        totals = dict.fromkeys(self._assignment.sources, 0.0)
        for (first, shares), end in zip(self._stretches, ends, strict=True):
            for source, share in shares.items():
                totals[source] += max(0, min(end, n_rows) - first) * float(share)
        return totals

    def rows_per_source(self, step: int) -> dict[str, int]:
        """Return how many rows of each source the first ``step`` steps hold."""
        counts = self._assignment.counts(self._ramp.rows_before(step))
        return {s.shard.source: int(n) for s, n in zip(self._streams, counts, strict=True)}

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often the first ``step`` steps have passed over each source."""
        rows = self.rows_per_source(step)
        return {s.shard.source: s.epochs(rows[s.shard.source]) for s in self._streams}

    def spec(self) -> dict[str, Any]:
        """Return JSON that :func:`puna.tokens.lineage.open_source` turns into this loader again."""
        return {
            "factory": "puna.tokens.loader:packed_loader",
            "kwargs": {
                "folder": self.shards.absolute,
                "split": self.split,
                "weights": self._weights,
                "seq_len": self.seq_len,
                "global_batch": self._ramp.n_rows,
                "seed": self.seed,
                "digest": self.shards.digest,
                "curriculum": self._curriculum.to_json(),
                "on_damage": self.on_damage,
                "cache": None if self.cache is None else self.cache.to_json(),
                "stairs": self._ramp.to_json(),
            },
        }


def batch_factory(function: F) -> F:
    """Mark a function that opens batches, so that a ``loader.json`` may name it.

    The file may come from elsewhere, with the run that it describes: it must not be able to call
    anything else.
    """
    setattr(function, _FACTORY_MARK, True)
    return function


def is_batch_factory(function: object) -> bool:
    """Tell whether a function bears the mark of :func:`batch_factory`."""
    return getattr(function, _FACTORY_MARK, False) is True


@batch_factory
def packed_loader(
    folder: str,
    split: str,
    weights: dict[str, float] | None,
    seq_len: int,
    global_batch: int,
    seed: int,
    digest: str | None = None,
    curriculum: dict[str, Any] | None = None,
    on_damage: OnDamage = "stop",
    cache: dict[str, Any] | None = None,
    stairs: Sequence[Sequence[int]] = (),
) -> PackedLoader:
    """Open a loader from JSON values (the factory of training processes).

    Args:
        folder: Output of the stage ``tokens.encode``.
        split: ``train`` or ``heldout``.
        weights: See :class:`PackedLoader`.
        seq_len: Tokens of a row.
        global_batch: Rows of a step over all ranks.
        seed: Decides the order of the documents.
        digest: Digest of the shards that are expected; None accepts any.
        curriculum: See :meth:`puna.tokens.curriculum.Curriculum.of`; None for weights that stay.
        on_damage: See :class:`PackedLoader`.
        cache: See :meth:`puna.tokens.remote.Cache.of`; for shards in a store.
        stairs: See :meth:`puna.tokens.ramp.Ramp.of`.

    Raises:
        PunaError: The shards are damaged or others than expected.
    """
    loader = PackedLoader(
        folder, split, weights, seq_len, global_batch, seed,
        None if curriculum is None else Curriculum.of(curriculum),
        on_damage=on_damage, cache=None if cache is None else Cache.of(cache),
        stairs=Ramp.of(global_batch, stairs).stairs,
    )  # fmt: skip
    if digest is not None and digest != loader.shards.digest:
        raise PunaError(f"the token shards in {folder} have changed since this run used them",
                        "point to the shards of that run, or run the stage anew")  # fmt: skip
    return loader
