"""Encoding in bulk: the compiled path where a tokenizer is of Llama 3's kind."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, UInt8, UInt32

from puna.tokens.pretokens import byte_alphabet, is_llama3_pattern

if TYPE_CHECKING:
    from puna.data.kernels.buffers import Texts
    from puna.tokens.kernels.words import Words

_CLASSIFIED = 0x40000
"""Code points with a class of their own; planes 4 to 16 hold no letters, numbers or spaces."""
_CLASS_BLOCK = 4096


class BulkEncoder:
    """Encodes documents given as one block of UTF-8, without special tokens.

    Several threads may encode at once: each has its own table of words.

    Args:
        tokens: Bytes of each token, by id.
        merges: Left id, right id, merged id.
    """

    def __init__(self, tokens: Sequence[bytes], merges: Int64[np.ndarray, "n 3"]) -> None:
        from puna.tokens.kernels.documents import Tables
        from puna.tokens.kernels.merge import NO_ID, fill_pairs, fill_vocabulary
        from puna.tokens.kernels.words import MAX_LEARNT, MEDIUM_BYTES, SHORT_BYTES, fill_words

        long_ids = [i for i, token in enumerate(tokens) if len(token) > MEDIUM_BYTES]
        long_arena, long_starts = _arena([tokens[i] for i in long_ids])
        slots = np.full(_table_size(len(long_ids)), NO_ID, np.int32)
        fill_vocabulary(long_arena, long_starts, slots)
        byte_ids = np.zeros(256, np.int64)
        for token, text in enumerate(tokens):
            if len(text) == 1:
                byte_ids[text[0]] = token
        pairs = np.full(_table_size(len(merges)), 2**64 - 1, np.uint64)
        byte_pairs = np.empty(256 * 256, np.int32)
        lefts, rights, merged = (np.ascontiguousarray(column) for column in merges.T)
        fill_pairs(lefts, rights, merged, pairs, byte_ids, byte_pairs)
        self._tables = Tables(
            character_classes(),
            byte_ids,
            np.array(long_ids, np.int64),
            long_arena,
            long_starts,
            slots,
            pairs,
            byte_pairs,
        )
        n_short = sum(len(token) <= SHORT_BYTES for token in tokens)
        self._short = np.zeros((_table_size(n_short + MAX_LEARNT), 2), np.uint64)
        n_medium = len(tokens) - n_short + MAX_LEARNT
        self._medium = np.zeros((_table_size(n_medium), 4), np.uint64)
        fill_words(*_arena(tokens), self._short, self._medium)
        self._local = threading.local()

    def _words(self) -> Words:
        """Return this thread's table of words; a full one forgets what it has learnt."""
        from puna.tokens.kernels.words import MAX_LEARNT, MEDIUM_BYTES, Words

        words: Words | None = getattr(self._local, "words", None)
        if words is None:
            ids = np.empty(4 * MAX_LEARNT, np.uint32)
            words = self._local.words = Words(
                self._short.copy(), self._medium.copy(), ids, np.zeros(2, np.int64)
            )
        elif words.used[0] >= MAX_LEARNT or words.used[1] >= len(words.ids) - MEDIUM_BYTES:
            words.short[:], words.medium[:] = self._short, self._medium
            words.used[:] = 0
        return words

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
        from puna.tokens.kernels.bits import padded
        from puna.tokens.kernels.documents import SLACK_IDS, encode_documents
        from puna.tokens.kernels.merge import NO_ID

        first, end = int(texts.offsets[0]), int(texts.offsets[-1])
        n_docs = len(texts)
        out = np.empty(end - first + 2 * n_docs + SLACK_IDS, np.uint32)
        lengths = np.empty(n_docs, np.int64)
        n_out = encode_documents(
            padded(texts.data[first:end]), texts.offsets - first,
            NO_ID if bos is None else bos, NO_ID if eos is None else eos,
            self._tables, self._words(), out, lengths,
        )  # fmt: skip
        return out[:n_out], lengths


def bulk_encoder(definition: Mapping[str, Any]) -> BulkEncoder | None:
    """Make the compiled encoder of a tokenizer, when it is of Llama 3's kind.

    That is: byte-level BPE over all 256 bytes with Llama 3's pattern, no normalisation, whole
    pieces looked up before merging, and merges in the order of the ids they make.

    Args:
        definition: Content of a ``tokenizer.json``.

    Returns:
        The encoder, or None when the tokenizer is of another kind.
    """
    from puna.tokens.kernels.merge import MAX_ID

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
    texts = sorted(vocab, key=vocab.__getitem__)
    if not set().union(*texts) <= alphabet.keys() <= vocab.keys():
        return None
    if vocab[texts[-1]] != len(vocab) - 1 or len(vocab) > MAX_ID:
        return None
    table = {ord(char): byte for char, byte in alphabet.items()}
    tokens = [text.translate(table).encode("latin-1") for text in texts]
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

    from puna.tokens.kernels.scan import LETTER, NEWLINE, NUMBER, SPACE

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


def _arena(tokens: Sequence[bytes]) -> tuple[UInt8[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Return the bytes of tokens, padded, and where each starts."""
    from puna.tokens.kernels.bits import padded

    data = np.frombuffer(b"".join(tokens), np.uint8)
    return padded(data), np.cumsum([0, *map(len, tokens)], dtype=np.int64)


def _table_size(n_entries: int) -> int:
    """Return a power of two, of which the entries fill two thirds at most."""
    return 1 << max(4, (3 * n_entries // 2).bit_length())
