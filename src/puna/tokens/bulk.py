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
        from puna.tokens.kernels.bits import lines_of
        from puna.tokens.kernels.documents import Tables
        from puna.tokens.kernels.merge import SIEVE_WORDS, fill_pairs
        from puna.tokens.kernels.words import learn_tokens, new_words, table_size

        byte_ids = np.zeros(256, np.int64)
        for token, text in enumerate(tokens):
            if len(text) == 1:
                byte_ids[text[0]] = token
        pairs = lines_of(table_size(len(merges)), 2**64 - 1)
        sieve = lines_of(SIEVE_WORDS, 0)
        byte_pairs = np.empty(256 * 256, np.int32)
        lefts, rights, merged = (np.ascontiguousarray(column) for column in merges.T)
        fill_pairs(lefts, rights, merged, pairs, sieve, byte_ids, byte_pairs)
        self._tables = Tables(character_classes(), byte_ids, pairs, sieve, byte_pairs)
        self._words_of_tokens = new_words([len(token) for token in tokens])
        learn_tokens(*_arena(tokens), self._words_of_tokens)
        self._local = threading.local()

    def _words(self) -> Words:
        """Return this thread's table of words; a full one forgets what it has learnt."""
        from puna.tokens.kernels.words import LONG_BYTES, copy_words

        words: Words | None = getattr(self._local, "words", None)
        if words is None:
            words = self._local.words = copy_words(self._words_of_tokens)
        elif (words.left < (1, 1, LONG_BYTES, LONG_BYTES)).any():
            for mine, initial in zip(words, self._words_of_tokens, strict=True):
                mine[:] = initial
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
        from puna.tokens.kernels.documents import NO_ID, SLACK_IDS, encode_documents

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
