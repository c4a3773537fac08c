"""Token shards as Megatron-LM's token files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puna.core.errors import PunaError
from puna.tokens.import_stage import SEQUENCES_FILE
from puna.tokens.megatron import megatron_dtype, write_megatron
from puna.tokens.shards import SourceShard, TokenShards

_BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Exported:
    """One pair of files that was written.

    Attributes:
        prefix: Path without ``.bin`` and ``.idx``.
        n_docs: Documents, copies counted.
        n_tokens: Tokens.
        dtype: Their type.
    """

    prefix: Path
    n_docs: int
    n_tokens: int
    dtype: str


def export_megatron(
    folder: Path, out: Path, splits: list[str] | None = None, dtype: str | None = None
) -> Iterator[Exported]:
    """Write ``out/SOURCE-SPLIT.bin`` and ``.idx`` for each source that has documents.

    A document that a pass reads several times stands there as often, its copies one after the
    other. Shards that were imported get the files back that they came from, bit by bit.

    Args:
        folder: Token shards.
        out: Folder for the files; made when it is not there.
        splits: Only these; all when None.
        dtype: Type of the tokens; None takes that of the files they came from, else Megatron's
            choice for the vocabulary.

    Raises:
        PunaError: The shards are damaged, have no such split, or an id does not fit ``dtype``.
    """
    shards = TokenShards(folder)
    for split in splits or shards.splits:
        for source, entry in shards.counts(split).items():
            if not entry["n_docs"]:
                continue
            shard = shards.open(split, source)
            given = dtype or entry.get("megatron_dtype")
            kind = megatron_dtype(shards.vocab_size) if given is None else np.dtype(given)
            out.mkdir(parents=True, exist_ok=True)
            prefix = out / f"{source}-{split}"
            sequences = Path(shard.folder) / SEQUENCES_FILE
            if SEQUENCES_FILE in entry.get("files", {}):
                lengths, owner = _load(sequences)
                firsts = np.searchsorted(owner, np.arange(shard.n_docs + 1))
                write_megatron(prefix, kind, _blocks(shard), lengths, firsts)
            else:
                lengths = np.diff(shard.offsets)
                if shard.repeats is not None:
                    lengths = np.repeat(lengths, shard.repeats)
                write_megatron(prefix, kind, _blocks(shard), lengths)
            yield Exported(prefix, len(lengths), int(lengths.sum()), kind.name)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PunaError(f"{path} is damaged: {error}", "import the files again") from error


def _blocks(shard: SourceShard) -> Iterator[np.ndarray]:
    if shard.repeats is None:
        for start in range(0, shard.n_tokens, _BLOCK_TOKENS):
            yield shard.read(start, min(start + _BLOCK_TOKENS, shard.n_tokens))
        return
    for number, copies in enumerate(shard.repeats.tolist()):
        for _ in range(copies):
            yield shard.document(number)
