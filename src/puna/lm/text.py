"""From token ids to text: whole characters as they come, ended before a stop text; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.core.errors import PunaError
from puna.lm.engine.types import TokenLogprob
from puna.tokens.stream import StreamDecoder
from puna.tokens.tokenizer import Tokenizer

StopReason = Literal["stop_token", "stop_text", "length", "context", "cancelled"]
"""Why a text ended: a stop token, a stop text, ``max_new_tokens``, the model's context is full, or
nobody wanted more."""


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
        text: Without the stop text; it begins with the prompt's text when echo was asked for.
        prompt_ids: The prompt.
        ids: Generated tokens, the stop token not among them; those of a stop text are.
        stop_reason: Why it ended.
        seconds: From the request to the last token.
        logprobs: One per generated token, when asked for.
        prompt_logprobs: One per token of the prompt, the first None; when asked for.
    """

    text: str
    prompt_ids: list[int]
    ids: list[int]
    stop_reason: StopReason
    seconds: float
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def n_tokens(self) -> int:
        """Generated tokens, the stop token not counted."""
        return len(self.ids)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return self.n_tokens / max(self.seconds, 1e-9)


class StopTexts:
    """Holds text back as long as it could be the beginning of a stop text.

    Args:
        stops: Texts that end the generation.

    Raises:
        PunaError: A stop text is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise PunaError("a stop text is empty", "give a text of at least one character")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take more text; return what is free to show, and whether a stop text was reached."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], False

    def flush(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class TextState:
    """The text of one request as its tokens arrive.

    Args:
        tokenizer: Of the model.
        stop: Texts that end the generation and are not part of it.
        skip_special: Leave special tokens out of the text.

    Attributes:
        text: All text that was returned so far.

    Raises:
        PunaError: A stop text is empty.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special: bool = True
    ) -> None:
        self._stops = StopTexts([stop] if isinstance(stop, str) else stop)
        self._decoder = StreamDecoder(tokenizer, skip_special)
        self._parts: list[str] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """All text that was returned so far."""
        return "".join(self._parts)

    def push(self, event_token: int | None, finished: bool) -> tuple[str, bool]:
        """Take an event of the engine.

        Args:
            event_token: Its token, if it brings one.
            finished: Whether it is the last one.

        Returns:
            The text that is free to show now, and whether a stop text was reached: then the caller
            cancels the request, and whatever comes after is ignored.
        """
        if self.is_stopped:
            return "", True
        piece = "" if event_token is None else self._decoder.push(event_token)
        shown, self.is_stopped = self._stops.push(piece)
        if finished and not self.is_stopped:
            rest, self.is_stopped = self._stops.push(self._decoder.flush())
            shown += rest if self.is_stopped else rest + self._stops.flush()
        if shown:
            self._parts.append(shown)
        return shown, self.is_stopped


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
