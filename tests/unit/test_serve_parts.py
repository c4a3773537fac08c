"""Parts of the server on their own: choices, the engine's thread, the counts."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.lm.engine.types import EngineStats, Event, Request, TokenLogprob
from puna.model.sampling import Sampling
from puna.serve.choice import Choice, token_text
from puna.serve.metrics import Histogram, Metrics
from puna.serve.worker import MAX_FAILED_STEPS, Accepted, Answer, Failed, Worker
from tests.unit.byte_model import byte_tokenizer
from tests.unit.serving import ScriptedEngine, ScriptedModel, until

TOKENIZER = byte_tokenizer()


def request(name: str = "r", logprobs: int | None = None, max_new_tokens: int = 100) -> Request:
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return Request(name, TOKENIZER.encode("ab"), sampling, frozenset(), logprobs)


def told(choice: Choice, text: str, finish: Any = None) -> list[tuple[str, list[int]]]:
    """What a choice gives out after each byte of a text: the text and offsets of tokens."""
    ids = TOKENIZER.encode(text)
    out = []
    for at, id_ in enumerate(ids):
        last = finish if at == len(ids) - 1 else None
        choice.take(Event("r", id_, TokenLogprob(id_, -1.0), last))
        shown, entries = choice.read()
        out.append((shown, [entry.offset for entry in entries]))
    return out


def test_logprobs_come_with_their_text() -> None:
    choice = Choice(0, request(logprobs=0), TOKENIZER, stop=["end"])
    assert told(choice, "aén", "length") == [
        ("a", [0]), ("", []), ("é", [1, 1]), ("n", [2]),
    ]  # fmt: skip
    assert (choice.finish_reason, choice.n_tokens) == ("length", 4)


def test_what_may_become_a_stop_text_is_held_with_its_logprobs() -> None:
    choice = Choice(0, request(logprobs=0), TOKENIZER, stop=["end"])
    assert told(choice, "aenx") == [("a", [0]), ("", []), ("", []), ("enx", [1, 2, 3])]
    assert told(choice, "end") == [("", []), ("", []), ("", [])]
    assert choice.finish_reason == "stop"
    assert choice.n_tokens == 7  # they were generated, though nobody sees them


def test_held_text_comes_out_at_the_end() -> None:
    choice = Choice(0, request(logprobs=0), TOKENIZER, stop=["end"])
    assert told(choice, "xen", "length") == [("x", [0]), ("", []), ("en", [1, 2])]


def test_unfinished_character_at_the_end_is_replaced() -> None:
    choice = Choice(0, request(), TOKENIZER)
    for id_ in TOKENIZER.encode("é")[:1]:
        choice.take(Event("r", id_, None, "length"))
    assert choice.read()[0] == "\ufffd"


def test_unread_pieces_lie_together() -> None:
    choice = Choice(0, request(), TOKENIZER)
    for id_ in TOKENIZER.encode("abc"):
        choice.take(Event("r", id_))
    assert choice.n_waiting == 3
    assert choice.read() == ("abc", [])
    assert choice.n_waiting == 0
    assert choice.read() == ("", [])


def test_context_end_is_length() -> None:
    choice = Choice(0, request(), TOKENIZER)
    choice.take(Event("r", TOKENIZER.encode("a")[0], None, "context"))
    assert choice.finish_reason == "length"


def test_bytes_that_are_no_text_are_spelled() -> None:
    assert token_text("é".encode()) == "é"
    assert token_text(b"\xe2\x82") == "bytes:\\xe2\\x82"


class Driven:
    """A worker whose answers are collected."""

    def __init__(self, model: Any = None) -> None:
        self.answers: list[Answer] = []
        self.states: list[str] = []
        self.model = model or ScriptedModel("hello")
        self.worker = Worker(
            lambda: self.model, {"max_batch": 2}, self.answers.extend,
            lambda: self.states.append(self.worker.state),
        )  # fmt: skip
        self.worker.start()

    @property
    def engine(self) -> ScriptedEngine:
        until(lambda: self.worker.state == "ready")
        return self.model.scripted

    def of(self, kind: type) -> list[Any]:
        return [answer for answer in self.answers if type(answer) is kind]

    def end(self) -> None:
        self.worker.stop()
        self.worker.join(20)
        assert not self.worker.is_alive()


def test_worker_steps_while_there_is_work_and_sleeps_otherwise() -> None:
    driven = Driven()
    engine = driven.engine
    assert engine.options == {}
    n_steps = engine.n_steps
    driven.worker.submit(request("a"))
    until(lambda: any(event.finish for event in driven.of(Event)))
    assert driven.answers[0] == Accepted("a")
    assert len(driven.of(Event)) == 6
    assert engine.n_steps == n_steps + 6
    driven.end()
    assert driven.states == ["ready", "stopped"]


def test_worker_cancels_in_order() -> None:
    driven = Driven()
    engine = driven.engine
    engine.gate.clear()
    driven.worker.submit(request("a"))
    until(lambda: len(engine.requests) == 1)
    driven.worker.submit(request("b"))
    driven.worker.cancel("a")
    driven.worker.cancel("unknown")
    engine.gate.set()
    until(lambda: any(event.request_id == "b" and event.finish for event in driven.of(Event)))
    of_a = [event for event in driven.of(Event) if event.request_id == "a"]
    assert of_a[-1].finish == "cancelled"
    assert len(of_a) == 2
    driven.end()


def test_worker_refuses_one_request() -> None:
    driven = Driven()
    long = Request("long", [0] * 1000, Sampling())
    driven.worker.submit(long)
    driven.worker.submit(request("a"))
    until(lambda: any(event.finish for event in driven.of(Event)))
    [failed] = driven.of(Failed)
    assert (failed.request_id, failed.is_refused) == ("long", True)
    driven.end()


def test_worker_survives_failed_steps_but_not_many(caplog: pytest.LogCaptureFixture) -> None:
    driven = Driven()
    engine = driven.engine
    for number in range(MAX_FAILED_STEPS):
        assert driven.worker.is_alive()
        engine.failure = RuntimeError(f"number {number}")
        driven.worker.submit(request(str(number)))
        until(lambda n=number: any(f.request_id == str(n) for f in driven.of(Failed)))
        assert driven.of(Failed)[-1].is_refused is False
    driven.worker.join(20)
    assert driven.states == ["ready", "failed"]
    assert str(driven.worker.error) == f"number {MAX_FAILED_STEPS - 1}"
    assert "a step of the engine failed" in caplog.text


def test_successful_steps_in_between_are_forgiveness() -> None:
    driven = Driven()
    engine = driven.engine
    for number in range(MAX_FAILED_STEPS + 2):
        engine.failure = RuntimeError("now and then")
        driven.worker.submit(request(f"{number}"))
        until(lambda n=number: len(driven.of(Failed)) == n + 1)
        driven.worker.submit(request(f"{number} again"))
        until(lambda n=number: sum(e.finish == "stop" for e in driven.of(Event)) == n + 1)
    driven.end()


def test_worker_tells_why_it_could_not_load() -> None:
    states: list[str] = []
    done = threading.Event()

    def load() -> ScriptedModel:
        raise PunaError("no model")

    def on_state() -> None:
        states.append(worker.state)
        done.set()

    worker = Worker(load, {}, lambda _: None, on_state)
    worker.start()
    assert done.wait(20)
    assert (states, str(worker.error)) == (["failed"], "no model")
    assert worker.stats == EngineStats()


def test_histogram_is_cumulative() -> None:
    histogram = Histogram((0.1, 1))
    for value in (0.05, 0.1, 0.5, 7):
        histogram.add(value)
    assert list(histogram.lines("x")) == [
        'x_bucket{le="0.1"} 2', 'x_bucket{le="1"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 7.650000",
        "x_count 4",
    ]  # fmt: skip


def test_metrics_are_what_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.responses["/health", 200] += 2
    text = metrics.text(5, EngineStats(n_running=2, used_blocks=7), is_ready=True)
    lines = text.splitlines()
    assert text.endswith("\n")
    assert 'puna_responses_total{path="/health",code="200"} 2' in lines
    assert "puna_queue_length 3" in lines
    assert "puna_cache_blocks_used 7" in lines
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    for line in lines:
        if not line.startswith("#"):
            base = line.partition("{")[0].partition(" ")[0]
            base = base.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
            assert base in names
            float(line.rpartition(" ")[2])
