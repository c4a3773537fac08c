"""Token ids that the activation probe runs when the caller gives none; imports no torch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from puna.tokens.tokenizer import Tokenizer

ROW_TOKENS = 64
RANDOM_ROWS = 2
_TEXTS = (
    "The llama is a domesticated South American camelid. Its wool is soft and holds little "
    "lanolin; a caravan of llamas can carry a third of its own weight over the high passes, and "
    "since the time of the Inca Empire people have bred it for its wool, its meat and its back.",
    "def prime_numbers(limit: int) -> list[int]:\n    sieve = [True] * (limit + 1)\n"
    "    for n in range(2, int(limit ** 0.5) + 1):\n        if sieve[n]:\n"
    "            sieve[n * n :: n] = [False] * len(range(n * n, limit + 1, n))\n"
    "    return [n for n, prime in enumerate(sieve) if prime and n > 1]\n",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987; 3.14159 26535 89793 23846; "
    "2024-04-18T09:30:00Z; $1,234.56; 0xDEADBEEF; https://example.org/a/b?c=d#e",
    "Das Lama trägt Lasten über den Pass. Le lama porte sa laine. Ламы живут в Андах. "
    "ラマはアンデス山脈に住んでいます。 羊驼和骆马是近亲。 اللاما حيوان أليف 🦙🦙🦙",
    "\n\n\n    \t\t.......,,,,,,,,!!!!!!!! the the the the the the the the 000000000000 ||||||||",
)
_CHAT = (
    {"role": "system", "content": "You are a careful assistant."},
    {"role": "user", "content": "Why is the sky blue? Answer in one sentence."},
    {"role": "assistant", "content": "Air scatters short wavelengths of sunlight more than long."},
)


def text_rows(tokenizer: Tokenizer, max_tokens: int, vocab_size: int) -> list[list[int]]:
    """Return texts of several kinds and a conversation as ids, each begun by the begin id.

    The begin id matters: the largest activations of trained models sit on the first token (Sun et
    al. 2024, "Massive Activations in Large Language Models").

    Args:
        tokenizer: Of the model.
        max_tokens: Longest row.
        vocab_size: Rows of the embedding; ids from there on are left out.
    """
    rows = [tokenizer.encode(text, bos=True) for text in _TEXTS]
    with contextlib.suppress(PunaError):  # a tokenizer without a chat format
        rows.append(tokenizer.encode_chat(_CHAT))
    kept = [[id_ for id_ in row if id_ < vocab_size] for row in rows]
    return [row[: min(max_tokens, ROW_TOKENS)] for row in kept]


def random_rows(vocab_size: int, max_tokens: int, bos_id: int | None) -> list[list[int]]:
    """Return pseudo-random ids, the same in every call: rare tokens, in no sensible order.

    Args:
        vocab_size: Rows of the embedding.
        max_tokens: Longest row.
        bos_id: Begins every second row, when it is known and has a row of the embedding.
    """
    import numpy as np

    n_tokens = min(max_tokens, ROW_TOKENS)
    ids = np.random.default_rng(0).integers(0, vocab_size, (RANDOM_ROWS, n_tokens)).tolist()
    if bos_id is not None and bos_id < vocab_size:
        for row in ids[::2]:
            row[0] = bos_id
    return ids
