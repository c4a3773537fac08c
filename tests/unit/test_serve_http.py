"""The server over HTTP, with the official client and without it, over a scripted engine."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from puna.core.errors import PunaError
from puna.serve import dispatch, protocol
from tests.unit.serving import Running, ScriptedModel, running, until

SCRIPT = "Aá€🦙 and then some more text."
PROMPT = {"model": "tiny", "prompt": "Say"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """For tests that leave the server as it was."""
    with running(ScriptedModel(SCRIPT)) as server:
        yield server


@pytest.fixture
def server() -> Iterator[Running]:
    with running(ScriptedModel(SCRIPT)) as server:
        yield server


def test_completion_whole_and_streamed_agree(shared: Running) -> None:
    client = shared.client()
    whole = client.completions.create(model="tiny", prompt="Say", max_tokens=100)
    assert whole.choices[0].text == SCRIPT
    assert whole.choices[0].finish_reason == "stop"
    assert whole.object == "text_completion"
    n_tokens = len(SCRIPT.encode())
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, n_tokens)  # with BOS
    assert whole.usage.total_tokens == 4 + n_tokens
    chunks = list(
        client.completions.create(
            model="tiny", prompt="Say", max_tokens=100, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    texts = [chunk.choices[0].text for chunk in chunks[:-1]]
    assert "".join(texts) == SCRIPT
    assert all("�" not in text for text in texts)  # never half a character
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_usage_has_none(shared: Running) -> None:
    response = shared.opened({**PROMPT, "max_tokens": 3, "stream": True})
    assert response.getheader("content-type") == "text/event-stream; charset=utf-8"
    events = response.read().decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all("usage" not in event for event in events)


def test_chat_whole_and_streamed_agree(shared: Running) -> None:
    client = shared.client()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say "},
                                     {"type": "text", "text": "it."}]},
    ]  # fmt: skip
    whole = client.chat.completions.create(model="tiny", messages=messages)  # type: ignore
    assert whole.choices[0].message.content == SCRIPT
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    sent = shared.engine.requests[-1]
    expected = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say it."},
    ]  # fmt: skip
    assert sent.prompt_ids == shared.model.tokenizer.encode_chat(expected)
    assert sent.sampling.max_new_tokens == 40  # the server's default
    assert (sent.sampling.temperature, sent.sampling.top_p) == (1.0, 1.0)  # OpenAI's defaults
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True))  # type: ignore
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SCRIPT
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_several_prompts_and_choices_keep_their_order_and_draw_apart(shared: Running) -> None:
    n_before = len(shared.engine.requests)
    done = shared.client().completions.create(
        model="tiny", prompt=["a", "b"], n=2, max_tokens=2, seed=7, echo=True, temperature=0.5
    )
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in done.choices] == ["a", "a", "b", "b"]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (4, 8)
    seeds = [request.sampling.seed for request in shared.engine.requests[n_before:]]
    assert seeds == [7, 8, 9, 10]


def test_requests_without_seed_differ_in_it(shared: Running) -> None:
    for _ in range(2):
        shared.client().completions.create(model="tiny", prompt="a", max_tokens=1)
    first, second = (request.sampling.seed for request in shared.engine.requests[-2:])
    assert first != second


def test_ids_go_in_as_they_are(shared: Running) -> None:
    ids = [65, 66, 67]
    shared.client().completions.create(model="tiny", prompt=ids, max_tokens=1)
    assert shared.engine.requests[-1].prompt_ids == ids
    shared.client().completions.create(model="tiny", prompt=[ids, ids[:1]], max_tokens=1)
    assert [request.prompt_ids for request in shared.engine.requests[-2:]] == [ids, ids[:1]]


def test_all_settings_of_sampling_arrive(shared: Running) -> None:
    shared.client().completions.create(
        model="tiny", prompt="a", max_tokens=3, temperature=0.3, top_p=0.7, seed=-1,
        presence_penalty=0.5, frequency_penalty=-0.5, user="me",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "logit_bias": None},
    )  # fmt: skip
    sampling = shared.engine.requests[-1].sampling
    assert sampling.model_dump() == {
        "temperature": 0.3, "top_p": 0.7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 2**63 - 1, "max_new_tokens": 3,
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_stop_text_ends_the_answer_and_the_work(shared: Running, stream: bool) -> None:
    body = {**PROMPT, "max_tokens": 100, "stop": ["then", "never"], "stream": stream}
    data = shared.opened(body).read().decode()
    if stream:
        events = [json.loads(line[6:]) for line in data.split("\n\n") if line.startswith("data: {")]
        text = "".join(event["choices"][0]["text"] for event in events)
        finish = events[-1]["choices"][0]["finish_reason"]
    else:
        choice = json.loads(data)["choices"][0]
        text, finish = choice["text"], choice["finish_reason"]
    assert (text, finish) == ("Aá€🦙 and ", "stop")
    shared.wait_for("puna_running", 0)


def test_logprobs_of_completions(shared: Running) -> None:
    done = shared.client().completions.create(
        model="tiny", prompt="xy", max_tokens=3, logprobs=2, echo=True
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert done.choices[0].text == "xyAá"
    assert logprobs.tokens == [
        "<|begin_of_text|>", "x", "y", "A", "bytes:\\xc3", "bytes:\\xa1",
    ]  # fmt: skip
    assert logprobs.token_logprobs == [None, -1.0, -1.0, -0.5, -0.5, -0.5]
    assert logprobs.text_offset == [0, 0, 1, 2, 3, 3]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[3] == {"!": -1.0, '"': -2.0, "A": -0.5}


def test_prompt_only(shared: Running) -> None:
    done = shared.client().completions.create(
        model="tiny", prompt="xy", max_tokens=0, logprobs=0, echo=True
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("xy", "length")
    assert logprobs.token_logprobs == [None, -1.0, -1.0]
    assert logprobs.top_logprobs is None
    assert done.usage is not None
    assert done.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_chat(shared: Running, stream: bool) -> None:
    answer = shared.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "?"}], logprobs=True, top_logprobs=1,
        stop="€", stream=stream, max_completion_tokens=10,
    )  # fmt: skip
    if stream:
        parts = [chunk.choices[0].logprobs for chunk in answer]  # type: ignore
        content = [entry for part in parts if part is not None for entry in part.content]
    else:
        content = answer.choices[0].logprobs.content  # type: ignore
    # The bytes of the stop text are not part of the answer, and neither are their logprobs.
    assert [entry.bytes for entry in content] == [[65], [0xC3], [0xA1]]
    assert content[0].token == "A"
    assert content[0].logprob == -0.5
    assert [top.bytes for top in content[0].top_logprobs] == [[ord("!")]]


def test_models(shared: Running) -> None:
    client = shared.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "puna"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_prompt_beyond_the_context_is_a_bad_request(shared: Running) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            shared.client().completions.create(model="tiny", prompt="x" * 300, stream=stream)
        assert caught.value.code == "context_length_exceeded"
    assert shared.server.dispatcher is not None
    until(lambda: shared.server.dispatcher.n_outstanding == 0)  # type: ignore


def test_large_prompts_are_encoded_beside_the_loop(shared: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        shared.client().completions.create(model="tiny", prompt="x" * 50_000)
    assert caught.value.code == "context_length_exceeded"


def test_unknown_paths_and_methods(shared: Running) -> None:
    for method, path, expected in (
        ("GET", "/", 404), ("GET", "/v1/embeddings", 404), ("GET", "/v1/completions", 405),
        ("POST", "/health", 405), ("GET", "/v1/completions/", 404),
    ):  # fmt: skip
        status, _, data = shared.request(method, path)
        assert status == expected
        assert json.loads(data)["error"]["code"] == "no_such_endpoint"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("application/x-www-form-urlencoded", b"{}"), ("text/plain", b"{}"), ("", b"")],
)
def test_other_types_of_content_are_refused(
    shared: Running, content_type: str, body: bytes
) -> None:
    status, _, data = shared.request(
        "POST", "/v1/completions", body, {"content-type": content_type}
    )
    assert status == 415
    assert "application/json" in json.loads(data)["error"]["message"]


def test_compressed_bodies_are_refused(shared: Running) -> None:
    status, _, _ = shared.request("POST", "/v1/completions", b"x", {"content-encoding": "gzip"})
    assert status == 415


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a":NaN}', b"[" * 50_000])
def test_bodies_that_are_no_json_object(shared: Running, body: bytes) -> None:
    assert shared.error(body)["code"] == "invalid_json"


def test_body_limit_holds_whatever_the_header_says(shared: Running) -> None:
    large = json.dumps({**PROMPT, "prompt": "x" * 200_000}).encode()
    status, headers, data = shared.request("POST", "/v1/completions", large)
    assert status == 413
    assert headers["connection"] == "close"
    assert json.loads(data)["error"]["code"] == "body_too_large"
    connection = http.client.HTTPConnection("127.0.0.1", shared.server.port, timeout=20)
    chunks = (large[at : at + 10_000] for at in range(0, len(large), 10_000))
    connection.request(  # no length is announced
        "POST", "/v1/completions", chunks, {"content-type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()
    with pytest.raises(openai.APIStatusError) as caught:
        shared.client().completions.create(model="tiny", prompt="x" * 3_000_000)
    assert caught.value.status_code == 413


def test_key_is_asked_for_everywhere_but_at_health() -> None:
    with running(ScriptedModel(SCRIPT), api_key="secret") as server:
        assert server.request("GET", "/health")[0] == 200
        for given in (None, "Bearer wrong", "Bearer ", "Basic secret", "secret", "Bearer sécret"):
            headers = {} if given is None else {"authorization": given}
            status, fields, _ = server.request("GET", "/metrics", headers=headers)
            assert status == 401
            assert fields["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            server.client().completions.create(model="tiny", prompt="a")
        done = server.client(api_key="secret").completions.create(model="tiny", prompt="a")
        assert done.choices[0].text
        # With a key, any name of the host will do.
        named = {"authorization": "bearer secret", "host": "llm.example"}
        assert server.request("GET", "/v1/models", headers=named)[0] == 200


def test_other_hosts_are_refused_on_a_local_server_without_key(shared: Running) -> None:
    for host, expected in (
        ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403),
        ("localhost", 200), ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200),
    ):  # fmt: skip
        assert shared.request("GET", "/v1/models", headers={"host": host})[0] == expected


def test_queue_is_bounded(server: Running) -> None:
    server.engine.gate.clear()
    client = server.client()
    with ThreadPoolExecutor(12) as pool:
        asked = [
            pool.submit(client.completions.create, model="tiny", prompt="a", max_tokens=1)
            for _ in range(8)
        ]
        until(lambda: server.server.dispatcher.n_outstanding == 8)  # type: ignore
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="a")
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        server.engine.gate.set()
        assert [one.result().choices[0].text for one in asked] == ["A"] * 8
    client.completions.create(model="tiny", prompt="a")  # there is room again
    with pytest.raises(openai.BadRequestError, match="asks for 9 choices"):
        client.completions.create(model="tiny", prompt="a", n=9)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_forgotten(server: Running, stream: bool) -> None:
    server.engine.step_s = 0.02
    server.engine.ids = [65] * 100_000
    connection = socket.create_connection(("127.0.0.1", server.server.port))
    body = json.dumps({**PROMPT, "max_tokens": 100_000, "stream": stream, "n": 2}).encode()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    server.wait_for("puna_cache_blocks_used", 2)
    if stream:
        assert connection.recv(100)
    connection.close()
    server.wait_for("puna_cache_blocks_used", 0)
    assert server.metric('puna_cancelled_total{reason="disconnect"}') == 1
    assert server.server.dispatcher is not None
    assert server.server.dispatcher.n_outstanding == 0
    code = 200 if stream else 499
    server.wait_for(f'puna_responses_total{{path="/v1/completions",code="{code}"}}', 1)


def test_timeout() -> None:
    with running(ScriptedModel("x" * 200), timeout_s=0.3) as server:
        server.engine.step_s = 0.05
        with pytest.raises(openai.InternalServerError) as caught:
            server.client(max_retries=2).completions.create(
                model="tiny", prompt="a", max_tokens=200
            )
        assert caught.value.status_code == 504
        assert caught.value.code == "timeout"
        assert len(server.engine.requests) == 1  # the client was told not to try again
        answer = server.client().completions.create(
            model="tiny", prompt="a", max_tokens=200, stream=True
        )
        texts = []
        with pytest.raises(openai.APIError, match="took longer than"):
            texts += [chunk.choices[0].text for chunk in answer]
        server.wait_for("puna_cache_blocks_used", 0)
        assert server.metric('puna_cancelled_total{reason="timeout"}') == 2


def test_who_does_not_read_holds_up_nobody(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "MAX_WAITING_CHARS", 1000)
    server.engine.ids = [65] * 100_000
    server.server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    slow = server.open.enter_context(socket.socket())
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", server.server.port))
    body = json.dumps({**PROMPT, "max_tokens": 200_000, "stream": True}).encode()
    slow.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    server.wait_for('puna_cancelled_total{reason="slow"}', 1)
    server.engine.ids = server.model.tokenizer.encode("B")
    assert server.client().completions.create(model="tiny", prompt="a").choices[0].text == "B"
    server.wait_for("puna_cache_blocks_used", 0)


def test_failed_step_ends_its_requests_only(server: Running, caplog) -> None:
    client = server.client()
    server.engine.failure = RuntimeError("a kernel broke")
    with pytest.raises(openai.InternalServerError, match="RuntimeError: a kernel broke"):
        client.completions.create(model="tiny", prompt="a")
    assert client.completions.create(model="tiny", prompt="a", max_tokens=100).choices[0].text
    server.engine.is_not_finite = True
    with pytest.raises(openai.InternalServerError, match="not finite"):
        client.completions.create(model="tiny", prompt="a")
    assert server.request("GET", "/health")[0] == 200


def test_broken_engine_fails_everything(server: Running) -> None:
    server.engine.gate.clear()
    client = server.client()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.completions.create, model="tiny", prompt="a")
        server.wait_for("puna_queue_length", 0)
        until(lambda: len(server.engine.requests) == 1)
        server.engine.failure = SystemExit("the thread ends")
        server.engine.gate.set()
        with pytest.raises(openai.InternalServerError):
            asked.result()
    until(lambda: server.request("GET", "/health")[0] == 503)
    _, _, data = server.request("GET", "/health")
    assert json.loads(data) == {"status": "failed", "model": "tiny", "error": "SystemExit"}
    with pytest.raises(openai.InternalServerError, match="the engine has failed"):
        client.completions.create(model="tiny", prompt="a")


def test_loading_is_told() -> None:
    gate = threading.Event()

    def load() -> ScriptedModel:
        gate.wait()
        return ScriptedModel(SCRIPT)

    with running(load, wait=False) as server:
        status, _, data = server.request("GET", "/health")
        assert (status, json.loads(data)["status"]) == (503, "loading")
        status, headers, _ = server.request("POST", "/v1/completions", PROMPT)
        assert (status, headers["retry-after"]) == (503, "5")
        gate.set()
        until(lambda: server.request("GET", "/health")[0] == 200)
        assert server.request("POST", "/v1/completions", PROMPT)[0] == 200


def test_model_that_does_not_load_ends_the_server() -> None:
    def load() -> ScriptedModel:
        raise PunaError("there is no model", "make one")

    caught: list[BaseException] = []
    with running(ScriptedModel(SCRIPT)) as server:
        other = type(server.server)(
            load, server.server.address, server.server.limits, server.server.generation
        )

        def run() -> None:
            try:
                other.run()
            except PunaError as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    assert [str(error) for error in caught] == ["there is no model\n  fix: make one"]


def test_taken_port_is_a_clear_error(shared: Running) -> None:
    address = type(shared.server.address)("127.0.0.1", shared.server.port)
    with pytest.raises(PunaError, match=f"cannot listen at 127.0.0.1:{shared.server.port}"):
        type(shared.server)(
            shared.server._load, address, shared.server.limits, shared.server.generation
        )


def test_stop_lets_streams_finish() -> None:
    with running(ScriptedModel(SCRIPT)) as server:
        server.engine.step_s = 0.02
        response = server.opened({**PROMPT, "stream": True, "max_tokens": 100})
        server.server.stop()
        until(lambda: server.request("GET", "/health")[0] == 503)
        _, _, data = server.request("GET", "/health")
        assert json.loads(data)["status"] == "draining"
        assert server.request("POST", "/v1/completions", PROMPT)[0] == 503
        assert response.read().decode().endswith("data: [DONE]\n\n")
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_grace_ends() -> None:
    with running(ScriptedModel("x" * 10_000), grace_s=0.2) as server:
        server.engine.step_s = 0.02
        response = server.opened({**PROMPT, "stream": True, "max_tokens": 10_000})
        whole = ThreadPoolExecutor(1).submit(
            server.request, "POST", "/v1/completions", {**PROMPT, "max_tokens": 10_000}
        )
        server.wait_for("puna_running", 2)
        server.server.stop()
        data = response.read().decode()
        assert "the server is shutting down" in data
        assert "[DONE]" not in data
        assert whole.result()[0] == 503
        server.thread.join(20)
        assert not server.thread.is_alive()


def received(client: socket.socket) -> bytes:
    try:
        return client.recv(100)
    except ConnectionResetError:
        return b""


def test_heads_must_come_soon_and_be_small(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    for start in (b"", b"GET /health HTTP/1.1\r\nhost: "):
        with socket.create_connection(("127.0.0.1", server.server.port), timeout=20) as client:
            client.sendall(start)
            assert received(client) == b""
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 20)
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=20) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000)
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")


def test_connection_is_used_again_after_errors(shared: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", shared.server.port, timeout=20)
    for body, expected in ((b"{", 400), (json.dumps(PROMPT).encode(), 200)) * 2:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == expected
        response.read()
    connection.close()


def test_slow_body_is_not_waited_for(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.serve.asgi.BODY_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", shared.server.port), timeout=20) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 10\r\n\r\n{"
        )
        start_s = time.monotonic()
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - start_s < 15
