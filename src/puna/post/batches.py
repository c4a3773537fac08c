"""Conversations as training batches: whole conversations packed to rows, loss on the answers only.

Shapes: B rows of a batch, T ``seq_len``.

A conversation of n tokens takes n-1 positions: position t holds token t, its label is token t+1
when that belongs to the assistant (its text and the closing ``<|eot_id|>``), else -100.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int64

from puna.core.fsio import atomic_path
from puna.tokens.loader import NO_LABEL, Batch, batch_factory, rank_rows
from puna.tokens.packing import shuffled
from puna.tokens.rows import Piece, fill_rows, pack_rows

_ARRAYS = ("tokens", "is_assistant", "offsets", "pair_ids", "document_ids", "sources")


class ChatEncoder(Protocol):
    """What is needed of a tokenizer."""

    pad_id: int

    def encode_chat_with_mask(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant says."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of ids."""
        ...


@dataclass(frozen=True)
class Conversations:
    """Tokenised conversations, one after the other.

    Attributes:
        tokens: Ids of all conversations.
        is_assistant: Which tokens are the assistant's.
        offsets: Start of each conversation in ``tokens``, and the end of the last.
        pair_ids: Id of the instruction pair.
        document_ids: Id of the document it was made from.
        sources: Source of that document.
    """

    tokens: Int64[np.ndarray, " n_tokens"]
    is_assistant: Bool[np.ndarray, " n_tokens"]
    offsets: Int64[np.ndarray, " n+1"]
    pair_ids: np.ndarray
    document_ids: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def piece(self, index: int) -> Piece:
        """Return a conversation as inputs and labels, with labels on the assistant's tokens."""
        start, end = self.offsets[index], self.offsets[index + 1]
        targets = self.tokens[start + 1 : end]
        labels = np.where(self.is_assistant[start + 1 : end], targets, NO_LABEL)
        return Piece(self.tokens[start : end - 1], labels)

    def save(self, folder: Path) -> None:
        """Write the arrays as ``.npy`` files (no pickle), each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            with atomic_path(folder / f"{name}.npy") as path, path.open("wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Conversations:
        """Map the arrays of :meth:`save` into memory."""
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in _ARRAYS
        }
        return cls(**arrays)


@dataclass(frozen=True)
class EncodeCounts:
    """How many conversations were encoded or dropped, and why."""

    n_in: int
    n_kept: int
    rejected: dict[str, int]


def encode_pairs(
    pairs: Iterable[dict[str, Any]], tokenizer: ChatEncoder, seq_len: int
) -> tuple[Conversations, EncodeCounts]:
    """Tokenise conversations; those that do not fit into a row are dropped whole, never cut.

    Args:
        pairs: ``{id, document_id, source, messages}``.
        tokenizer: Gives ids and the assistant's mask.
        seq_len: Positions of a row, T.

    Returns:
        The conversations and the counts with reasons ``too_long`` and ``no_answer``.
    """
    ids: list[int] = []
    mask: list[bool] = []
    offsets, kept = [0], []
    rejected: dict[str, int] = {}
    n_in = 0
    for pair in pairs:
        n_in += 1
        tokens, is_assistant = tokenizer.encode_chat_with_mask(pair["messages"])
        reason = None
        if len(tokens) - 1 > seq_len:
            reason = "too_long"
        elif not any(is_assistant):
            reason = "no_answer"
        if reason:
            rejected[reason] = rejected.get(reason, 0) + 1
            continue
        ids += tokens
        mask += is_assistant
        offsets.append(len(ids))
        kept.append(pair)
    conversations = Conversations(
        np.array(ids, dtype=np.int64),
        np.array(mask, dtype=np.bool_),
        np.array(offsets, dtype=np.int64),
        *(np.array([pair[key] for pair in kept], dtype=np.str_)
          for key in ("id", "document_id", "source")),
    )  # fmt: skip
    return conversations, EncodeCounts(n_in, len(kept), rejected)


class SftBatches:
    """Batches of packed conversations, a pure function of the step.

    Every epoch shuffles the conversations with a counter-based generator keyed by (seed, epoch) and
    packs them to rows; the rows of all epochs form one sequence of which step s takes rows
    ``[s*B, (s+1)*B)``.

    Args:
        conversations: At least one.
        seq_len: Positions of a row, T; no conversation is longer.
        global_batch: Rows of a step over all ranks, B.
        seed: Decides the order.
        pad_id: Token that fills the end of rows.
    """

    def __init__(
        self, conversations: Conversations, seq_len: int, global_batch: int, seed: int, pad_id: int
    ) -> None:
        self.conversations = conversations
        self.seq_len, self.pad_id, self._n_rows = seq_len, pad_id, global_batch
        self._lengths = np.diff(conversations.offsets) - 1
        if len(conversations) == 0:
            raise ValueError("no conversations")
        self._epoch = cache(partial(_pack_epoch, self._lengths, seq_len, seed))
        self._first_row = [0]

    @property
    def n_rows(self) -> int:
        """Rows of the global batch, B."""
        return self._n_rows

    def steps_of(self, epochs: int) -> int:
        """Number of steps that see every conversation ``epochs`` times (the last may run over)."""
        return -(-self._start_of(epochs) // self.n_rows)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch (other epochs may pack to one more or less)."""
        return self._start_of(1)

    def fill(self) -> float:
        """Share of the positions of the first epoch's rows that hold tokens."""
        return float(self._lengths.sum() / (self.rows_per_epoch * self.seq_len))

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Return the rows of one rank at one step.

        Raises:
            PunaError: The number of ranks does not divide the batch.
        """
        mine = rank_rows(self._n_rows, rank, world)
        rows = self._rows(step)[mine.start : mine.stop]
        pieces = [[self.conversations.piece(member) for member in members] for _, members in rows]
        return fill_rows(pieces, self.seq_len, self.pad_id)

    def lineage(self, step: int) -> list[dict[str, Any]]:
        """Tell which conversations, and which documents behind them, the rows of a step hold.

        Returns:
            Per row ``{"row", "source", "segments": [{"document_id", "pair_id", "source", "tokens":
            [start, end), "epoch"}]}``; token numbers count inside the conversation.
        """
        data = self.conversations
        rows = []
        for row, (epoch, members) in enumerate(self._rows(step)):
            segments = [
                {
                    "document_id": str(data.document_ids[member]),
                    "pair_id": str(data.pair_ids[member]),
                    "source": str(data.sources[member]),
                    "tokens": [0, int(self._lengths[member]) + 1],
                    "epoch": epoch,
                }
                for member in members
            ]
            sources = sorted({str(data.sources[member]) for member in members})
            rows.append({"row": row, "source": "+".join(sources), "segments": segments})
        return rows

    def members(self, step: int) -> list[list[int]]:
        """Indices of the conversations in each row of the global batch."""
        return [[int(member) for member in members] for _, members in self._rows(step)]

    def _rows(self, step: int) -> list[tuple[int, np.ndarray]]:
        """Epoch and conversations of each row of the global batch."""
        rows: list[tuple[int, np.ndarray]] = []
        first = step * self.n_rows
        epoch = 0
        while self._start_of(epoch + 1) <= first:
            epoch += 1
        while len(rows) < self.n_rows:
            members, offsets = self._epoch(epoch)
            start = first + len(rows) - self._start_of(epoch)
            end = min(start + self.n_rows - len(rows), len(offsets) - 1)
            rows += [(epoch, members[offsets[row] : offsets[row + 1]]) for row in range(start, end)]
            epoch += 1
        return rows

    def _start_of(self, epoch: int) -> int:
        while len(self._first_row) <= epoch:
            _, offsets = self._epoch(len(self._first_row) - 1)
            self._first_row.append(self._first_row[-1] + len(offsets) - 1)
        return self._first_row[epoch]


@batch_factory
def build_source(
    folder: str, seq_len: int, global_batch: int, seed: int, pad_id: int
) -> SftBatches:
    """Build the batches from a folder of saved conversations (the factory of training workers)."""
    return SftBatches(Conversations.load(Path(folder)), seq_len, global_batch, seed, pad_id)


def check_labels(
    batches: SftBatches, messages_of: dict[str, list[dict[str, str]]], tokenizer: ChatEncoder
) -> dict[str, Any]:
    """Decode the labels of the first batch and compare them with the assistants' texts.

    Args:
        batches: The batches that will be trained on.
        messages_of: Pair id -> its messages.
        tokenizer: Decodes the labels.

    Returns:
        Numbers of conversations and labels checked, and the first conversation as an example.

    Raises:
        RuntimeError: Labels are not exactly the assistants' texts, each with its ``<|eot_id|>``.
    """
    batch = batches.batch(0, 0, 1)
    n_checked, example = 0, None
    for row, members in enumerate(batches.members(0)):
        for segment, member in enumerate(members):
            labels = batch.labels_BT[row][batch.doc_ids_BT[row] == segment]
            decoded = tokenizer.decode([int(label) for label in labels if label != NO_LABEL])
            pair_id = str(batches.conversations.pair_ids[member])
            said = [turn["content"].strip() for turn in messages_of[pair_id]
                    if turn["role"] == "assistant"]  # fmt: skip
            expected = "".join(f"{text}<|eot_id|>" for text in said)
            if decoded != expected:
                raise RuntimeError(
                    f"pair {pair_id}: the labels decode to {decoded!r}, expected {expected!r}"
                )
            n_checked += 1
            example = example or {"pair_id": pair_id, "labels": decoded}
    n_labels = int((batch.labels_BT != NO_LABEL).sum())
    if n_labels == 0:
        raise RuntimeError("the first batch has no labels")
    return {"n_conversations": n_checked, "n_labels": n_labels, "example": example}


def _pack_epoch(
    lengths: np.ndarray, seq_len: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    order = shuffled(len(lengths), seed, "conversations", epoch)
    members, offsets = pack_rows(lengths[order], seq_len)
    return order[members], offsets
