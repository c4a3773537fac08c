"""Stage ``tokens.import``: token files that another program made, as token shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from pydantic import Field

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.fsio import hash_file, remove_tree, write_json
from puna.core.ledger import Ledger
from puna.core.progress import progress
from puna.core.stage import Artifacts, Metrics, stage
from puna.core.units import format_count

if TYPE_CHECKING:
    from puna.tokens.megatron import MegatronFiles
    from puna.tokens.tokenizer import Tokenizer

SEQUENCES_FILE = "sequences.npy"
"""int64 [2, S]: tokens of each sequence, and its document; only when some document has not one."""


class ImportedSource(Config):
    """Token files of one source."""

    name: str
    """Name of the source, as weights name it."""
    path: str
    """Path without `.bin` and `.idx`."""
    split: Literal["train", "heldout"] = "train"
    """What the documents are for."""


class ImportConfig(Config):
    """Token files of Megatron-LM (`.bin` and `.idx`), to train on like the run's own."""

    tokenizer: str
    """The tokenizer that made them: a model folder, tokenizer.json, tokenizer.model or .gguf."""
    sources: list[ImportedSource] = Field(min_length=1)
    """One entry per pair of files."""


def _state_of_files(cfg: ImportConfig) -> dict[str, Any]:
    """Sizes and times of the files: a change is reported on a rerun."""
    found = {}
    for source in cfg.sources:
        for suffix in (".bin", ".idx"):
            path = Path(source.path + suffix)
            if path.is_file():
                status = path.stat()
                found[str(path)] = [status.st_size, status.st_mtime_ns]
    return found


@stage("tokens.import", external_state=_state_of_files)
def import_tokens(cfg: ImportConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Turn Megatron's token files into token shards, documents in the order of the files.

    Every document keeps its tokens as they are; the loader adds none. The bytes of a document's
    text, which bits per byte need, are counted from its tokens. The tokenizer is copied beside the
    shards.

    Raises:
        PunaError: A file is missing or malformed, an id is not of the tokenizer, or two sources of
            one split have the same name.
    """
    from puna.tokens.megatron import read_megatron
    from puna.tokens.shard_files import write_shard
    from puna.tokens.shards import INDEX_SCHEMA_VERSION, SPLITS, check_source_name, token_dtype
    from puna.tokens.tokenizer import load_tokenizer

    start_s = time.monotonic()
    names = [(source.split, check_source_name(source.name)) for source in cfg.sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PunaError(f"two sources of the split {twice[0]} have the name {twice[1]!r}",
                        "give every source its own name")  # fmt: skip
    tokenizer = load_tokenizer(Path(cfg.tokenizer))
    opened = [read_megatron(Path(source.path)) for source in cfg.sources]
    dtype = token_dtype(tokenizer.vocab_size)
    widths = _widths(tokenizer)
    index: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    total = sum(files.n_tokens for files in opened)
    with progress("tokens.import", total=total, unit="tokens") as bar:
        for source, files in zip(cfg.sources, opened, strict=True):
            folder = out / source.split / source.name
            remove_tree(folder)
            lengths = files.document_lengths
            n_bytes = np.zeros(len(lengths), np.int64)
            blocks = _blocks(files, widths, lengths, n_bytes, dtype, bar.advance)
            entry = write_shard(folder, blocks, lengths, _ids(source.name, len(lengths)), n_bytes)
            if not files.is_plain:
                owner = np.repeat(np.arange(files.n_docs), np.diff(files.documents))
                np.save(folder / SEQUENCES_FILE, np.stack([files.lengths.astype(np.int64), owner]))
                entry["files"][SEQUENCES_FILE] = hash_file(folder / SEQUENCES_FILE)
            index[source.split][source.name] = entry | {"megatron_dtype": files.dtype.name}
    for split in SPLITS:  # every split knows every source, as those of tokens.encode do
        for _, name in names:
            if name not in index[split]:
                none = np.empty(0, np.int64)
                remove_tree(out / split / name)
                index[split][name] = write_shard(
                    out / split / name, [], none, np.empty(0, "S32"), none
                )
    write_json(
        out / "index.json",
        {
            "schema_version": INDEX_SCHEMA_VERSION,
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "tokenizer_digest": tokenizer.digest,
            "splits": index,
        },
    )
    tokenizer.save(out)
    n_docs = sum(files.n_docs for files in opened)
    return {
        "docs": n_docs,
        "tokens": total,
        "seconds": time.monotonic() - start_s,
        "vocab_size": tokenizer.vocab_size,
        "headline": f"{format_count(total)} tokens, {format_count(n_docs)} documents",
    }


def _widths(tokenizer: Tokenizer) -> np.ndarray:
    """Return the UTF-8 bytes of each token's text; special tokens have none."""
    return np.array(
        [
            0 if tokenizer.is_special(id_) else len(tokenizer.piece(id_))
            for id_ in range(tokenizer.vocab_size)
        ],
        np.int64,
    )


def _ids(source: str, n_docs: int) -> np.ndarray:
    """Make ids that ascend in the order of the files."""
    mark = xxhash.xxh3_64_hexdigest(source.encode())[:12]
    return np.array([f"{mark}-{number:019d}" for number in range(n_docs)], "S32")


def _blocks(
    files: MegatronFiles,
    widths: np.ndarray,
    lengths: np.ndarray,
    n_bytes: np.ndarray,
    dtype: np.dtype[Any],
    advance: Callable[[float], None],
) -> Iterator[np.ndarray]:
    """Yield the tokens as they are stored; add up the bytes of each document in ``n_bytes``."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    at = 0
    for block in files.blocks():
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= len(widths):
            wrong = int(np.argmax((block < 0) | (block >= len(widths))))
            document = int(np.searchsorted(offsets, at + wrong, side="right")) - 1
            raise PunaError(
                f"{files.bin_path}: document {document} has the id {int(block[wrong])}, the "
                f"tokenizer has 0 to {len(widths) - 1}",
                "give the tokenizer that these files were made with",
            )
        first = int(np.searchsorted(offsets, at, side="right")) - 1
        last = int(np.searchsorted(offsets, at + len(block), side="left"))
        sums = np.concatenate([[0], np.cumsum(widths[block])])
        edges = np.clip(offsets[first : last + 1] - at, 0, len(block))
        n_bytes[first:last] += np.diff(sums[edges])
        yield block.astype(dtype)
        advance(len(block))
        at += len(block)
