"""The two endpoints that generate: from a body to the jobs of the engine to a response."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from starlette.types import Receive, Scope, Send

from puna.core.errors import PunaError
from puna.lm.engine.types import Request
from puna.model.sampling import Sampling
from puna.serve.asgi import ClientLeft, read_body, send_body, start_message
from puna.serve.choice import Choice
from puna.serve.dispatch import Dispatcher
from puna.serve.errors import ApiError, bad_request
from puna.serve.job import Job
from puna.serve.protocol import ABORT
from puna.serve.schema import Body, ChatBody, CompletionBody, parse
from puna.serve.wire import ChatWire, CompletionWire, Wire

if TYPE_CHECKING:
    from puna.lm.language_model import LanguageModel

_INLINE_BYTES = 4096
"""Bodies up to this size are parsed and encoded at once; larger ones beside the event loop."""
_ABORT_AFTER_S = 5.0
"""After a job's time is over, its client has this long to read what is left."""
_SSE_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}

AnyBody = TypeVar("AnyBody", bound=Body)


@dataclass(frozen=True)
class Generation:
    """What the endpoints need to know.

    Attributes:
        model: Name that requests must give.
        fingerprint: Of the set-up, told in responses.
        max_body_bytes: Larger bodies are refused.
        default_max_tokens: Of a chat response that names no limit.
    """

    model: str
    fingerprint: str
    max_body_bytes: int
    default_max_tokens: int


class Endpoint(ABC, Generic[AnyBody]):
    """Answers requests of one kind; an ASGI application.

    Args:
        dispatcher: Runs the jobs.
        settings: What to know.
        encoder: Encodes large prompts.
    """

    body_class: type[AnyBody]
    wire_class: type[Wire]

    def __init__(
        self, dispatcher: Dispatcher, settings: Generation, encoder: ThreadPoolExecutor
    ) -> None:
        self._dispatcher, self.settings, self._encoder = dispatcher, settings, encoder

    @abstractmethod
    def n_choices(self, body: AnyBody) -> int:
        """How many continuations a request asks for."""

    @abstractmethod
    def make_job(self, body: AnyBody, language_model: LanguageModel) -> Job:
        """Encode the prompts and make the choices.

        Raises:
            PunaError: A prompt cannot be encoded.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            ApiError: It is refused, or failed before its response began.
            ClientLeft: Nobody waits for a response.
        """
        dispatcher, settings = self._dispatcher, self.settings
        language_model = dispatcher.language_model
        data = await read_body(scope, receive, settings.max_body_bytes)
        is_large = len(data) > _INLINE_BYTES
        body = await self._apart(is_large, parse, self.body_class, data)
        if body.model != settings.model:
            raise unknown_model(body.model, settings.model)
        n_choices = self.n_choices(body)
        dispatcher.admit(n_choices)
        try:
            job = await self._apart(is_large, self.make_job, body, language_model)
        except BaseException as error:
            dispatcher.release(n_choices)
            if isinstance(error, PunaError):
                raise bad_request(error) from error
            raise
        dispatcher.start(job)
        watcher = asyncio.create_task(self._watch(job, receive))
        abort = scope.get(ABORT, lambda: None)
        limit_s = dispatcher.limits.timeout_s + _ABORT_AFTER_S
        stuck = asyncio.get_running_loop().call_later(limit_s, abort)
        try:
            wire = self._wire(body, job)
            await (_stream(job, wire, send) if body.stream else _answer(job, wire, send))
        except asyncio.CancelledError:
            dispatcher.cancel(job, "shutdown")
            abort()
            await asyncio.sleep(0)  # uvicorn learns that the connection is gone
        finally:
            stuck.cancel()
            watcher.cancel()
            dispatcher.finish(job)

    def _wire(self, body: AnyBody, job: Job) -> Wire:
        options = body.stream_options
        with_usage = options is not None and options.include_usage
        return self.wire_class(job, self.settings.model, self.settings.fingerprint, with_usage)

    async def _apart(self, is_large: bool, function: Callable[..., Any], *arguments: Any) -> Any:
        if not is_large:
            return function(*arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, function, *arguments)

    async def _watch(self, job: Job, receive: Callable[[], Awaitable[Any]]) -> None:
        """End a job as soon as its client has left."""
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            self._dispatcher.cancel(job, "disconnect")


async def _answer(job: Job, wire: Wire, send: Send) -> None:
    while not job.is_done:
        await job.wait()
    if job.is_disconnected:
        raise ClientLeft
    if job.error is not None:
        raise job.error
    await send_body(send, 200, wire.whole())


async def _stream(job: Job, wire: Wire, send: Send) -> None:
    while not (job.is_accepted or job.is_done):
        await job.wait()
    if job.is_disconnected:
        raise ClientLeft
    if job.error is not None:
        raise job.error
    await send(start_message(200, _SSE_HEADERS))
    data = wire.opening()
    while True:
        data += wire.news()
        is_done = job.is_done
        if is_done:
            data += wire.ending()
        if data:
            await send({"type": "http.response.body", "body": data, "more_body": not is_done})
        if is_done or job.is_disconnected:
            return
        data = b""
        await job.wait()


class CompletionEndpoint(Endpoint[CompletionBody]):
    """``POST /v1/completions``."""

    body_class, wire_class = CompletionBody, CompletionWire

    def n_choices(self, body: CompletionBody) -> int:
        """``n`` for each prompt."""
        return body.n * len(body.prompt)

    def make_job(self, body: CompletionBody, language_model: LanguageModel) -> Job:
        """Encode each prompt; the choices of one prompt follow each other."""
        tokenizer = language_model.tokenizer
        choices: list[Choice] = []
        n_prompt_tokens = 0
        sampling = _sampling(body, max(body.max_tokens, 1))
        for prompt in body.prompt:
            ids = language_model.encode_prompt(prompt)
            n_prompt_tokens += len(ids)
            echo = ""
            if body.echo:
                is_text = isinstance(prompt, str)
                echo = prompt if is_text else tokenizer.decode(ids, skip_special=True)
            for _ in range(body.n):
                request = _request(
                    ids, sampling, len(choices), language_model.stop_ids, body.logprobs,
                    body.echo and body.logprobs is not None,
                )  # fmt: skip
                choices.append(
                    Choice(len(choices), request, tokenizer, body.stop, echo, not body.max_tokens)
                )
        return Job(choices, n_prompt_tokens, body.stream)


class ChatEndpoint(Endpoint[ChatBody]):
    """``POST /v1/chat/completions``."""

    body_class, wire_class = ChatBody, ChatWire

    def n_choices(self, body: ChatBody) -> int:
        """``n``."""
        return body.n

    def make_job(self, body: ChatBody, language_model: LanguageModel) -> Job:
        """Encode the conversation in the model's format."""
        tokenizer = language_model.tokenizer
        ids = tokenizer.encode_chat([message.to_message() for message in body.messages])
        max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = _sampling(body, max_tokens or self.settings.default_max_tokens)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        choices = [
            Choice(
                index, _request(ids, sampling, index, language_model.stop_ids, logprobs, False),
                tokenizer, body.stop,
            )
            for index in range(body.n)
        ]  # fmt: skip
        return Job(choices, len(ids), body.stream)


def unknown_model(name: str, known: str) -> ApiError:
    """The error of a request for another model."""
    return ApiError(
        404, f"there is no model {name!r} here, this server has {known!r}", param="model",
        code="model_not_found",
    )  # fmt: skip


def _sampling(body: Body, max_new_tokens: int) -> Sampling:
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    return Sampling(
        temperature=body.temperature, top_p=body.top_p, top_k=max(body.top_k, 0), min_p=body.min_p,
        repetition_penalty=body.repetition_penalty, presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty, seed=seed, max_new_tokens=max_new_tokens,
    )  # fmt: skip


def _request(
    ids: Sequence[int],
    sampling: Sampling,
    number: int,
    stop_ids: frozenset[int],
    logprobs: int | None,
    prompt_logprobs: bool,
) -> Request:
    """Return the request of choice ``number``, which draws with a seed of its own."""
    seed = (sampling.seed + number) % 2**63
    own = sampling.model_copy(update={"seed": seed}) if number else sampling
    return Request(uuid.uuid4().hex, list(ids), own, stop_ids, logprobs, prompt_logprobs)
