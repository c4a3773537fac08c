"""Passages: the parts of a document that are embedded, as token ids; what embedders share."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
CHARS_PER_TOKEN = 8
"""Characters of a text that are looked at per token wanted (ours): English has 4 to 5."""


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open ``tokenizer.json`` of a model, without padding and truncation.

    Raises:
        PunaError: It is missing or damaged.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise PunaError(
            f"{path} is missing",
            "save the model with its fast tokenizer (`tokenizer.save_pretrained`)",
        )
    if multiprocessing.parent_process() is not None:
        # one process per core already: threads inside each would only get in each other's way
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise PunaError(f"{path} is damaged ({error})", "copy the model anew") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@dataclass(frozen=True)
class Passages:
    """How documents are cut.

    Attributes:
        n_tokens: Tokens of a passage at most.
        n_passages: Passages at most, from the start of the document; what follows is not looked at.
    """

    n_tokens: int
    n_passages: int

    def cut(
        self, tokenizer: Tokenizer, texts: list[str], *, special: bool
    ) -> tuple[list[list[int]], np.ndarray]:
        """Return the passages of texts, end to end, and the number of each one's text.

        Args:
            tokenizer: Result of :func:`open_tokenizer`.
            texts: The texts.
            special: Give every passage the special tokens of the model (they count).

        Returns:
            Token ids per passage, none empty, and int64 [n_passages].
        """
        reach = self.n_tokens * self.n_passages * CHARS_PER_TOKEN
        n_special = tokenizer.num_special_tokens_to_add(False) if special else 0
        size = max(self.n_tokens - n_special, 1)
        encodings = tokenizer.encode_batch_fast(
            [text[:reach] for text in texts], add_special_tokens=False
        )
        passages: list[list[int]] = []
        owners: list[int] = []
        before, behind = frame(tokenizer) if special else ([], [])
        for number, encoding in enumerate(encodings):
            ids = encoding.ids
            for start in range(0, min(len(ids), size * self.n_passages), size):
                passages.append([*before, *ids[start : start + size], *behind])
                owners.append(number)
        return passages, np.array(owners, np.int64)


def frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and behind a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a").ids
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return rows scaled to unit length (rows of zeros stay): float32 [n, dim]."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def mean_per_text(vectors: np.ndarray, owners: np.ndarray, n_texts: int) -> np.ndarray:
    """Return the unit mean of the passages of each text, zeros without any: float32 [n, dim]."""
    sums = np.zeros((n_texts, vectors.shape[1]), np.float32)
    np.add.at(sums, owners, vectors)
    return unit_rows(sums)
