"""Windows of texts: neighbouring sentences, about as long as the examples they are compared with.

A window that begins where a sentence begins holds a paraphrase whole, where one of fixed length
would hold a half of it and something else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SIZES = (16, 32, 64, 128, 256)
"""Tokens of a window (ours); an example is compared with windows of the size nearest to its own."""
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+|(?<=[。！？])")
_PIECE = re.compile(r"\S.{0,399}(?=\s|$)|\S.{0,399}", re.DOTALL)
"""A sentence of more than 400 characters is cut (ours), at a space if it has one."""


def size_class(n_tokens: int) -> int:
    """Return the window size nearest to a number of tokens, by their ratio."""
    return min(SIZES, key=lambda size: (abs(np.log(size / max(n_tokens, 1))), size))


@dataclass(frozen=True)
class Windows:
    """The windows of one text.

    Attributes:
        ids: Token ids of each sentence.
        spans: Characters where each sentence begins and ends, int64 [n_sentences, 2].
        windows: First sentence and the one behind the last, distinct, int64 [n_windows, 2].
        of_size: Size -> which windows are of it.
    """

    ids: list[list[int]]
    spans: np.ndarray
    windows: np.ndarray
    of_size: dict[int, np.ndarray]

    def tokens(self, window: int) -> list[int]:
        """Return the token ids of a window."""
        first, last = self.windows[window]
        return [token for ids in self.ids[first:last] for token in ids]

    def span(self, window: int) -> tuple[int, int]:
        """Return the characters where a window begins and ends."""
        first, last = self.windows[window]
        return int(self.spans[first, 0]), int(self.spans[last - 1, 1])


def sentences(text: str) -> np.ndarray:
    """Return where the sentences of a text begin and end: int64 [n, 2], none of white space."""
    spans, at = [], 0
    for end, behind in [*((m.start(), m.end()) for m in _END.finditer(text)), (len(text),) * 2]:
        spans += [found.span() for found in _PIECE.finditer(text, at, end)]
        at = behind
    return np.array(spans, np.int64).reshape(-1, 2)


def windows_of(tokenizer: Tokenizer, texts: list[str], sizes: list[int]) -> list[Windows]:
    """Cut texts into windows.

    Args:
        tokenizer: Without special tokens, padding and truncation.
        texts: The texts.
        sizes: Sizes that are needed.
    """
    spans = [sentences(text) for text in texts]
    flat = [text[a:b] for text, one in zip(texts, spans, strict=True) for a, b in one.tolist()]
    encoded = tokenizer.encode_batch_fast(flat, add_special_tokens=False)
    found, at = [], 0
    for one in spans:
        ids = [encoding.ids for encoding in encoded[at : at + len(one)]]
        at += len(one)
        found.append(cut_windows(ids, one, sizes))
    return found


def cut_windows(ids: list[list[int]], spans: np.ndarray, sizes: list[int]) -> Windows:
    """Choose the windows of a text: from every sentence on, to the end nearest to each size.

    Args:
        ids: Token ids of the sentences.
        spans: Their places, int64 [n, 2].
        sizes: Sizes that are needed.
    """
    ends = np.cumsum([len(one) for one in ids], dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    firsts = np.arange(len(ids))
    parts: list[np.ndarray] = []
    for size in sizes:
        last = np.minimum(np.searchsorted(ends, starts + size), len(ids) - 1)
        before = np.maximum(last - 1, firsts)
        nearer = np.abs(ends[before] - starts - size) <= np.abs(ends[last] - starts - size)
        nearer &= (ends[before] - starts) * 2 >= size
        last = np.where(nearer, before, last)
        # what is left at the end of a text is part of the windows before it
        enough = ((ends[last] - starts) * 2 >= size) | (firsts == 0)
        enough &= ends[last] > starts
        parts.append(np.stack([firsts[enough], last[enough] + 1], 1))
    every = np.concatenate([np.zeros((0, 2), np.int64), *parts])
    distinct, which = np.unique(every, axis=0, return_inverse=True)
    bounds = np.cumsum([0, *(len(one) for one in parts)])
    of_size = {
        size: which.ravel()[bounds[k] : bounds[k + 1]] for k, size in enumerate(sizes)
    }  # fmt: skip
    return Windows(ids, spans, distinct, of_size)
