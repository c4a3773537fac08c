"""Between the event loop and the engine's thread: who may enter, who gets which event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.lm.engine.types import Event
from puna.serve.choice import Choice
from puna.serve.errors import ApiError, bad_request, unavailable
from puna.serve.job import CancelReason, Job
from puna.serve.metrics import Metrics
from puna.serve.worker import Accepted, Answer, Failed, Worker

if TYPE_CHECKING:
    from puna.lm.language_model import LanguageModel

MAX_WAITING_CHARS = 1 << 20
"""What a client may leave unread before its request is ended."""
LOADING_RETRY_S, FULL_RETRY_S, DRAINING_RETRY_S = 5, 1, 30


@dataclass(frozen=True)
class Limits:
    """How much the server takes on.

    Attributes:
        max_batch: Sequences that are computed at once.
        max_queue: Sequences that may wait beside them.
        timeout_s: Most seconds from a request's arrival to its end.
    """

    max_batch: int
    max_queue: int
    timeout_s: float


class Dispatcher:
    """Admits jobs, hands their requests to the worker and its events to them.

    Belongs to the event loop; only the worker's two callbacks come from its thread.

    Args:
        load: Returns the language model.
        engine_options: Of the engine.
        limits: How much is taken on.
        on_ready: Called in the loop when the model is loaded, or could not be.

    Attributes:
        metrics: What is counted.
        is_draining: No new jobs are taken.
        n_outstanding: Choices that were admitted and have not ended.
    """

    def __init__(
        self,
        load: Callable[[], LanguageModel],
        engine_options: Mapping[str, Any],
        limits: Limits,
        on_ready: Callable[[], None],
    ) -> None:
        self.limits, self.metrics = limits, Metrics()
        self.is_draining = False
        self.n_outstanding = 0
        self._on_ready = on_ready
        self._jobs: dict[str, tuple[Job, Choice]] = {}
        self._timers: dict[Job, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()
        self.worker = Worker(
            load, engine_options,
            deliver=lambda answers: self._post(self._deliver, answers),
            on_state=lambda: self._post(self._take_state),
        )  # fmt: skip

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self.worker.stop()

    @property
    def status(self) -> str:
        """``loading``, ``ready``, ``draining`` or ``failed``."""
        state = self.worker.state
        if state == "ready" and self.is_draining:
            return "draining"
        return "failed" if state == "stopped" else state

    @property
    def language_model(self) -> LanguageModel:
        """The model.

        Raises:
            ApiError: 503 unless the server is ready.
        """
        status = self.status
        if status == "loading":
            raise unavailable("the model is being loaded", "loading", LOADING_RETRY_S)
        if status == "draining":
            raise unavailable("the server is shutting down", "draining", DRAINING_RETRY_S)
        if status == "failed" or self.worker.language_model is None:
            raise unavailable("the engine has failed; restart the server", "failed", 60)
        return self.worker.language_model

    def admit(self, n_choices: int) -> None:
        """Take a place for each choice; the caller gives them back by :meth:`release` or in a job.

        Raises:
            ApiError: 429 when the queue is full, 400 when it is too short for the request.
        """
        room = self.limits.max_batch + self.limits.max_queue
        if n_choices > room:
            raise ApiError(
                400, f"the request asks for {n_choices} choices, this server holds {room} at once",
                param="n", code="invalid_value",
            )  # fmt: skip
        if self.n_outstanding + n_choices > room:
            raise ApiError(
                429, f"the queue is full: {self.n_outstanding} sequences of at most {room}",
                code="queue_full", headers={"retry-after": str(FULL_RETRY_S)},
            )  # fmt: skip
        self.n_outstanding += n_choices

    def release(self, n_choices: int) -> None:
        """Give back places that no job took."""
        self.n_outstanding -= n_choices

    def start(self, job: Job) -> None:
        """Begin an admitted job; it is over when it is done, timed out or cancelled."""
        delay_s = max(job.start_s + self.limits.timeout_s - time.monotonic(), 0)
        self._timers[job] = self._loop.call_later(delay_s, self._time_out, job)
        for choice in job.choices:
            self._jobs[choice.request.request_id] = (job, choice)
            self.worker.submit(choice.request)

    def finish(self, job: Job) -> None:
        """Forget a job and end what the engine still computes of it."""
        self._forget(job)
        timer = self._timers.pop(job, None)
        if timer is not None:
            timer.cancel()
            self.metrics.request_s.add(time.monotonic() - job.start_s)

    def cancel(self, job: Job, reason: CancelReason, error: ApiError | None = None) -> None:
        """End a job early; its cache is free as soon as the engine's present step ends."""
        if job.is_done:
            return
        self.metrics.cancelled[reason] += 1
        job.error = error
        job.is_disconnected = reason == "disconnect"
        self._forget(job)
        job.wake()

    def cancel_all(self, reason: CancelReason, error: ApiError) -> None:
        """End every job."""
        for job in list(self._timers):
            self.cancel(job, reason, error)

    @property
    def n_jobs(self) -> int:
        """Jobs whose responses are not complete."""
        return len(self._timers)

    def _forget(self, job: Job) -> None:
        for choice in job.choices:
            self._end(choice, is_finished=False)

    def _end(self, choice: Choice, is_finished: bool) -> None:
        request_id = choice.request.request_id
        if self._jobs.pop(request_id, None) is not None:
            self.n_outstanding -= 1
            if not is_finished:
                self.worker.cancel(request_id)

    def _time_out(self, job: Job) -> None:
        # The official client would try again, and wait just as long.
        error = ApiError(
            504, f"the request took longer than {self.limits.timeout_s:g} s", code="timeout",
            headers={"x-should-retry": "false"},
        )  # fmt: skip
        self.cancel(job, "timeout", error)

    def _take_state(self) -> None:
        if self.worker.state == "failed":
            error = unavailable("the engine has failed; restart the server", "failed", 60)
            self.cancel_all("error", error)
        self._on_ready()

    def _deliver(self, answers: Sequence[Answer]) -> None:
        """Take what happened in one step."""
        now_s = time.monotonic()
        touched: dict[Job, None] = {}
        for answer in answers:
            entry = self._jobs.get(answer.request_id)
            if entry is None:
                continue  # ended before the engine knew
            job, choice = entry
            touched[job] = None
            if isinstance(answer, Event):
                self._take_event(job, choice, answer, now_s)
            elif isinstance(answer, Accepted):
                job.n_accepted += 1
                job.is_accepted = job.n_accepted == len(job.choices)
            else:
                self._fail(job, answer)
        for job in touched:
            if job.n_waiting > MAX_WAITING_CHARS and job.is_streaming:
                self.cancel(job, "slow", ApiError(408, "the response was not read", code="slow"))
            job.wake()

    def _take_event(self, job: Job, choice: Choice, event: Event, now_s: float) -> None:
        if event.error is not None:
            error = ApiError(500, event.error.message, code="model_error")
            self._end(choice, is_finished=True)
            self.cancel(job, "error", error)
            return
        metrics = self.metrics
        if choice.token_s is None:
            metrics.prompt_tokens += len(choice.request.prompt_ids)
        else:
            metrics.inter_token_s.add(now_s - choice.token_s)
        choice.token_s = now_s
        if job.first_s is None:
            job.first_s = now_s
            metrics.first_token_s.add(now_s - job.start_s)
        metrics.generated_tokens += event.token is not None
        choice.take(event)
        if choice.finish_reason is not None:
            self._end(choice, is_finished=event.finish is not None)

    def _fail(self, job: Job, failed: Failed) -> None:
        error = failed.error
        if failed.is_refused and isinstance(error, PunaError):
            job.error = bad_request(error)
            self._forget(job)
            return
        message = f"the engine failed: {type(error).__name__}: {error}"
        self.cancel(job, "error", ApiError(500, message, code="engine_error"))
