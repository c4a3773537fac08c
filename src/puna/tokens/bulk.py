"""Encoding in bulk: the compiled path where a tokenizer is of Llama 3's kind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, UInt8, UInt32

from puna.tokens.pretokens import byte_alphabet, is_llama3_pattern

if TYPE_CHECKING:
    from puna.data.kernels.buffers import Texts

_CLASSIFIED = 0x40000
"""Code points with a class of their own; planes 4 to 16 hold no letters, numbers or spaces."""
_CLASS_BLOCK = 4096


class BulkEncoder:
    """Encodes documents given as one block of UTF-8, without special tokens.

    Args:
        tokens: Bytes of each token, by id.
        merges: Left id, right id, merged id.
    """

    def __init__(self, tokens: Sequence[bytes], merges: Int64[np.ndarray, "n 3"]) -> None:
        from puna.tokens.kernel import NO_ID, fill_pairs, fill_vocabulary

        self._classes = character_classes()
        self._arena = np.frombuffer(b"".join(tokens), np.uint8)
        self._starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        self._slots = np.full(_table_size(len(tokens)), NO_ID, np.int32)
        fill_vocabulary(self._arena, self._starts, self._slots)
        self._keys = np.full(_table_size(len(merges)), 2**64 - 1, np.uint64)
        self._values = np.zeros(len(self._keys), np.int32)
        lefts, rights, merged = (np.ascontiguousarray(column) for column in merges.T)
        fill_pairs(lefts, rights, merged, self._keys, self._values)
        self._byte_ids = np.zeros(256, np.int64)
        for token, text in enumerate(tokens):
            if len(text) == 1:
                self._byte_ids[text[0]] = token

    def encode(
        self, texts: Texts, bos: int | None = None, eos: int | None = None
    ) -> tuple[UInt32[np.ndarray, " n_tokens"], Int64[np.ndarray, " n_docs"]]:
        """Encode documents.

        Args:
            texts: UTF-8 of all documents.
            bos: Id put before each document.
            eos: Id put after each document.

        Returns:
            The ids of all documents and the number of ids of each.
        """
        from puna.tokens.kernel import NO_ID, encode_documents

        data, offsets = texts
        n_docs = len(offsets) - 1
        out = np.empty(int(offsets[-1] - offsets[0]) + 2 * n_docs, np.uint32)
        lengths = np.empty(n_docs, np.int64)
        n_out = encode_documents(
            data, offsets, NO_ID if bos is None else bos, NO_ID if eos is None else eos,
            self._classes, self._byte_ids, self._arena, self._starts, self._slots, self._keys,
            self._values, out, lengths,
        )  # fmt: skip
        return out[:n_out], lengths


def bulk_encoder(definition: dict[str, Any]) -> BulkEncoder | None:
    """Make the compiled encoder of a tokenizer, when it is of Llama 3's kind.

    That is: byte-level BPE over all 256 bytes with Llama 3's pattern, no normalisation, whole
    pieces looked up before merging, and merges in the order of the ids they make.

    Args:
        definition: Content of a ``tokenizer.json``.

    Returns:
        The encoder, or None when the tokenizer is of another kind.
    """
    model = definition.get("model") or {}
    plain = not any(
        model.get(key)
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                    "byte_fallback")
    )  # fmt: skip
    if not (
        plain
        and model.get("type") == "BPE"
        and model.get("ignore_merges")
        and definition.get("normalizer") is None
        and is_llama3_pattern(definition.get("pre_tokenizer") or {})
    ):
        return None
    vocab: dict[str, int] = model["vocab"]
    alphabet = byte_alphabet()
    by_id = sorted(vocab.items(), key=lambda item: item[1])
    if [token for _, token in by_id] != list(
        range(len(vocab))
    ) or not alphabet.keys() <= vocab.keys():
        return None
    if not all(alphabet.keys() >= set(text) for text in vocab):
        return None
    tokens = [bytes(alphabet[char] for char in text) for text, _ in by_id]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = np.array(
        [(vocab[left], vocab[right], vocab[left + right]) for left, right in pairs], np.int64
    ).reshape(-1, 3)
    if (np.diff(merges[:, 2]) < 0).any():
        return None
    return BulkEncoder(tokens, merges)


@cache
def character_classes() -> UInt8[np.ndarray, " n_code_points"]:
    r"""Return the class of each code point: what ``\p{L}``, ``\p{N}`` and ``\s`` match.

    The table is read off the ``tokenizers`` library, so that the compiled path and the library
    follow the same version of Unicode.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    from puna.tokens.kernel import LETTER, NEWLINE, NUMBER, SPACE

    table = np.zeros(_CLASSIFIED, np.uint8)
    for pattern, kind in ((r"\p{L}+", LETTER), (r"\p{N}+", NUMBER), (r"\s+", SPACE)):
        split = Split(Regex(pattern), behavior="removed")
        for first in range(0, _CLASSIFIED, _CLASS_BLOCK):
            block = range(first, first + _CLASS_BLOCK)
            codes = np.array([code for code in block if not 0xD800 <= code < 0xE000], np.int64)
            matched = np.ones(len(codes), np.bool_)
            for _, (start, end) in split.pre_tokenize_str("".join(map(chr, codes))):
                matched[start:end] = False
            table[codes[matched]] = kind
    table[[0x0A, 0x0D]] = NEWLINE
    return table


def _table_size(n_entries: int) -> int:
    return 1 << max(4, (2 * n_entries).bit_length())
