"""A manifest to begin with, from what token shards hold."""

from __future__ import annotations

from collections.abc import Sequence

from puna.core.errors import PunaError
from puna.mix.proxy.corpus import TRAIN, open_shards


def manifest_of(folder: str, n_tokens: float, left_out: Sequence[str] = ()) -> str:
    """Return a manifest as TOML: all sources of the shards with their tokens.

    Args:
        folder: Token shards.
        n_tokens: Tokens of the training that the mix is for.
        left_out: Sources that are not trained on; what they hold out is still measured.

    Raises:
        PunaError: The shards are damaged, or a name is unknown.
    """
    shards = open_shards(folder, [])
    counts = {name: one for name, one in shards.counts(TRAIN).items() if one["n_tokens"]}
    unknown = [name for name in left_out if name not in counts]
    if unknown:
        raise PunaError(f"{folder} has no source {unknown[0]!r}", f"it has {', '.join(counts)}")
    lines = ["[objective]", f"n_tokens = {n_tokens:.6g}"]
    for name, one in counts.items():
        if name in left_out:
            continue
        per_token = one["n_bytes"] / max(one["n_tokens"] - 2 * one["n_docs"], 1)
        lines += [
            "", "[[source]]", f'name = "{name}"', f"unique_tokens = {one['n_tokens']}",
            f"bytes_per_token = {per_token:.3f}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"
