"""Stage ``tokens.train``: a byte-level BPE tokenizer from the curated training documents."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from puna.core.config import Config, Seed
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.progress import Bar, progress, say
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import CORPUS_STAGES
from puna.tokens.special import LLAMA3_SPECIAL, MIN_SPECIAL

if TYPE_CHECKING:
    from puna.tokens.documents import Piece
    from puna.tokens.tokenizer import Tokenizer

_SAMPLE_BYTES = 1 << 20
_BATCH_TEXTS = 256


class TokenizerTrainingConfig(Config):
    """A BPE tokenizer with Llama 3's pre-tokenisation and special tokens."""

    vocab_size: int = Field(default=16_384, gt=256 + MIN_SPECIAL)
    """Number of ids, the special tokens included."""
    n_special: int = Field(default=LLAMA3_SPECIAL, ge=MIN_SPECIAL)
    """Special tokens, in Llama 3.1's layout after the ordinary ones; Llama 3 has 256."""
    min_frequency: int = Field(default=2, ge=1)
    """A pair of tokens must occur this often to become a token."""
    max_bytes: int = Field(default=1_000_000_000, ge=1)
    """Most text to train on, repeated documents counted each time; from a larger corpus a random
    sample of documents is taken."""
    seed: Seed = 0
    """Decides which documents are taken when the corpus is larger than `max_bytes`."""

    @model_validator(mode="after")
    def _room_for_merges(self) -> TokenizerTrainingConfig:
        if self.vocab_size <= 256 + self.n_special:
            raise ValueError(
                f"vocab_size {self.vocab_size} leaves no room for merges beside 256 bytes and "
                f"{self.n_special} special tokens"
            )
        return self


@stage("tokens.train", needs={"documents": "|".join(CORPUS_STAGES)})
def train_tokenizer(
    cfg: TokenizerTrainingConfig, inputs: Artifacts, out: Path, events: Ledger
) -> Metrics:
    """Train a BPE tokenizer on the training documents, each as often as training reads it.

    The documents are those of ``data.compose`` where the recipe has it; but with ``tokens.count``,
    which needs a tokenizer before the composition, those of ``data.split``.

    Writes ``tokenizer.json`` and ``tokenizer_config.json``, equal bytes for an equal corpus.

    Raises:
        PunaError: There is no training document, or the corpus is too small for the vocabulary.
    """
    from puna.tokens import bpe
    from puna.tokens.documents import document_pieces
    from puna.tokens.tokenizer import Tokenizer

    start_s = time.monotonic()
    pieces = document_pieces(inputs["documents"].path)
    choice = _choose(pieces, cfg.seed, cfg.max_bytes)
    if not choice.n_docs:
        raise PunaError(f"{inputs['documents'].path} has no document of the split 'train'",
                        "look at the filters before it: `puna data why DOC_ID`")  # fmt: skip
    if choice.n_bytes < choice.corpus_bytes:
        say(f"  trains on {choice.n_docs} documents, {choice.n_bytes / 1e6:.1f} MB of "
            f"{choice.corpus_bytes / 1e6:.1f} MB (`max_bytes`)")  # fmt: skip
    samples: dict[tuple[str, str], list[str]] = {}
    n_ranks = cfg.vocab_size - cfg.n_special
    with progress("tokens.train", total=choice.n_bytes / 1e6, unit="MB") as bar:
        texts = _texts(pieces, choice, samples, bar)
        ranks = bpe.train_ranks(texts, n_ranks, cfg.min_frequency)
    bpe.check_enough(len(ranks), n_ranks, cfg.n_special, choice.n_bytes)
    tokenizer = Tokenizer(bpe.definition(ranks, cfg.n_special), bpe.tokenizer_config())
    tokenizer.save(out)
    per_token = _bytes_per_token(tokenizer, samples)
    seconds = time.monotonic() - start_s
    return {
        "vocab_size": tokenizer.vocab_size,
        "n_special": cfg.n_special,
        "docs": choice.n_docs,
        "bytes": choice.n_bytes,
        "corpus_bytes": choice.corpus_bytes,
        "bytes_per_token": per_token,
        "digest": tokenizer.digest,
        "seconds": seconds,
        "mb_per_s": choice.n_bytes / 1e6 / max(seconds, 1e-9),
        "headline": f"{tokenizer.vocab_size} ids from {choice.n_bytes / 1e6:.1f} MB of text",
    }


class _Choice:
    """Which documents are trained on: those whose hash is below a limit."""

    def __init__(self, seed: int, limit: int, n_docs: int, n_bytes: int, corpus_bytes: int) -> None:
        self.seed, self.limit = seed, limit
        self.n_docs, self.n_bytes, self.corpus_bytes = n_docs, n_bytes, corpus_bytes

    def takes(self, document_id: str) -> bool:
        return _draw(self.seed, document_id) <= self.limit


def _draw(seed: int, document_id: str) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(f"{seed}\0{document_id}".encode())


def _choose(pieces: list[Piece], seed: int, max_bytes: int) -> _Choice:
    """Draw a number for each document and take the lowest until ``max_bytes`` are reached."""
    import numpy as np

    draws: list[int] = []
    sizes: list[int] = []
    for piece in pieces:
        for document_id, split, times, n_bytes in _rows(piece, "n_bytes"):
            if split == "train":
                draws.append(_draw(seed, document_id))
                sizes.append(n_bytes * times)
    drawn, size_n = np.array(draws, np.uint64), np.array(sizes, np.int64)
    order = np.argsort(drawn, kind="stable")
    total = np.cumsum(size_n[order])
    # at least one document, however long
    n = min(len(order), max(1, int(np.searchsorted(total, max_bytes, side="right"))))
    if n == 0:
        return _Choice(seed, -1, 0, 0, 0)
    return _Choice(seed, int(drawn[order[n - 1]]), n, int(total[n - 1]), int(total[-1]))


def _texts(
    pieces: list[Piece], choice: _Choice, samples: dict[tuple[str, str], list[str]], bar: Bar
) -> Iterator[list[str]]:
    """Yield the chosen texts in lists; keep a sample per source and split on the way."""
    from puna.tokens.pretokens import split_huge

    room: dict[tuple[str, str], int] = {}
    texts: list[str] = []
    for piece in pieces:
        for document_id, split, times, source, text in _rows(piece, "source", "text"):
            key = (source, split)
            if room.setdefault(key, _SAMPLE_BYTES) > 0:
                room[key] -= len(text)
                samples.setdefault(key, []).append(text)
            if split == "train" and choice.takes(document_id):
                bar.advance(len(text.encode()) * times / 1e6)
                texts += [*split_huge(text)] * times
            if len(texts) >= _BATCH_TEXTS:
                yield texts
                texts = []
    yield texts
    bar.advance(0, note="merging")


def _rows(piece: Piece, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Yield id, split, how often training reads the document, and the given columns."""
    repeat = ["repeat"] if piece.has_repeat else []
    for batch in piece.batches(("id", "split", *repeat, *columns)):
        values = [column.to_pylist() for column in batch.columns]
        if not repeat:
            values.insert(2, [1] * batch.num_rows)
        yield from zip(*values, strict=True)


def _bytes_per_token(
    tokenizer: Tokenizer, samples: dict[tuple[str, str], list[str]]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for (source, split), texts in sorted(samples.items()):
        n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        n_bytes = sum(len(text.encode()) for text in texts)
        found.setdefault(source, {})[split] = round(n_bytes / max(n_tokens, 1), 4)
    return found
