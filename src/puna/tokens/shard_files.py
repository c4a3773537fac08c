"""Writing the files of a shard: tokens with their hashes, and what belongs to each document."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int64

from puna.core.fsio import hash_file
from puna.tokens.integrity import BlockHasher
from puna.tokens.shards import (
    BLOCKS_FILE,
    IDS_FILE,
    N_BYTES_FILE,
    OFFSETS_FILE,
    REPEATS_FILE,
    TOKENS_FILE,
)


def write_shard(
    folder: Path,
    blocks: Iterable[np.ndarray],
    n_tokens: Int64[np.ndarray, " docs"],
    ids: np.ndarray,
    n_bytes: Int64[np.ndarray, " docs"],
    repeats: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write the shard of a split and source; return its entry of the index.

    Args:
        folder: New folder.
        blocks: All tokens, document after document, of the type to store.
        n_tokens: Tokens of each document.
        ids: Document ids, S32, ascending.
        n_bytes: UTF-8 bytes of each document; may be filled in while the blocks are taken.
        repeats: How often a pass reads each; None or ones for once.
    """
    folder.mkdir(parents=True)
    offsets = np.concatenate([[0], np.cumsum(n_tokens)]).astype(np.int64)
    np.save(folder / OFFSETS_FILE, offsets, allow_pickle=False)
    np.save(folder / IDS_FILE, ids, allow_pickle=False)
    digest, hasher = xxhash.xxh3_128(), BlockHasher()
    with (folder / TOKENS_FILE).open("wb") as file:
        for block in blocks:
            data = block.tobytes()
            digest.update(data)
            hasher.update(data)
            file.write(data)
    np.save(folder / N_BYTES_FILE, n_bytes.astype(np.int64), allow_pickle=False)
    np.save(folder / BLOCKS_FILE, hasher.finish(), allow_pickle=False)
    entry: dict[str, Any] = {
        "n_docs": len(ids),
        "n_tokens": int(offsets[-1]),
        "n_bytes": int(n_bytes.sum()),
        "xxh3_128": digest.hexdigest(),
    }
    if repeats is not None and (repeats != 1).any():  # else as a shard without repetition
        np.save(folder / REPEATS_FILE, repeats.astype(np.int32), allow_pickle=False)
        entry["n_tokens_read"] = int((n_tokens * repeats.astype(np.int64)).sum())
    entry["files"] = {path.name: hash_file(path) for path in sorted(folder.glob("*.npy"))}
    return entry
