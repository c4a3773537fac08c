"""Encoding in bulk by the library fastokens, where it is installed.

It is the fastest exact encoder of Llama 3's kind that we know of: where words are new, half as fast
again as our own compiled path. Special tokens are not told to it, so no text can name one, and long
texts are cut before, as Llama 3's tokenizer cuts them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, UInt32

from puna.tokens.pretokens import MAX_RUN_CHARS, split_huge

if TYPE_CHECKING:
    from puna.data.kernels.buffers import Texts

PACKAGE = "fastokens"
_THREADS_ENV = "RAYON_NUM_THREADS"


class LibraryEncoder:
    """Encodes documents given as one block of UTF-8, without special tokens.

    Args:
        definition: Content of a ``tokenizer.json`` of Llama 3's kind, see
            :func:`puna.tokens.bulk.bulk_encoder`.
    """

    def __init__(self, definition: Mapping[str, Any]) -> None:
        import fastokens

        parts = {key: definition.get(key) for key in ("model", "pre_tokenizer")}
        self._engine = fastokens.Tokenizer.from_json_str(
            json.dumps({"version": "1.0", "added_tokens": [], "normalizer": None, **parts,
                        "post_processor": None, "decoder": None})
        )  # fmt: skip
        with _one_thread():  # it starts its threads at its first batch
            self._engine.encode_batch_flat(["a", "b"])

    def encode(
        self, texts: Texts, bos: int | None = None, eos: int | None = None
    ) -> tuple[UInt32[np.ndarray, " n_tokens"], Int64[np.ndarray, " n_docs"]]:
        """Encode documents; as :meth:`puna.tokens.bulk.BulkEncoder.encode`."""
        n_docs = len(texts)
        parts, n_parts_N = _parts(texts)
        flat, bounds = self._engine.encode_batch_flat(parts)
        ids = np.frombuffer(flat, np.uint32)
        bounds_P = np.frombuffer(bounds, np.uint64).astype(np.int64)
        ends_N = bounds_P[n_parts_N.cumsum()]
        lengths_N = np.diff(ends_N, prepend=0)
        n_around = (bos is not None) + (eos is not None)
        if not n_around:
            return ids, lengths_N
        out = np.empty(len(ids) + n_around * n_docs, np.uint32)
        is_text = np.ones(len(out), np.bool_)
        lasts_N = ends_N + n_around * np.arange(1, n_docs + 1) - 1
        for id_, places_N in ((bos, lasts_N + 1 - lengths_N - n_around), (eos, lasts_N)):
            if id_ is not None:
                out[places_N], is_text[places_N] = id_, False
        out[is_text] = ids
        return out, lengths_N + n_around


def _parts(texts: Texts) -> tuple[list[str], Int64[np.ndarray, " n_docs"]]:
    """Return texts, long ones in parts, and the number of parts of each."""
    import pyarrow as pa

    first, end = int(texts.offsets[0]), int(texts.offsets[-1])
    strings: list[str] = pa.LargeStringArray.from_buffers(
        len(texts), pa.py_buffer(np.ascontiguousarray(texts.offsets - first, np.int64)),
        pa.py_buffer(np.ascontiguousarray(texts.data[first:end])),
    ).to_pylist()  # fmt: skip
    n_parts_N = np.ones(len(texts), np.int64)
    if not (np.diff(texts.offsets) > MAX_RUN_CHARS).any():
        return strings, n_parts_N
    parts: list[str] = []
    for number, text in enumerate(strings):
        before = len(parts)
        parts.extend(split_huge(text))
        n_parts_N[number] = len(parts) - before
    return parts, n_parts_N


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let the library start a single thread: shards are shared among processes."""
    before = os.environ.get(_THREADS_ENV)
    os.environ[_THREADS_ENV] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS_ENV]
        else:
            os.environ[_THREADS_ENV] = before
