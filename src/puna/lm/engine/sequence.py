"""One request while it runs: its tokens, its cache blocks, what it still needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int32

from puna.core.errors import PunaError
from puna.lm.engine.sample import Sampler
from puna.lm.engine.types import Event, Finish, Request, TokenLogprob
from puna.model.config import LlamaConfig


class Sequence:
    """The tokens of a request, prompt and generated, and how far they are computed.

    Attributes:
        request: Whose.
        ids: All tokens known so far.
        n_computed: How many of them have keys and values in the cache.
        blocks: The cache blocks that hold them.
    """

    def __init__(self, request: Request, config: LlamaConfig) -> None:
        sampling = request.sampling
        self.request = request
        self.ids = list(request.prompt_ids)
        self.n_prompt = len(self.ids)
        self.n_computed = 0
        self.blocks: Int32[np.ndarray, " blocks"] = np.zeros(0, np.int32)
        # The last token needs no place in the cache: nothing follows it.
        self._most_new = min(sampling.max_new_tokens, config.max_seq_len - self.n_prompt + 1)
        self.most_cached = self.n_prompt + self._most_new - 1
        self._vocab_size = config.vocab_size
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            [None] if request.prompt_logprobs else None
        )

    @cached_property
    def sampler(self) -> Sampler:
        """How tokens are chosen; made when the first one is, not while the request waits."""
        return Sampler(self.request.sampling, self.request.prompt_ids, self._vocab_size)

    @property
    def n_pending(self) -> int:
        """Tokens that are known but not computed."""
        return len(self.ids) - self.n_computed

    def add_blocks(self, blocks: list[int]) -> None:
        """Take more cache blocks, to hold the tokens after those that fit already."""
        self.blocks = np.concatenate((self.blocks, np.array(blocks, np.int32)))

    def drop_blocks(self) -> list[int]:
        """Hand over all cache blocks."""
        blocks, self.blocks = self.blocks.tolist(), self.blocks[:0]
        return blocks

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt is computed: one more token per step."""
        return len(self.ids) > self.n_prompt

    @property
    def n_generated(self) -> int:
        """Tokens of the text so far."""
        return len(self.ids) - self.n_prompt

    def accept(self, token: int, logprob: TokenLogprob | None) -> Event:
        """Take the next token and tell what it means for the request."""
        request_id = self.request.request_id
        if token in self.request.stop_ids:
            return Event(request_id, None, None, "stop", self._first_prompt_logprobs())
        prompt_logprobs = self._first_prompt_logprobs()
        self.ids.append(token)
        finish: Finish | None = None
        if self.n_generated == self.request.sampling.max_new_tokens:
            finish = "length"
        elif self.n_generated == self._most_new:
            finish = "context"
        return Event(request_id, token, logprob, finish, prompt_logprobs)

    def _first_prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        return None if self.is_decoding else self.prompt_logprobs


@dataclass(frozen=True)
class Work:
    """The next tokens of a sequence, to be computed in one forward.

    Attributes:
        sequence: Whose.
        n_tokens: How many of its pending tokens.
    """

    sequence: Sequence
    n_tokens: int

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        start = self.sequence.n_computed
        return self.sequence.ids[start : start + self.n_tokens]

    @property
    def is_last(self) -> bool:
        """Whether the next token is chosen after this work."""
        return self.n_tokens == self.sequence.n_pending


def check_request(request: Request, config: LlamaConfig) -> None:
    """Refuse a prompt that the model cannot take.

    Raises:
        PunaError: It is empty, longer than the context, or holds an id outside the vocabulary.
    """
    limit, vocab_size = config.max_seq_len, config.vocab_size
    prompt = request.prompt_ids
    if not prompt:
        raise PunaError("the prompt has no tokens", "begin it with the begin-of-text token")
    if len(prompt) > limit:
        raise PunaError(
            f"the prompt has {len(prompt)} tokens, the model's context is {limit}",
            f"shorten the prompt to at most {limit} tokens",
        )
    unknown = [token for token in prompt if not 0 <= token < vocab_size]
    if unknown:
        raise PunaError(
            f"token id {unknown[0]} of the prompt is outside the model's vocabulary of "
            f"{vocab_size}",
            "use the tokenizer that the model was trained with",
        )
