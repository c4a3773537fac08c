"""The thread that loads the model and drives the engine; all others only send it commands."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from puna.core.errors import PunaError
from puna.lm.engine.types import EngineStats, Event, Request
from puna.model.sampling import Sampling

if TYPE_CHECKING:
    from puna.lm.engine.engine import Engine
    from puna.lm.language_model import LanguageModel

State = Literal["loading", "ready", "failed", "stopped"]
MAX_FAILED_STEPS = 3
"""So many steps in a row may fail before the engine is taken for broken."""
_WARM_UP = "warm-up"

logger = logging.getLogger("puna.serve")


@dataclass(frozen=True)
class Accepted:
    """The engine holds the request."""

    request_id: str


@dataclass(frozen=True)
class Failed:
    """The request is over without a last event.

    Attributes:
        request_id: Whose.
        error: A :class:`PunaError` of ``submit`` is the client's fault, all else the server's.
        is_refused: Whether ``submit`` refused it.
    """

    request_id: str
    error: BaseException
    is_refused: bool


Answer = Event | Accepted | Failed


class Worker(threading.Thread):
    """Loads a model, then runs the engine as long as there is work.

    Args:
        load: Returns the language model.
        options: Of the engine.
        deliver: Called in this thread, once per step, with what happened.
        on_state: Called in this thread when ``state`` has changed.

    Attributes:
        state: ``loading``, ``ready``, ``failed`` (``error`` tells why) or ``stopped``.
        error: Why it failed.
        language_model: Once ready.
    """

    def __init__(
        self,
        load: Callable[[], LanguageModel],
        options: Mapping[str, Any],
        deliver: Callable[[list[Answer]], None],
        on_state: Callable[[], None],
    ) -> None:
        super().__init__(name="puna-engine", daemon=True)
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.language_model: LanguageModel | None = None
        self._load, self._options = load, options
        self._deliver, self._on_state = deliver, on_state
        self._commands: queue.SimpleQueue[Request | str | None] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._live: set[str] = set()
        self._n_failed_steps = 0

    @property
    def stats(self) -> EngineStats:
        """The engine's counts; zeros before there is one."""
        return EngineStats() if self._engine is None else self._engine.stats

    def submit(self, request: Request) -> None:
        """Hand a request over; an :class:`Accepted` or :class:`Failed` comes back."""
        self._commands.put(request)

    def cancel(self, request_id: str) -> None:
        """End a request; commands are obeyed in their order."""
        self._commands.put(request_id)

    def stop(self) -> None:
        """End the thread after the step that it computes."""
        self._commands.put(None)

    def run(self) -> None:
        """Load, then obey until stopped; never raises, ``state`` and ``error`` tell."""
        try:
            self.language_model = self._load()
            self._engine = self.language_model.engine(**self._options)
            _warm_up(self._engine)
            self._become("ready")
            while self._round(self._engine):
                pass
            self._become("stopped")
        except BaseException as error:  # noqa: BLE001 - told to all who wait
            self.error = error
            self._deliver([Failed(id_, error, is_refused=False) for id_ in self._live])
            self._become("failed")

    def _become(self, state: State) -> None:
        self.state = state
        self._on_state()

    def _round(self, engine: Engine) -> bool:
        """Obey what has come, wait for it when there is nothing to do, and step; False to end."""
        answers: list[Answer] = []
        is_idle = not engine.has_work
        while True:
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                break
            is_idle = False
            if command is None:
                return False
            if isinstance(command, str):
                engine.cancel(command)
                self._live.discard(command)
            else:
                answers.append(self._submit(engine, command))
        answers += self._step(engine)
        if answers:
            self._deliver(answers)
        return True

    def _submit(self, engine: Engine, request: Request) -> Answer:
        try:
            engine.submit(request)
        except Exception as error:  # noqa: BLE001 - this request's, not the server's
            return Failed(request.request_id, error, is_refused=isinstance(error, PunaError))
        self._live.add(request.request_id)
        return Accepted(request.request_id)

    def _step(self, engine: Engine) -> list[Answer]:
        """Step; when that raises, end what the engine holds and go on with the next requests.

        Raises:
            Exception: Several steps in a row failed.
        """
        try:
            events = engine.step()
        except Exception as error:
            logger.exception("a step of the engine failed, %d requests end", len(self._live))
            self._n_failed_steps += 1
            if self._n_failed_steps >= MAX_FAILED_STEPS:
                raise
            failed = sorted(self._live)
            self._live.clear()
            for request_id in failed:
                engine.cancel(request_id)
            return [Failed(id_, error, is_refused=False) for id_ in failed]
        if any(event.finish != "cancelled" for event in events):  # something was computed
            self._n_failed_steps = 0
        for event in events:
            if event.finish is not None:
                self._live.discard(event.request_id)
        return list(events)


def _warm_up(engine: Engine) -> None:
    """Generate two tokens, so that compiling and first touches are over before the first client."""
    engine.submit(Request(_WARM_UP, [0, 0], Sampling(temperature=0, max_new_tokens=2)))
    while engine.has_work:
        engine.step()
