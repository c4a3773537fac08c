"""A server in a thread of the test, over an engine that says what the test wants."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import openai

from puna.core.errors import PunaError
from puna.lm.engine.types import EngineStats, Event, Request, TokenLogprob
from puna.lm.language_model import LanguageModel
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.serve.dispatch import Limits
from puna.serve.generate import Generation
from puna.serve.server import Address, Server
from tests.unit.byte_model import N_SPECIAL, byte_tokenizer

CONFIG = LlamaConfig(
    vocab_size=256 + N_SPECIAL, dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=32,
    max_seq_len=256,
)  # fmt: skip
WAIT_S = 20


class ScriptedEngine:
    """Says a fixed text, one byte per step and request; counts as the real one does.

    Attributes:
        gate: While it is cleared, steps wait.
        failure: What the next step raises, once.
        requests: All that were submitted.
    """

    def __init__(self, script: str, max_batch: int = 64, **options: Any) -> None:
        self.options = options
        self.ids = byte_tokenizer().encode(script)
        self.gate = threading.Event()
        self.gate.set()
        self.step_s = 0.0
        self.failure: BaseException | None = None
        self.is_not_finite = False
        self.requests: list[Request] = []
        self._max_batch = max_batch
        self._live: dict[str, tuple[Request, list[int]]] = {}
        self._ready: list[Event] = []
        self.n_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._ready)

    @property
    def stats(self) -> EngineStats:
        n_running = min(len(self._live), self._max_batch)
        return EngineStats(
            n_running=n_running, n_waiting=len(self._live) - n_running, used_blocks=n_running,
            total_blocks=100, block_tokens=32, allocated_blocks=100, cache_bytes=100,
        )  # fmt: skip

    def submit(self, request: Request) -> None:
        if len(request.prompt_ids) > CONFIG.max_seq_len:
            raise PunaError("the prompt is longer than the model's context", "shorten it")
        if request.request_id != "warm-up":
            self.requests.append(request)
        self._live[request.request_id] = (request, list(self.ids))

    def cancel(self, request_id: str) -> None:
        if self._live.pop(request_id, None) is not None:
            self._ready.append(Event(request_id, None, finish="cancelled"))

    def step(self) -> list[Event]:
        self.gate.wait()
        time.sleep(self.step_s)
        self.n_steps += 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        events, self._ready = self._ready, []
        for name, (request, left) in list(self._live.items())[: self._max_batch]:
            events.append(self._next(name, request, left))
            if events[-1].finish is not None:
                del self._live[name]
        return events

    def _next(self, name: str, request: Request, left: list[int]) -> Event:
        if self.is_not_finite:
            return Event(name, None, finish="error", error=PunaError("not finite", "check"))
        prompt = None
        if request.prompt_logprobs and len(left) == len(self.ids):
            prompt = [None, *(TokenLogprob(id_, -1.0) for id_ in request.prompt_ids[1:])]
        if not left:
            return Event(name, None, None, "stop", prompt)
        token = left.pop(0)
        n_done = len(self.ids) - len(left)
        finish = "length" if n_done == request.sampling.max_new_tokens else None
        logprob = None
        if request.logprobs is not None:
            top = tuple((id_, -1.0 - id_) for id_ in range(request.logprobs))
            logprob = TokenLogprob(token, -0.5, top)
        return Event(name, token, logprob, finish, prompt)


class ScriptedModel(LanguageModel):
    """A language model whose engine is scripted."""

    def __init__(self, script: str) -> None:
        super().__init__(Llama(CONFIG), byte_tokenizer())
        self._script = script
        self.scripted: ScriptedEngine | None = None

    def engine(self, **options: Any) -> Any:
        self.scripted = ScriptedEngine(self._script, **options)
        return self.scripted


class Running:
    """A server that runs in another thread."""

    def __init__(self, server: Server, thread: threading.Thread, model: Any) -> None:
        self.server, self.thread, self.model = server, thread, model
        self.open = contextlib.ExitStack()

    @property
    def engine(self) -> ScriptedEngine:
        return self.model.scripted

    def client(self, **options: Any) -> openai.OpenAI:
        settings = {"api_key": "none", "max_retries": 0, "timeout": WAIT_S, **options}
        client = openai.OpenAI(base_url=f"{self.server.url}/v1", **settings)
        return self.open.enter_context(client)

    def opened(self, body: Mapping[str, Any]) -> http.client.HTTPResponse:
        """A response of ``/v1/completions`` whose body is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=WAIT_S)
        self.open.callback(connection.close)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return self.open.enter_context(connection.getresponse())

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """One request over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=WAIT_S)
        fields = {"content-type": "application/json", **(headers or {})}
        data = json.dumps(body).encode() if isinstance(body, Mapping) else body
        with contextlib.closing(connection):
            connection.request(method, path, data, fields)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def error(self, body: bytes | Mapping[str, Any], path: str = "/v1/completions") -> dict:
        """The error of a request that must fail with 400."""
        status, _, data = self.request("POST", path, body)
        assert status == 400, data
        return json.loads(data)["error"]

    def metric(self, name: str) -> float:
        """The value of a sample; 0 when there is none."""
        _, _, data = self.request("GET", "/metrics")
        for line in data.decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        until(lambda: self.metric(name) == value)


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.01)


@contextlib.contextmanager
def running(
    model: Any,
    *,
    api_key: str | None = None,
    max_batch: int = 4,
    max_queue: int = 4,
    timeout_s: float = 60,
    max_body_bytes: int = 100_000,
    grace_s: float = 10,
    engine_options: Mapping[str, Any] | None = None,
    wait: bool = True,
) -> Iterator[Running]:
    """Run a server for a block; ``model`` is a language model or a function that loads one."""
    ready = threading.Event()
    server = Server(
        model if callable(model) else lambda: model,
        Address("127.0.0.1", 0, api_key, grace_s),
        Limits(max_batch, max_queue, timeout_s),
        Generation("tiny", "puna-test", max_body_bytes, default_max_tokens=40),
        engine_options,
        lambda _: ready.set(),
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        if wait:
            assert ready.wait(WAIT_S)
        else:
            until(lambda: server.dispatcher is not None)
        found = Running(server, thread, model)
        with found.open:
            yield found
    finally:
        if isinstance(model, ScriptedModel) and model.scripted is not None:
            model.scripted.gate.set()
        server.stop()
        server.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive()
