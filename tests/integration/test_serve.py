"""``puna serve`` as a process: real engine, real signals, the official client."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from puna.lm.load import load
from puna.model.config import LlamaConfig
from puna.model.formats.hf import save_hf
from puna.model.llama import Llama
from tests.conftest import puna
from tests.unit.byte_model import N_SPECIAL, byte_tokenizer
from tests.unit.serving import until

pytestmark = pytest.mark.xdist_group("serve")

CONFIG = LlamaConfig(
    vocab_size=256 + N_SPECIAL, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96,
    max_seq_len=16_384,
)  # fmt: skip
START_S = 120
LONG = 15_000  # tokens; takes far longer than what is done to it meanwhile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that varies what it says and never ends."""
    model = Llama(CONFIG)
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
        assert model.output is not None
        model.output.weight[256:] = 0  # special tokens: logit 0, others reach far above
    path = tmp_path_factory.mktemp("models") / "model"
    save_hf(path, CONFIG, model.state_dict())
    tokenizer.save(path)
    return path


class Served:
    """A running ``puna serve``."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "puna.cli.main", "serve", str(folder), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r" at (http://\S+)/v1 ", self.line)
        assert found, self.end()
        self.url = found[1]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0)

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Send a signal if any; the exit code and what was written to standard error."""
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[Served, openai.OpenAI]]:
    server = Served(folder, *options)
    try:
        with openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="key", max_retries=0, timeout=60
        ) as client:
            yield server, client
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[tuple[Served, openai.OpenAI]]:
    with served(folder, "--port", "0", "--batch-invariant") as pair:
        yield pair


def test_first_line_tells_where_and_what(shared: tuple[Served, openai.OpenAI]) -> None:
    server, client = shared
    assert re.fullmatch(
        r"serving model at http://127.0.0.1:\d+/v1 \[weights [\d.]+ KiB, cache up to "
        r"[\d.]+ [KMG]iB \(\d+ tokens\), 64 sequences at once\]\n",
        server.line,
    ), server.line
    assert [model.id for model in client.models.list()] == ["model"]


def test_concurrent_streams_equal_lone_requests(
    shared: tuple[Served, openai.OpenAI], folder: Path
) -> None:
    server, client = shared
    asked = [
        {"prompt": "x" * (1 + 7 * i % 50) + str(i), "seed": i, "temperature": i % 3 / 2}
        for i in range(36)
    ]

    def stream(one: dict) -> str:
        chunks = client.completions.create(model="model", max_tokens=40, stream=True, **one)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(36) as pool:
        together = list(pool.map(stream, asked))
    language_model = load(folder)
    alone = [
        language_model.generate(
            one["prompt"], max_new_tokens=40, seed=one["seed"], temperature=one["temperature"],
            top_p=1.0,
        )
        for one in asked
    ]  # fmt: skip
    assert together == alone
    assert len(set(together)) > 30
    assert server.metric("puna_cache_blocks_used") == 0


def test_chat_equals_the_python_interface(
    shared: tuple[Served, openai.OpenAI], folder: Path
) -> None:
    messages = [{"role": "user", "content": "hello"}]
    done = shared[1].chat.completions.create(
        model="model", messages=messages, max_tokens=20, temperature=0  # type: ignore
    )  # fmt: skip
    expected = load(folder).generate(messages, max_new_tokens=20, temperature=0)
    assert done.choices[0].message.content == expected
    assert done.choices[0].finish_reason == "length"


def test_logprobs_are_those_of_the_model(
    shared: tuple[Served, openai.OpenAI], folder: Path
) -> None:
    ids = [256, *range(40, 60)]
    done = shared[1].completions.create(
        model="model", prompt=ids, max_tokens=4, temperature=0, logprobs=3, echo=True
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    language_model = load(folder)
    ids += language_model.generate_ids(ids, max_new_tokens=4, temperature=0)
    expected = language_model.logits(ids).log_softmax(-1)
    found = torch.tensor(logprobs.token_logprobs[1:])
    wanted = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    best = torch.tensor([max(top.values()) for top in logprobs.top_logprobs[1:]])
    torch.testing.assert_close(best, expected[:-1].amax(-1), atol=1e-3, rtol=0)


def test_who_disconnects_frees_the_cache(shared: tuple[Served, openai.OpenAI]) -> None:
    server, client = shared
    chunks = client.completions.create(
        model="model", prompt="a", max_tokens=LONG, temperature=0, stream=True
    )
    next(iter(chunks))
    assert server.metric("puna_cache_blocks_used") > 0
    chunks.response.close()
    until(lambda: server.metric("puna_cache_blocks_used") == 0)
    assert server.metric('puna_cancelled_total{reason="disconnect"}') == 1
    assert server.metric("puna_running") == 0


def test_flood_gets_429_and_the_rest_is_served(folder: Path) -> None:
    with served(folder, "--port", "0", "--max-batch", "2", "--max-queue", "2") as (_, client):

        def ask(number: int) -> str:
            try:
                client.completions.create(model="model", prompt="a", max_tokens=100, seed=number)
            except openai.RateLimitError:
                return "full"
            return "served"

        with ThreadPoolExecutor(24) as pool:
            results = list(pool.map(ask, range(24)))
        assert set(results) == {"full", "served"}
        assert results.count("served") >= 4
        assert ask(0) == "served"


def test_sigterm_lets_a_stream_finish(folder: Path) -> None:
    with served(folder, "--port", "0") as (server, client):
        chunks = client.completions.create(
            model="model", prompt="a", max_tokens=600, temperature=0, stream=True
        )
        seen = [next(iter(chunks))]
        server.process.send_signal(signal.SIGTERM)
        seen += list(chunks)
        assert seen[-1].choices[0].finish_reason == "length"
        code, errors = server.end()
        assert code == 0
        assert "Traceback" not in errors


def test_second_ctrl_c_ends_a_stream_with_an_error(folder: Path) -> None:
    with served(folder, "--port", "0", "--grace-s", "600") as (server, client):
        chunks = client.completions.create(
            model="model", prompt="a", max_tokens=LONG, temperature=0, stream=True
        )
        next(iter(chunks))
        server.process.send_signal(signal.SIGINT)
        until(lambda: not is_ready(server))
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
        code, errors = server.end()
        assert code == 0
        assert "Traceback" not in errors


def is_ready(server: Served) -> bool:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        return client.recv(15).startswith(b"HTTP/1.1 200")


def test_killed_server_can_be_started_again_at_once(folder: Path) -> None:
    with served(folder, "--port", "0") as (server, client):
        chunks = client.completions.create(
            model="model", prompt="a", max_tokens=LONG, temperature=0, stream=True
        )
        next(iter(chunks))
        server.process.kill()
        with pytest.raises(openai.APIConnectionError):
            list(chunks)
        server.process.wait()
        port = str(server.port)
    with served(folder, "--port", port) as (again, client):
        assert again.port == int(port)
        assert client.completions.create(model="model", prompt="a", max_tokens=1).choices[0].text


def test_key_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNA_API_KEY", "key")
    with served(folder, "--port", "0", "--name", "mine") as (server, client):
        assert client.completions.create(model="mine", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        assert is_ready(server)


def test_warning_when_others_can_reach_it(folder: Path) -> None:
    with served(folder, "--port", "0", "--host", "0.0.0.0") as (server, _):
        code, errors = server.end(signal.SIGTERM)
    assert code == 0
    assert "warning: 0.0.0.0 can be reached by other machines" in errors


def test_what_cannot_be_served_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, message in (
            ((str(tmp_path / "nowhere"),), "does not exist"),
            ((str(folder), "--port", port), f"cannot listen at 127.0.0.1:{port}"),
            ((str(folder), "--host", "192.0.2.1"), "cannot listen at 192.0.2.1:8000"),
            ((str(bare), "--port", "0"), "has no tokenizer"),
            ((str(folder), "--api-key", " "), "--api-key must be"),
        ):
            done = puna(tmp_path, "serve", *options)
            assert done.returncode == 2, done.stderr
            assert message in done.stderr
            assert "Traceback" not in done.stderr


def test_missing_extra_is_named(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from puna.cli.main import entry; entry(['serve', sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'puna[serve]'" in done.stderr
    assert "Traceback" not in done.stderr
