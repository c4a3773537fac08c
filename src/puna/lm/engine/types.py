"""What goes into the engine and what comes out of it; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from puna.core.errors import PunaError
from puna.model.sampling import Sampling

Finish = Literal["stop", "length", "context", "cancelled", "error"]
"""Why a request ended: a stop id, ``max_new_tokens``, the model's context is full, its caller no
longer wants it, or its logits were not finite."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        request_id: Unique among the requests that the engine holds.
        prompt_ids: At least one id, the begin-of-text id included if the model expects it.
        sampling: How to choose tokens and how many.
        stop_ids: Any of these ends the text and is not part of it.
        logprobs: None for none; n for those of the chosen token and of the n most likely ones. They
            are of the model's own distribution, before penalties, temperature and truncation.
        prompt_logprobs: Also those of the prompt's tokens, with the same n.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was.

    Attributes:
        id: The token.
        logprob: Natural logarithm of its probability.
        top: (id, logprob) of the most likely tokens, the likeliest first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """One step of one request.

    Attributes:
        request_id: Whose.
        token: The next token of the text; None on a last event that brings none (a stop id was
            chosen, or the request was cancelled or failed).
        logprob: Of ``token``, when asked for.
        finish: Not None on the last event of a request.
        prompt_logprobs: On the first event with a token, when asked for: one per token of the
            prompt, the first None.
        error: What went wrong, when ``finish`` is ``error``.
    """

    request_id: str
    token: int | None
    logprob: TokenLogprob | None = None
    finish: Finish | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: PunaError | None = None


@dataclass
class EngineStats:
    """Counts of an engine; may be read from any thread.

    Attributes:
        n_running: Requests that hold cache blocks.
        n_waiting: Requests not admitted yet.
        used_blocks: Cache blocks that hold tokens of running requests.
        reserved_blocks: Cache blocks that running requests may come to need, the used included.
        total_blocks: Most blocks the cache may grow to.
        allocated_blocks: Blocks the cache has memory for now.
        block_tokens: Tokens of a block.
        cache_bytes: Memory of the allocated blocks.
        n_steps_total: Steps that computed something.
        prompt_tokens_total: Prompt tokens computed.
        generated_tokens_total: Tokens generated, stop ids not counted.
        finished_total: Requests that ended, by reason.
    """

    n_running: int = 0
    n_waiting: int = 0
    used_blocks: int = 0
    reserved_blocks: int = 0
    total_blocks: int = 0
    allocated_blocks: int = 0
    block_tokens: int = 0
    cache_bytes: int = 0
    n_steps_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    finished_total: dict[Finish, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("stop", "length", "context", "cancelled", "error"), 0
        )
    )
