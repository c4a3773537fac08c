"""Tokens: how many each source gave, and in which shares training read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from puna.core.artifact import Artifact
from puna.tokens.curriculum import Curriculum
from puna.tokens.loader import PackedLoader
from puna.tokens.shards import INDEX_FILE
from puna.train.config import PretrainConfig


def tokens_section(inputs: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """Read the counts of ``tokens.encode`` and the mix that training made of them.

    Returns:
        ``{"vocab_size", "splits", "sources": {source: {split: {...}, ...}}, "mix": [...]}``; None
        without the stage ``tokens.encode``.
    """
    encoded = inputs.get("tokens")
    if encoded is None:
        return None
    index = encoded.read_json(INDEX_FILE)
    splits: dict[str, dict[str, Any]] = index["splits"]
    sources: dict[str, dict[str, Any]] = {}
    for split, counts in splits.items():
        for source, row in counts.items():
            one = sources.setdefault(source, {"splits": {}})
            one["splits"][split] = {key: row[key] for key in ("n_docs", "n_tokens", "n_bytes")}
    for one in sources.values():
        n_tokens = sum(row["n_tokens"] for row in one["splits"].values())
        n_bytes = sum(row["n_bytes"] for row in one["splits"].values())
        one |= {
            "n_docs": sum(row["n_docs"] for row in one["splits"].values()),
            "n_tokens": n_tokens,
            "n_bytes": n_bytes,
            "bytes_per_token": n_bytes / n_tokens if n_tokens else None,
        }
    n_tokens = sum(one["n_tokens"] for one in sources.values())
    n_bytes = sum(one["n_bytes"] for one in sources.values())
    return {
        "vocab_size": index["vocab_size"],
        "dtype": index["dtype"],
        "splits": {
            split: {
                key: sum(row[key] for row in counts.values())
                for key in ("n_docs", "n_tokens", "n_bytes")
            }
            for split, counts in splits.items()
        },
        "sources": dict(sorted(sources.items(), key=lambda item: -item[1]["n_tokens"])),
        "n_docs": sum(one["n_docs"] for one in sources.values()),
        "n_bytes": n_bytes,
        "n_tokens": n_tokens,
        "bytes_per_token": n_bytes / n_tokens if n_tokens else None,
        "mix": _mix(encoded, inputs.get("pretrain")),
    }


def _mix(encoded: Artifact, pretrain: Artifact | None) -> list[dict[str, Any]] | None:
    """What training wanted of each source and what it read: asked of the loader that it used."""
    if pretrain is None:
        return None
    config = PretrainConfig.model_validate(pretrain.config)
    if config.shards:
        return None  # in a store; a report does not wait for one
    weights, curriculum = config.weights or None, config.curriculum
    if config.mix:  # as it was read when the training began
        made = json.loads(pretrain.file("loader.json").read_text(encoding="utf-8"))["kwargs"]
        weights, curriculum = made["weights"], Curriculum.of(made["curriculum"])
    loader = PackedLoader(
        encoded.path, "train", weights, config.seq_len, config.global_batch, config.seed,
        curriculum, stairs=config.ramp.stairs,
    )  # fmt: skip
    wanted = loader.mean_weights(config.n_steps)
    rows = loader.rows_per_source(config.n_steps)
    epochs = loader.epochs(config.n_steps)
    n_rows = sum(rows.values())
    counts = loader.shards.counts("train")
    return [
        {
            "source": source,
            "wanted": wanted[source],
            "read": rows[source] / n_rows,
            "n_tokens": counts[source]["n_tokens"],
            "read_tokens": rows[source] * config.seq_len,
            "epochs": epochs[source],
        }
        for source in sorted(wanted, key=lambda source: (-wanted[source], source))
    ]
