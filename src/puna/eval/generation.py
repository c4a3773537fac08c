"""Text from a model as it comes, in whole characters, ended by stop tokens or stop texts."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from puna.core.errors import PunaError
from puna.eval.load import Loaded
from puna.model.sampling import Sampling
from puna.tokens.stream import StreamDecoder

StopReason = Literal["stop_token", "stop_text", "length", "context"]
"""Why it ended: a stop token, a stop text, ``max_new_tokens``, or the model's context is full."""


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
        text: Without the stop text.
        n_prompt_tokens: Tokens of the prompt.
        n_tokens: Generated tokens, the stop token not counted.
        stop_reason: Why it ended.
        seconds: Time to the last token, the prompt's included.
    """

    text: str
    n_prompt_tokens: int
    n_tokens: int
    stop_reason: StopReason
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return self.n_tokens / max(self.seconds, 1e-9)


class StopTexts:
    """Holds text back as long as it could be the beginning of a stop text.

    Args:
        stops: Texts that end the generation; empty ones are refused.

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


def stream(
    loaded: Loaded, prompt_ids: Sequence[int], sampling: Sampling, stop: Sequence[str] = ()
) -> Generator[str, None, Completion]:
    """Yield the text that continues a prompt, piece by piece; return the completion.

    Args:
        loaded: Model and tokenizer.
        prompt_ids: The prompt's tokens, begin-of-text included.
        sampling: How to choose tokens.
        stop: Texts that end the generation and are not part of it.

    Raises:
        PunaError: The prompt is empty or longer than the context, or a stop text is empty.
    """
    from puna.model.generate import generate

    start_s = time.monotonic()
    stops, decoder = StopTexts(stop), StreamDecoder(loaded.tokenizer)
    texts: list[str] = []
    n_tokens = 0
    reason: StopReason = "stop_token"
    for token in generate(loaded.model, prompt_ids, sampling, loaded.tokenizer.stop_ids):
        n_tokens += 1
        shown, stopped = stops.push(decoder.push(token))
        if shown:
            texts.append(shown)
            yield shown
        if stopped:
            reason = "stop_text"
            break
    else:
        shown, stopped = stops.push(decoder.flush())
        rest = shown if stopped else shown + stops.flush()
        if rest:
            texts.append(rest)
            yield rest
        if stopped:
            reason = "stop_text"
        elif n_tokens == sampling.max_new_tokens:
            reason = "length"
        elif len(prompt_ids) + n_tokens > loaded.max_seq_len:
            reason = "context"
    seconds = time.monotonic() - start_s
    return Completion("".join(texts), len(prompt_ids), n_tokens, reason, seconds)


def complete(
    loaded: Loaded, prompt_ids: Sequence[int], sampling: Sampling, stop: Sequence[str] = ()
) -> Completion:
    """Generate to the end; arguments and errors of :func:`stream`."""
    pieces = stream(loaded, prompt_ids, sampling, stop)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
