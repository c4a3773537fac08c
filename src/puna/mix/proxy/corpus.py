"""The token shards that proxies train on, and the held-out text they are measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.core.errors import PunaError
from puna.core.fsio import hash_json
from puna.mix.proxy.config import ProxyConfig
from puna.tokens.heldout import HELD_OUT, document_sets
from puna.tokens.loader import NO_LABEL, Batch, PackedLoader
from puna.tokens.shards import TokenShards
from puna.tokens.windows import pack_pieces

TRAIN = "train"


def open_shards(folder: str, sources: Sequence[str]) -> TokenShards:
    """Open shards and check that they have the sources of a manifest.

    Raises:
        PunaError: They are damaged, a source has no tokens, or nothing is held out.
    """
    shards = TokenShards(folder)
    known = {name for name, counts in shards.counts(TRAIN).items() if counts["n_tokens"]}
    missing = [name for name in sources if name not in known]
    if missing:
        raise PunaError(
            f"{folder}: source {missing[0]!r} of the manifest has no tokens to train on",
            f"use sources that it has: {', '.join(sorted(known)) or '(none)'}",
        )
    if not targets_of(shards):
        raise PunaError(
            f"{folder} holds no held-out document: nothing can be measured",
            "set heldout_fraction under [data.split] above 0 and encode again",
        )
    return shards


def targets_of(shards: TokenShards) -> dict[str, str]:
    """Return the sources with held-out documents, with digests of what they hold."""
    if HELD_OUT not in shards.splits:
        return {}
    return {
        name: hash_json(counts)
        for name, counts in shards.counts(HELD_OUT).items()
        if counts["n_docs"]
    }


def digest_of(shards: TokenShards, sources: Sequence[str]) -> str:
    """Return the digest of what a mix of some sources is trained on."""
    counts = shards.counts(TRAIN)
    return hash_json({name: counts[name] for name in sorted(sources)})


@dataclass(frozen=True)
class Target:
    """Held-out text of a source, packed to batches of a proxy."""

    name: str
    batches: list[Batch]
    n_bytes: int
    n_tokens: int

    def bits_per_byte(self, nats: float) -> float:
        """Turn a summed cross entropy into bits per byte."""
        return nats / math.log(2) / self.n_bytes


def make_targets(shards: TokenShards, cfg: ProxyConfig) -> list[Target]:
    """Pack the held-out documents that the trainer's evaluation would choose.

    Raises:
        PunaError: Every held-out document of a source is longer than what may be measured.
    """
    held = cfg.heldout
    made = [
        Target(
            one.name,
            [
                _whole(batch, cfg.global_batch)
                for batch in pack_pieces(one.pieces, cfg.seq_len, cfg.global_batch, 0)
            ],
            one.n_bytes, one.n_tokens,
        )
        for one in document_sets(shards, cfg.seq_len, held.overlap, held.max_tokens, held.seed)
    ]  # fmt: skip
    gone = sorted(set(targets_of(shards)) - {one.name for one in made})
    if gone:
        raise PunaError(
            f"{shards.location}: each held-out document of {gone[0]!r} has more than "
            f"{held.max_tokens} tokens",
            "raise max_tokens under [proxy.heldout]",
        )
    return made


def _whole(batch: Batch, n_rows: int) -> Batch:
    """Fill up with rows that have no label."""
    left = n_rows - len(batch.tokens_BT)
    if not left:
        return batch

    def filled(values_BT: np.ndarray, value: int) -> np.ndarray:
        more = np.full((left, values_BT.shape[1]), value, values_BT.dtype)
        return np.concatenate([values_BT, more])

    return Batch(
        filled(batch.tokens_BT, 0), filled(batch.labels_BT, NO_LABEL),
        filled(batch.doc_ids_BT, -1), filled(batch.positions_BT, 0),
    )  # fmt: skip


def make_loader(
    shards: TokenShards, cfg: ProxyConfig, shares: dict[str, float], seed: int
) -> PackedLoader:
    """Open the trainer's loader for a mix; the seed decides the order of the documents.

    After any number of rows each source is off by less than a row from its share.
    """
    every = {name: shares.get(name, 0.0) for name in shards.counts(TRAIN)}
    return PackedLoader(shards.location, TRAIN, every, cfg.seq_len, cfg.global_batch, seed)


def consumed(loader: PackedLoader, n_steps: int) -> dict[str, dict[str, Any]]:
    """Return tokens and passes of each source over the first steps."""
    passes = loader.epochs(n_steps)
    return {
        name: {"tokens": n_rows * loader.seq_len, "epochs": passes[name]}
        for name, n_rows in loader.rows_per_source(n_steps).items()
    }
