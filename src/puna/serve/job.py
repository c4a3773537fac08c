"""One HTTP request that the engine works on: its choices, its end, and whoever waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Literal

from puna.serve.choice import Choice
from puna.serve.errors import ApiError

CancelReason = Literal["disconnect", "timeout", "slow", "shutdown", "error"]


class Job:
    """The choices of one response; belongs to the event loop.

    Args:
        choices: Not begun yet.
        n_prompt_tokens: Of all prompts, each counted once.
        is_streaming: The reader takes the text while it grows.

    Attributes:
        error: Why the job failed, if it did.
        is_accepted: Whether the engine holds every choice.
        is_disconnected: Whether nobody reads any more.
        first_s: When the first token came, by the monotonic clock.
    """

    def __init__(self, choices: Sequence[Choice], n_prompt_tokens: int, is_streaming: bool) -> None:
        self.choices = list(choices)
        self.n_prompt_tokens, self.is_streaming = n_prompt_tokens, is_streaming
        self.error: ApiError | None = None
        self.is_accepted = self.is_disconnected = False
        self.start_s = time.monotonic()
        self.first_s: float | None = None
        self.n_accepted = 0
        self._news = asyncio.Event()

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return (
            self.error is not None
            or self.is_disconnected
            or all(choice.finish_reason is not None for choice in self.choices)
        )

    @property
    def n_tokens(self) -> int:
        """Generated tokens of all choices."""
        return sum(choice.n_tokens for choice in self.choices)

    @property
    def n_waiting(self) -> int:
        """Size of what was not read yet."""
        return sum(choice.n_waiting for choice in self.choices)

    def wake(self) -> None:
        """Tell the reader that something came."""
        self._news.set()

    async def wait(self) -> None:
        """Wait until something came since the last call."""
        await self._news.wait()
        self._news.clear()
