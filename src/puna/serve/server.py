"""The server as a whole: its socket, the order of start and end, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn

from puna.core.listen import is_loopback, listen
from puna.serve.app import make_app
from puna.serve.dispatch import Dispatcher, Limits
from puna.serve.errors import unavailable
from puna.serve.generate import Generation
from puna.serve.protocol import Protocol

if TYPE_CHECKING:
    from puna.lm.language_model import LanguageModel

_CLOSE_S = 5  # for the last bytes to go out
_ENGINE_JOIN_S = 30.0
_POLL_S = 0.05
_KEEP_ALIVE_S = 30  # longer than the pauses of a client that keeps its connection


@dataclass(frozen=True)
class Address:
    """Where the server listens and who may come.

    Attributes:
        host: Name or address.
        port: 0 takes a free one.
        api_key: Asked of every request; None for none.
        grace_s: How long requests may go on after the first signal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    grace_s: float = 30.0

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)


class Server:
    """Serves one model until it is told to stop.

    Args:
        load: Returns the language model; called in the engine's thread while the server already
            answers ``/health``.
        address: Where to listen.
        limits: How much to take on.
        generation: Of the endpoints.
        engine_options: Of the engine; ``max_batch`` is that of ``limits``.
        on_ready: Called once requests are taken.

    Attributes:
        port: Where it listens.

    Raises:
        PunaError: The address cannot be bound.
    """

    def __init__(
        self,
        load: Callable[[], LanguageModel],
        address: Address,
        limits: Limits,
        generation: Generation,
        engine_options: Mapping[str, Any] | None = None,
        on_ready: Callable[[Server], None] = lambda _: None,
    ) -> None:
        self._load, self._on_ready = load, on_ready
        self.address, self.limits, self.generation = address, limits, generation
        self._options = {**(engine_options or {}), "max_batch": limits.max_batch}
        self._socket = listen(address.host, address.port)
        self.port: int = self._socket.getsockname()[1]
        self.dispatcher: Dispatcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._n_stops = 0

    @property
    def url(self) -> str:
        """Base of all paths."""
        host = self.address.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def run(self) -> None:
        """Serve until :meth:`stop` or a signal.

        Raises:
            PunaError: The model could not be loaded.
        """
        asyncio.run(self._run())

    def stop(self) -> None:
        """Take no new requests and end when the others are done; called again: end now.

        May be called from any thread.
        """
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stop)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        dispatcher = Dispatcher(self._load, self._options, self.limits, self._take_state)
        self.dispatcher = dispatcher
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        encoder = ThreadPoolExecutor(1, "puna-encode")
        app = make_app(
            dispatcher, self.generation, encoder, self.address.api_key, self.address.is_local
        )
        config = uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="off", loop="asyncio", log_config=None,
            access_log=False, server_header=False, date_header=False, proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=_CLOSE_S,
        )  # fmt: skip
        server = _Uvicorn(config)
        with self._signals(), encoder:
            dispatcher.worker.start()
            serving = asyncio.create_task(server.serve(sockets=[self._socket]))
            try:
                await self._wait_for_end(dispatcher, serving)
            finally:
                server.should_exit = True
                await serving
                dispatcher.worker.stop()
                await asyncio.to_thread(dispatcher.worker.join, _ENGINE_JOIN_S)
        error = dispatcher.worker.error
        if error is not None and dispatcher.worker.language_model is None:
            raise error

    async def _wait_for_end(self, dispatcher: Dispatcher, serving: asyncio.Task[None]) -> None:
        """Wait for the first signal, then for the requests; cut them when the grace is over."""
        stopped = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((stopped, serving), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        dispatcher.is_draining = True
        deadline_s = self._loop_time() + self.address.grace_s
        while dispatcher.n_jobs and self._n_stops < 2 and self._loop_time() < deadline_s:
            await asyncio.sleep(_POLL_S)
        dispatcher.cancel_all(
            "shutdown", unavailable("the server is shutting down", "shutdown", 30)
        )

    def _loop_time(self) -> float:
        return asyncio.get_running_loop().time()

    def _stop(self) -> None:
        self._n_stops += 1
        self._stopping.set()

    def _take_state(self) -> None:
        assert self.dispatcher is not None
        worker = self.dispatcher.worker
        if worker.state == "ready":
            self._on_ready(self)
        elif worker.language_model is None:  # it could not be loaded
            self._stop()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop at SIGINT and SIGTERM, where this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


class _Uvicorn(uvicorn.Server):
    """uvicorn's server without its signal handlers: :class:`Server` has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
