"""One continuation that a client waits for: from the engine's events to text and logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.lm.engine.types import Event, Request, TokenLogprob
from puna.lm.text import TextState
from puna.tokens.stream import StreamDecoder
from puna.tokens.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
_ENTRY_CHARS = 64  # what a token's logprobs count as in the size of what waits


@dataclass(frozen=True)
class Entry:
    """A token with its logprobs, as a client sees it.

    Attributes:
        data: Bytes of the token.
        logprob: None for the first token of a prompt.
        top: Bytes and logprob of the most likely tokens.
        offset: Characters of the choice's text before the token.
    """

    data: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]
    offset: int


def token_text(data: bytes) -> str:
    r"""Return a token's bytes as text; bytes that are no text are spelled ``bytes:\xe2\x82``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Choice:
    """Takes the events of one request of the engine; its reader takes what is ready.

    What is not read yet lies together, so a slow reader gets few large pieces. With logprobs, a
    token is ready when its text is, so those of a stop text never appear.

    Args:
        index: Number among the choices of the response.
        request: Of the engine.
        tokenizer: Of the model.
        stop: Texts that end the choice.
        echo: Text that stands before the generated one.
        is_prompt_only: The generated token is not wanted, only the prompt's logprobs
            (``max_tokens: 0``).

    Attributes:
        finish_reason: Not None when the choice is complete.
        n_tokens: Generated so far.
        n_waiting: Size of what was generated and the reader has not taken yet, in characters.
        token_s: When the last token came, by the monotonic clock.
        is_told: Whether the reader has taken the end.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        echo: str = "",
        is_prompt_only: bool = False,
    ) -> None:
        self.index, self.request = index, request
        self.finish_reason: FinishReason | None = None
        self.n_tokens = 0
        self.n_waiting = 0
        self.token_s: float | None = None
        self.is_told = False
        self._tokenizer = tokenizer
        self._text = TextState(tokenizer, stop)
        self._parts = [echo] if echo else []
        self._n_shown = len(echo)
        self._is_prompt_only = is_prompt_only
        self._with_logprobs = request.logprobs is not None
        self._decoder = StreamDecoder(tokenizer)
        self._n_decoded = len(echo)
        self._ready: list[Entry] = []
        self._held: list[Entry] = []

    def take(self, event: Event) -> bool:
        """Take an event; True when a stop text was reached, so the engine can end the request."""
        if event.prompt_logprobs is not None:
            self._add_prompt(event.prompt_logprobs)
        token = None if self._is_prompt_only else event.token
        if token is not None:
            self.n_tokens += 1
            if self._with_logprobs:
                self._add(token, event.logprob)
        is_last = event.finish is not None
        text, is_stopped = self._text.push(token, is_last)
        if text:
            self._parts.append(text)
            self._n_shown += len(text)
            self.n_waiting += len(text)
        if is_stopped or event.finish == "stop":
            self.finish_reason = "stop"
        elif is_last:
            self.finish_reason = "length"
        if self._is_prompt_only and is_last:
            self.finish_reason = "length"
        if self._with_logprobs:
            self._release(is_stopped)
        return is_stopped

    def read(self) -> tuple[str, list[Entry]]:
        """Return what came since the last call."""
        text = "".join(self._parts)
        self._parts.clear()
        entries, self._ready = self._ready, []
        self.n_waiting = 0
        return text, entries

    def _add(self, token: int, logprob: TokenLogprob | None) -> None:
        self._held.append(self._entry(token, logprob, self._n_decoded))
        self._n_decoded += len(self._decoder.push(token))

    def _release(self, is_stopped: bool) -> None:
        """Make the tokens ready whose text is out; at the end the others go, or are dropped."""
        if self.finish_reason is None or is_stopped:
            n = next(
                (i for i, entry in enumerate(self._held) if entry.offset >= self._n_shown),
                len(self._held),
            )
        else:
            n = len(self._held)
        self._ready += self._held[:n]
        self.n_waiting += n * _ENTRY_CHARS
        del self._held[:n]

    def _add_prompt(self, logprobs: Sequence[TokenLogprob | None]) -> None:
        decoder, n_chars = StreamDecoder(self._tokenizer), 0
        for token, logprob in zip(self.request.prompt_ids, logprobs, strict=True):
            self._ready.append(self._entry(token, logprob, n_chars))
            n_chars += len(decoder.push(token))

    def _entry(self, token: int, logprob: TokenLogprob | None, offset: int) -> Entry:
        piece = self._tokenizer.piece
        if logprob is None:
            return Entry(piece(token), None, (), offset)
        top = tuple((piece(id_), value) for id_, value in logprob.top)
        return Entry(piece(token), logprob.logprob, top, offset)
