"""Responses in OpenAI's JSON: whole ones, and streams of server-sent events.

An event of a stream is mostly the same text again, so it is joined from prepared pieces; only what
was generated is encoded. JSON is ASCII here, which holds any text.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted  # what json.dumps(str) calls
from typing import Any

from puna.serve.choice import Choice, Entry, token_text
from puna.serve.job import Job

DONE = b"data: [DONE]\n\n"


class Wire(ABC):
    """Writes the response of one job; the two endpoints differ in the methods below.

    Args:
        job: Whose.
        model: Name of the model.
        fingerprint: Of the server's set-up.
        with_usage: A stream ends with an event of the token counts.
    """

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, job: Job, model: str, fingerprint: str, with_usage: bool) -> None:
        self.job = job
        self._with_usage = with_usage
        head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._head = head
        chunk_head = json.dumps({**head, "object": self.chunk_object}, separators=(",", ":"))
        self._chunk_head = f'data: {chunk_head[:-1]},"choices":['
        self._chunk_tail = '],"usage":null}\n\n' if with_usage else "]}\n\n"

    def whole(self) -> bytes:
        """The body of a response that is not streamed."""
        choices = [self._choice(choice) for choice in self.job.choices]
        body = {
            **self._head, "object": self.whole_object, "choices": choices, "usage": self.usage(),
        }  # fmt: skip
        return json.dumps(body).encode()

    def usage(self) -> dict[str, int]:
        """The token counts."""
        n_prompt, n_new = self.job.n_prompt_tokens, self.job.n_tokens
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
        }

    def opening(self) -> bytes:
        """The events before anything was generated."""
        return b""

    def news(self) -> bytes:
        """The events of what was generated since the last call; the last ones when it is done."""
        parts: list[str] = []
        for choice in self.job.choices:
            if choice.is_told:
                continue
            text, entries = choice.read()
            finish = choice.finish_reason
            if text or entries or finish is not None:
                parts += (self._chunk_head, self._delta(choice, text, entries, finish),
                          self._chunk_tail)  # fmt: skip
            choice.is_told = finish is not None
        return "".join(parts).encode("ascii")

    def ending(self) -> bytes:
        """The events after the last choice."""
        if self.job.error is not None:
            return b"data: " + self.job.error.body + b"\n\n"
        if not self._with_usage:
            return DONE
        return f'{self._chunk_head}],"usage":{json.dumps(self.usage())}}}\n\n'.encode() + DONE

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]:
        """A choice of the whole response."""

    @abstractmethod
    def _delta(
        self, choice: Choice, text: str, entries: Sequence[Entry], finish: str | None
    ) -> str:
        """A choice of an event of a stream, as JSON."""


class CompletionWire(Wire):
    """``/v1/completions``."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text, entries = choice.read()
        return {
            "index": choice.index,
            "text": text,
            "logprobs": _completion_logprobs(choice, entries),
            "finish_reason": choice.finish_reason,
        }

    def _delta(
        self, choice: Choice, text: str, entries: Sequence[Entry], finish: str | None
    ) -> str:
        logprobs = json.dumps(_completion_logprobs(choice, entries)) if entries else "null"
        reason = "null" if finish is None else f'"{finish}"'
        return (
            f'{{"index":{choice.index},"text":{quoted(text)},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}'
        )


class ChatWire(Wire):
    """``/v1/chat/completions``."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> bytes:
        """Name the role of each choice."""
        return "".join(
            f'{self._chunk_head}{{"index":{choice.index},"delta":{{"role":"assistant",'
            f'"content":""}},"logprobs":null,"finish_reason":null}}{self._chunk_tail}'
            for choice in self.job.choices
        ).encode("ascii")

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text, entries = choice.read()
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _chat_logprobs(choice, entries),
            "finish_reason": choice.finish_reason,
        }

    def _delta(
        self, choice: Choice, text: str, entries: Sequence[Entry], finish: str | None
    ) -> str:
        delta = f'{{"content":{quoted(text)}}}' if text or entries else "{}"
        logprobs = json.dumps(_chat_logprobs(choice, entries)) if entries else "null"
        reason = "null" if finish is None else f'"{finish}"'
        return (
            f'{{"index":{choice.index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}'
        )


def _completion_logprobs(choice: Choice, entries: Sequence[Entry]) -> dict[str, Any] | None:
    if choice.request.logprobs is None:
        return None
    top = [
        None
        if entry.logprob is None
        else {token_text(data): value for data, value in (*entry.top, (entry.data, entry.logprob))}
        for entry in entries
    ]
    return {
        "tokens": [token_text(entry.data) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": top if choice.request.logprobs else None,
        "text_offset": [entry.offset for entry in entries],
    }


def _chat_logprobs(choice: Choice, entries: Sequence[Entry]) -> dict[str, Any] | None:
    if choice.request.logprobs is None:
        return None
    content = [
        {
            **_named(entry.data, entry.logprob),
            "top_logprobs": [_named(data, value) for data, value in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _named(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token_text(data), "bytes": list(data), "logprob": logprob}
