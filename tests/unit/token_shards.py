"""Small token shards whose tokens tell where they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from puna.core.fsio import hash_file
from puna.tokens.integrity import BlockHasher
from puna.tokens.loader import PackedLoader

BOS, EOS = 1, 2
SIZES = {"web": [9, 1, 30, 4, 0, 17, 55, 3], "code": [100, 7, 12], "notes": [2, 2, 2, 2, 3]}


def write_shards(
    folder: Path, splits: dict[str, dict[str, list[int]]], vocab: int = 60_000,
    draw: Callable[[str, int], Any] | None = None,
) -> Path:  # fmt: skip
    """Shards whose tokens tell where they come from: no two documents share a token.

    With ``draw`` the tokens of a document are those that it returns for the source and the size.
    """
    index: dict[str, Any] = {"dtype": "uint16", "vocab_size": vocab, "splits": {}}
    token = 3
    for split, sources in splits.items():
        index["splits"][split] = {}
        for source, sizes in sources.items():
            target = folder / split / source
            target.mkdir(parents=True)
            documents = []
            for size in sizes:
                inner = range(token, token + size) if draw is None else draw(source, size)
                documents.append(np.array([BOS, *inner, EOS], np.uint16))
                token += size
            lengths = [len(tokens) for tokens in documents]
            np.concatenate([np.empty(0, np.uint16), *documents]).tofile(target / "tokens.bin")
            np.save(target / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
            ids = [f"{source}-{i:03d}".encode() for i in range(len(sizes))]
            np.save(target / "ids.npy", np.array(ids, "S32"))
            np.save(target / "n_bytes.npy", np.array(sizes, np.int64))
            index["splits"][split][source] = {
                "n_docs": len(sizes), "n_tokens": sum(lengths), "n_bytes": sum(sizes),
            }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def loader(folder: Path, **changes: Any) -> PackedLoader:
    values: dict[str, Any] = {
        "split": "train", "weights": {"web": 2, "code": 1, "notes": 1}, "seq_len": 16,
        "global_batch": 8, "seed": 3,
    }  # fmt: skip
    return PackedLoader(folder, **{**values, **changes})


def arrays(batch: Any) -> tuple[np.ndarray, ...]:
    return (batch.tokens_BT, batch.labels_BT, batch.doc_ids_BT, batch.positions_BT)


def seal(folder: Path) -> Path:
    """Add the hashes that ``tokens.encode`` writes."""
    index = json.loads((folder / "index.json").read_text())
    for split, sources in index["splits"].items():
        for source, entry in sources.items():
            where = folder / split / source
            hasher, data = BlockHasher(), (where / "tokens.bin").read_bytes()
            hasher.update(data)
            np.save(where / "blocks.npy", hasher.finish())
            entry["xxh3_128"] = xxhash.xxh3_128_hexdigest(data)
            entry["files"] = {path.name: hash_file(path) for path in where.glob("*.npy")}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def write_large_shards(folder: Path, n_tokens: int = 10_000_000, seed: int = 0) -> Path:
    """One source of 20 MB in documents of about a thousand random tokens, sealed."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 2000, n_tokens // 1000)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    where = folder / "train" / "web"
    where.mkdir(parents=True)
    rng.integers(3, 60_000, offsets[-1], dtype=np.uint16).tofile(where / "tokens.bin")
    np.save(where / "offsets.npy", offsets)
    np.save(where / "ids.npy", np.array([f"web-{i:06d}" for i in range(len(lengths))], "S32"))
    np.save(where / "n_bytes.npy", lengths.astype(np.int64))
    counts = {"n_docs": len(lengths), "n_tokens": int(offsets[-1]), "n_bytes": int(offsets[-1])}
    index = {"dtype": "uint16", "vocab_size": 60_000, "splits": {"train": {"web": counts}}}
    (folder / "index.json").write_text(json.dumps(index))
    return seal(folder)
