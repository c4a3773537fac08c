"""A language model for Python: weights, tokenizer and one engine behind a few methods.

Shapes: T tokens, V vocab_size.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack, cast, overload

import torch
from jaxtyping import Float
from torch import Tensor

from puna.core.errors import PunaError
from puna.lm.engine.engine import Engine
from puna.lm.engine.types import Event, Request, TokenLogprob
from puna.lm.text import Completion, StopReason, TextState
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.model.sampling import Sampling
from puna.tokens.tokenizer import Tokenizer

Messages: TypeAlias = Sequence[Mapping[str, str]]
Prompt: TypeAlias = str | Messages | Sequence[int]
"""A text to continue, a conversation to answer (``{"role", "content"}`` each), or token ids."""
Prompts: TypeAlias = Sequence[str] | Sequence[Messages] | Sequence[Sequence[int]]


class SamplingOptions(TypedDict, total=False):
    """Fields of :class:`puna.model.sampling.Sampling`, which has their meanings and defaults."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int


class LanguageModel:
    """Weights and a tokenizer, ready to generate; :func:`puna.load` makes one.

    The methods may be called from several threads: their requests share the engine's batch.

    Args:
        model: In evaluation mode.
        tokenizer: None for a model without one; then only ids go in and out.
        path: Where it came from.
        stop_ids: End a generation, beside the tokenizer's own.

    Attributes:
        model: The weights.
        path: Where it came from; None for a preset.
        stop_ids: All ids that end a generation.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        path: Path | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        self.model, self.path = model, path
        self._tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids) | (tokenizer.stop_ids if tokenizer else frozenset())
        self._engine: Engine | None = None
        self._lock = threading.RLock()
        self._mail: dict[str, deque[Event]] = {}
        self._numbers = itertools.count()

    @property
    def config(self) -> LlamaConfig:
        """Shape and function of the model."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            PunaError: The model has none.
        """
        if self._tokenizer is None:
            where = "a preset's random model" if self.path is None else str(self.path)
            raise PunaError(
                f"{where} has no tokenizer, so text can go neither in nor out",
                "use generate_ids and logits with token ids, or put a tokenizer beside the model",
            )
        return self._tokenizer

    @property
    def max_seq_len(self) -> int:
        """Longest context in tokens."""
        return self.config.max_seq_len

    def engine(self, **options: Any) -> Engine:
        """Return a new engine over these weights; options of :class:`puna.lm.engine.engine.Engine`.

        For callers that run their own loop, such as a server.
        """
        return Engine(self.model, **options)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt: messages in chat format, ids as they are, text tokenised.

        Text begins with the begin-of-text id if the tokenizer's files say so (Llama's do), and
        always when it is empty.

        Raises:
            PunaError: The prompt is empty, a message is malformed, or there is no tokenizer.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=self.tokenizer.adds_bos or not prompt)
        if not len(prompt):
            raise PunaError("the prompt is empty", "give a text, messages or token ids")
        if isinstance(prompt[0], Mapping):
            messages = [dict(message) for message in cast(Messages, prompt)]
            return self.tokenizer.encode_chat(messages)
        return [int(id_) for id_ in cast(Sequence[int], prompt)]

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Float[Tensor, "tokens vocab"]:
        """Return the logits of the next token after each id, float32, on the CPU."""
        tokens_BT = torch.tensor([list(ids)], device=self.model.norm.weight.device)
        return self.model(tokens_BT)[0].cpu()

    @overload
    def generate(
        self, prompt: Prompt, *, stop: Sequence[str] = ..., **sampling: Unpack[SamplingOptions]
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        stop: Sequence[str] = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> list[str]: ...
    def generate(self, prompt: Any, *, stop: Any = (), **sampling: Any) -> Any:
        """Return the text that follows a prompt, or those that follow several.

        Args:
            prompt: A text (completed), messages (answered), token ids; or a list of those, computed
                together, of which number n draws with ``seed + n``.
            stop: Texts that end the generation and are not part of it.
            **sampling: ``max_new_tokens=128, temperature=0.8, top_p=0.95, top_k=0, min_p=0,
                repetition_penalty=1, seed=0`` and the rest of
                :class:`puna.model.sampling.Sampling`.

        Raises:
            PunaError: A prompt is empty or longer than the context.
            ValueError: A setting is out of its range.
        """
        done = self.complete(prompt, stop=stop, **sampling)
        return [one.text for one in done] if isinstance(done, list) else done.text

    def generate_ids(self, ids: Sequence[int], **sampling: Unpack[SamplingOptions]) -> list[int]:
        """Return the ids that follow ids, stop ids left out; needs no tokenizer.

        Args:
            ids: The prompt, its begin-of-text id included.
            **sampling: As in :meth:`generate`.
        """
        job = _Job(self, list(ids), Sampling(**sampling), None)
        list(self._run([job]))
        return job.ids

    def stream(
        self, prompt: Prompt, *, stop: Sequence[str] = (), **sampling: Unpack[SamplingOptions]
    ) -> Generator[str, None, Completion]:
        """Yield the text that follows a prompt piece by piece; return the completion.

        Ends the request when the caller stops listening. Arguments and errors as in
        :meth:`generate`; the errors come with the first piece.
        """
        return self.stream_ids(self.encode_prompt(prompt), Sampling(**sampling), stop)

    def stream_ids(
        self, prompt_ids: Sequence[int], sampling: Sampling, stop: Sequence[str] = ()
    ) -> Generator[str, None, Completion]:
        """Stream after a prompt that is encoded already; otherwise like :meth:`stream`."""
        job = _Job(self, list(prompt_ids), sampling, TextState(self.tokenizer, stop))
        self._start(job)
        try:
            while not job.is_done:
                shown = job.take(self._next_event(job))
                if shown:
                    yield shown
        finally:
            self._end(job)
        return job.completion()

    @overload
    def complete(
        self,
        prompt: Prompt,
        *,
        stop: Sequence[str] = ...,
        logprobs: int | None = ...,
        echo: bool = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion: ...
    @overload
    def complete(
        self,
        prompt: Prompts,
        *,
        stop: Sequence[str] = ...,
        logprobs: int | None = ...,
        echo: bool = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Completion]: ...
    def complete(
        self,
        prompt: Any,
        *,
        stop: Any = (),
        logprobs: int | None = None,
        echo: bool = False,
        **sampling: Any,
    ) -> Any:
        """Return the :class:`~puna.lm.text.Completion` of a prompt, or a list of them for several.

        Args:
            prompt: As in :meth:`generate`.
            stop: As in :meth:`generate`.
            logprobs: Also return those of the chosen tokens and of this many most likely ones, of
                the model's own distribution (before penalties, temperature and truncation).
            echo: Begin the text with the prompt's; with ``logprobs`` also return the prompt's.
            **sampling: As in :meth:`generate`.

        Raises:
            PunaError: A prompt is empty or longer than the context.
            ValueError: A setting is out of its range.
        """
        if not _is_many(prompt):
            [done] = self.complete_each(
                [prompt], stop=stop, logprobs=logprobs, echo=echo, **sampling
            )
            return done
        return list(self.complete_each(prompt, stop=stop, logprobs=logprobs, echo=echo, **sampling))

    def complete_each(
        self,
        prompts: Prompts,
        *,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        echo: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Completion]:
        """Yield the completions of several prompts in their order, each as soon as it is ready.

        Arguments and errors as in :meth:`complete`; all prompts are encoded and checked first.
        """
        base = Sampling(**sampling)
        jobs = []
        for number, one in enumerate(prompts):
            seed = (base.seed + number) % 2**63
            jobs.append(
                _Job(
                    self,
                    self.encode_prompt(one),
                    base.model_copy(update={"seed": seed}),
                    TextState(self.tokenizer, stop),
                    logprobs,
                    echo,
                )
            )
        for job in self._run(jobs):
            yield job.completion()

    def _run(self, jobs: Sequence[_Job]) -> Iterator[_Job]:
        try:
            for job in jobs:
                self._start(job)
            for job in jobs:
                while not job.is_done:
                    job.take(self._next_event(job))
                self._end(job)
                yield job
        finally:
            for job in jobs:
                self._end(job)

    def _start(self, job: _Job) -> None:
        with self._lock:
            if self._engine is None:
                self._engine = self.engine()
            self._engine.submit(job.request)
            self._mail[job.request.request_id] = deque()

    def _next_event(self, job: _Job) -> Event:
        """Return the next event of a job; whoever waits drives the engine for all."""
        while True:
            with self._lock:
                mail = self._mail[job.request.request_id]
                if mail:
                    return mail.popleft()
                assert self._engine is not None
                for event in self._engine.step():
                    if event.request_id in self._mail:  # else nobody listens any more
                        self._mail[event.request_id].append(event)

    def _end(self, job: _Job) -> None:
        with self._lock:
            if self._mail.pop(job.request.request_id, None) is not None:
                assert self._engine is not None
                self._engine.cancel(job.request.request_id)

    def _next_id(self) -> str:
        return str(next(self._numbers))


class _Job:
    """One request of a caller and what came back."""

    def __init__(
        self,
        owner: LanguageModel,
        prompt_ids: list[int],
        sampling: Sampling,
        text: TextState | None,
        logprobs: int | None = None,
        echo: bool = False,
    ) -> None:
        self.request = Request(
            owner._next_id(), prompt_ids, sampling, owner.stop_ids, logprobs,
            prompt_logprobs=echo and logprobs is not None,
        )  # fmt: skip
        self.ids: list[int] = []
        self.is_done = False
        self._owner, self._text, self._echo = owner, text, echo
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        self._reason: StopReason = "cancelled"
        self._start_s = time.monotonic()
        self._seconds = 0.0

    def take(self, event: Event) -> str:
        """Take the next event; return the text it frees.

        Raises:
            PunaError: The request failed.
        """
        if event.error is not None:
            raise event.error
        if event.token is not None:
            self.ids.append(event.token)
        if event.logprob is not None:
            self._logprobs.append(event.logprob)
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = event.prompt_logprobs
        shown, is_stopped = "", False
        if self._text is not None:
            shown, is_stopped = self._text.push(event.token, event.finish is not None)
        self.is_done = is_stopped or event.finish is not None
        if is_stopped:
            self._reason = "stop_text"
        elif event.finish in ("length", "context", "cancelled"):
            self._reason = event.finish
        elif event.finish == "stop":
            self._reason = "stop_token"
        self._seconds = time.monotonic() - self._start_s
        return shown

    def completion(self) -> Completion:
        """Return what came back, after the last event."""
        assert self._text is not None
        prompt_ids = self.request.prompt_ids
        before = self._owner.tokenizer.decode(prompt_ids, skip_special=True) if self._echo else ""
        return Completion(
            before + self._text.text, prompt_ids, self.ids, self._reason, self._seconds,
            None if self.request.logprobs is None else self._logprobs, self._prompt_logprobs,
        )  # fmt: skip


def _is_many(prompt: Any) -> bool:
    """Tell a list of prompts from one prompt, which may be a list of messages or of ids."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Sequence)
