"""What one worker of ``tokens.encode`` does: a row group of documents to a chunk of tokens.

A chunk is a folder that appears as a whole::

    tokens.bin      ids of its documents in the order of the rows
    documents.npz   ids (S32), group (number in state.json), n_tokens, n_bytes, repeat per document
    state.json      groups ([split, source]) and sums
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from puna.core.errors import PunaError
from puna.core.fsio import commit_dir, remove_tree, write_json
from puna.tokens.documents import Piece
from puna.tokens.shards import SPLITS, TOKENS_FILE, check_source_name, token_dtype
from puna.tokens.tokenizer import Tokenizer, load_tokenizer

WORK_DIR = "work"
STATE_FILE = "state.json"
DOCUMENTS_FILE = "documents.npz"
_MAX_ID_BYTES = 32


@dataclass(frozen=True)
class Unit:
    """One row group to encode.

    Attributes:
        piece: The row group.
        tokenizer: Folder of the tokenizer.
        chunk: Folder that will hold the result.
    """

    piece: Piece
    tokenizer: Path
    chunk: Path


def load_state(unit: Unit) -> dict[str, Any] | None:
    """Return the sums of a chunk that an earlier attempt has finished, else None."""
    path = unit.chunk / STATE_FILE
    if not path.exists():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    return state if "n_reads" in state else None  # a chunk of a version without repetitions


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    if multiprocessing.parent_process() is not None:
        # one process per core already: threads inside each would only get in each other's way
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_tokenizer(folder)


def encode_unit(unit: Unit) -> dict[str, Any]:
    """Encode a row group into its chunk.

    Args:
        unit: What to encode, with what, to where.

    Returns:
        What ``state.json`` holds: ``groups``, ``n_docs``, ``n_tokens``, ``n_bytes``, ``n_reads``,
        ``seconds``.

    Raises:
        PunaError: The file is damaged, or a document has an unknown split or a strange id.
    """
    from puna.data.kernels.buffers import texts_of

    start_s = time.monotonic()
    tokenizer = _tokenizer(unit.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    partial = unit.chunk.with_name(f"{unit.chunk.name}.partial")
    remove_tree(partial)
    partial.mkdir()
    groups: dict[tuple[str, str], int] = {}
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("id", "group", "n_tokens", "n_bytes", "repeat")
    }
    wanted = ("id", "source", "split", "text", *(["repeat"] if unit.piece.has_repeat else []))
    with (partial / TOKENS_FILE).open("wb") as file:
        for batch in unit.piece.batches(wanted):
            texts = texts_of(batch.column("text"))
            ids, n_tokens = tokenizer.encode_documents(texts)
            file.write(ids.astype(dtype).data)
            columns["id"].append(_document_ids(batch.column("id"), unit.piece.path))
            columns["group"].append(_group_numbers(batch, groups, unit.piece.path))
            columns["n_tokens"].append(n_tokens)
            columns["n_bytes"].append(np.diff(texts.offsets))
            columns["repeat"].append(_repeats(batch, unit.piece.path))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    np.savez(partial / DOCUMENTS_FILE, allow_pickle=False, **arrays)
    state = {
        "groups": [list(group) for group in groups],
        "n_docs": len(arrays["id"]),
        "n_tokens": int(arrays["n_tokens"].sum()),
        "n_bytes": int(arrays["n_bytes"].sum()),
        "n_reads": int(arrays["repeat"].sum()),
        "seconds": time.monotonic() - start_s,
    }
    write_json(partial / STATE_FILE, state)
    commit_dir(partial, unit.chunk)
    return state


def _document_ids(column: pa.Array, path: Path) -> np.ndarray:
    ids = [text.encode() for text in column.to_pylist()]
    for document_id in ids:
        if not 0 < len(document_id) <= _MAX_ID_BYTES or not document_id.isascii():
            raise PunaError(f"{path}: document id {document_id!r} is not 1 to 32 ASCII characters",
                            "use ids as data.ingest makes them")  # fmt: skip
    return np.array(ids, dtype=f"S{_MAX_ID_BYTES}")


def _repeats(batch: pa.RecordBatch, path: Path) -> np.ndarray:
    """Return how often each document is read in a pass; once, when there is no such column."""
    if "repeat" not in batch.schema.names:
        return np.ones(batch.num_rows, np.int32)
    repeats = np.array([times or 0 for times in batch.column("repeat").to_pylist()], np.int64)
    splits = batch.column("split").to_pylist()
    for row in np.flatnonzero((repeats < 1) | (repeats > np.iinfo(np.int32).max)):
        raise PunaError(f"{path}: document {batch.column('id')[row].as_py()} has the repetition "
                        f"{batch.column('repeat')[row].as_py()}, not a whole number of at least 1",
                        "run data.compose again")  # fmt: skip
    for row in np.flatnonzero((repeats > 1) & (np.array(splits) == SPLITS[1])):
        raise PunaError(
            f"{path}: document {batch.column('id')[row].as_py()} is held out and has the "
            f"repetition {repeats[row]}",
            "held-out documents are read once; run data.compose again",
        )
    return repeats.astype(np.int32)


def _group_numbers(
    batch: pa.RecordBatch, groups: dict[tuple[str, str], int], path: Path
) -> np.ndarray:
    """Number the (split, source) of each row; new ones are entered in ``groups``."""
    splits, sources = batch.column("split").to_pylist(), batch.column("source").to_pylist()
    for row, group in enumerate(zip(splits, sources, strict=True)):
        if group not in groups:
            split, source = group
            if split not in SPLITS:
                raise PunaError(
                    f"{path}: document {batch.column('id')[row].as_py()} has the split {split!r}",
                    f"a document belongs to {' or '.join(SPLITS)}; run data.split again",
                )
            check_source_name(source)
            groups[group] = len(groups)
    numbers = [groups[group] for group in zip(splits, sources, strict=True)]
    return np.array(numbers, dtype=np.int32)
