"""The server under many clients against the same engine without HTTP, in one run.

    python benchmarks/bench_serve.py [--clients 64] [--seconds 60] [--rounds 2] [--dtype bfloat16]

Three processes share the machine: ``puna serve``, one with all clients (asyncio streams, no client
library), and one that drives an engine directly with as many requests at once. In every round first
one of them works, then the other, for the same time on the same prompts, of which the same share
ends midway: there the client closes its connection, here the request is cancelled. Rates are of
generated tokens after a lead-in; the share of the offline rate is the median over the rounds.

Exits with 1 when a request failed, or cache blocks or places in the queue leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TEXT = (
    "A model server keeps the weights in memory and answers many readers at once. Each of them "
    "sends a prompt, waits a moment, and then sees the words arrive one after the other. Some read "
    "to the end; others close the page in the middle, and what was reserved for them must be given "
    "to whoever comes next. "
) * 4
LEAD_S = 3.0
TOKENS, CPU = "puna_generated_tokens_total", "process_cpu_seconds_total"


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: str
    seed: int
    max_tokens: int
    leave_after: int | None  # tokens after which it is given up


@dataclass(frozen=True)
class Load:
    """What is asked of both sides."""

    clients: int
    seconds: float
    max_tokens: int
    leaving: float
    seed: int

    def ask(self, client: int, number: int) -> Ask:
        """A client's request. Lengths differ, or all would prompt and decode in step."""
        draw = random.Random(f"{self.seed}/{client}/{number}")
        start = draw.randrange(len(TEXT) // 2)
        text = TEXT[start : start + draw.randrange(80, 400)]
        max_tokens = draw.randint(self.max_tokens // 2, self.max_tokens * 3 // 2)
        leave_after = max_tokens // 2 if draw.random() < self.leaving else None
        return Ask(text, client * 100_000 + number, max_tokens, leave_after)


@dataclass
class Tally:
    """What the clients saw."""

    n_requests: int = 0
    n_left: int = 0
    n_tokens: int = 0
    cpu_s: float = 0.0
    errors: list[str] = field(default_factory=list)


# --- the clients, one process ---------------------------------------------------------------------


async def ask(url: str, load: Load, client: int, number: int, tally: Tally) -> None:
    """One streamed request, read to its end or given up midway."""
    asked = load.ask(client, number)
    body = json.dumps(
        {"model": "bench", "prompt": asked.prompt, "max_tokens": asked.max_tokens, "stream": True,
         "seed": asked.seed}
    ).encode()  # fmt: skip
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )
        status = await reader.readline()
        if b" 200 " not in status:
            tally.errors.append(status.decode().strip())
            return
        tally.n_requests += 1
        n_events = 0
        tail = b""
        while not tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            data = await reader.read(65536)
            if not data:
                tally.errors.append("the stream ended early")
                return
            n_events += data.count(b'"index":0')
            tail = (tail + data)[-64:]
            if asked.leave_after is not None and n_events >= asked.leave_after:
                tally.n_left += 1
                break
            if b'"error":' in data:
                tally.errors.append(data.decode(errors="replace"))
                return
        tally.n_tokens += n_events
    except OSError as error:
        tally.errors.append(repr(error))
    finally:
        writer.close()


async def run_clients(url: str, load: Load) -> Tally:
    """Every client asks again as soon as it has its answer, until the time is over."""
    tally = Tally()
    end_s = time.monotonic() + load.seconds

    async def run(client: int) -> None:
        number = 0
        while time.monotonic() < end_s:
            await ask(url, load, client, number, tally)
            number += 1

    start_cpu_s = time.process_time()
    await asyncio.gather(*(run(client) for client in range(load.clients)))
    tally.cpu_s = time.process_time() - start_cpu_s
    return tally


def serve_as_clients(url: str) -> None:
    """Take loads from standard input, print tallies."""
    for line in sys.stdin:
        print(
            json.dumps(asdict(asyncio.run(run_clients(url, Load(**json.loads(line)))))), flush=True
        )


# --- the engine alone, one process ----------------------------------------------------------------


def run_offline(language_model: Any, engine: Any, load: Load) -> tuple[float, float]:
    """The same requests without HTTP; tokens per second and CPU seconds per token."""
    from puna.lm.engine.types import Request
    from puna.model.sampling import Sampling

    numbers = dict.fromkeys(range(load.clients), 0)
    left: dict[str, int | None] = {}
    counts: dict[str, int] = {}
    start_s = time.monotonic()
    n_tokens, lead_tokens, lead_s, lead_cpu_s = 0, 0, None, 0.0

    def submit(client: int) -> None:
        number = numbers[client]
        numbers[client] += 1
        asked = load.ask(client, number)
        name = f"{client}/{number}"
        sampling = Sampling(
            temperature=1.0, top_p=1.0, seed=asked.seed, max_new_tokens=asked.max_tokens
        )
        ids = language_model.encode_prompt(asked.prompt)
        engine.submit(Request(name, ids, sampling, language_model.stop_ids))
        left[name], counts[name] = asked.leave_after, 0

    for client in range(load.clients):
        submit(client)
    while (now_s := time.monotonic()) < start_s + load.seconds:
        if lead_s is None and now_s >= start_s + LEAD_S:
            lead_s, lead_tokens, lead_cpu_s = now_s, n_tokens, time.process_time()
        for event in engine.step():
            name = event.request_id
            if event.token is not None:
                n_tokens += 1
                counts[name] += 1
                if counts[name] == left[name] and event.finish is None:
                    engine.cancel(name)
            if event.finish is not None:
                submit(int(name.partition("/")[0]))
    assert lead_s is not None
    n_tokens -= lead_tokens
    rate = n_tokens / (time.monotonic() - lead_s)
    cpu_s = (time.process_time() - lead_cpu_s) / n_tokens
    for name in left:
        engine.cancel(name)
    engine.step()
    return rate, cpu_s


def serve_offline(options: dict[str, Any], max_batch: int) -> None:
    """Load the model, then take loads from standard input, print rates."""
    from peers import smollm2_path

    from puna.lm.load import load as load_model

    language_model = load_model(smollm2_path(), **options)
    engine = language_model.engine(max_batch=max_batch)
    language_model.generate_ids([0, 0], max_new_tokens=2)  # compiles, as the server does
    print("ready", flush=True)
    for line in sys.stdin:
        print(*run_offline(language_model, engine, Load(**json.loads(line))), flush=True)


# --- the whole ------------------------------------------------------------------------------------


class Child:
    """A process that answers each line of its input with one line."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> str:
        """The next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended")
        return line.strip()

    def send(self, load: Load) -> None:
        """Give it a load."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(load)) + "\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """End it in an orderly way."""
        self.process.terminate()
        self.process.communicate(timeout=60)


def metrics(url: str) -> dict[str, float]:
    """The samples of the server."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


@dataclass(frozen=True)
class Round:
    """One round against the server: what it did after the lead-in, its counts afterwards."""

    rate: float
    cpu_s_per_token: float
    tally: Tally
    after: dict[str, float]


def run_server(url: str, clients: Child, load: Load) -> Round:
    """Let the clients work."""
    clients.send(load)
    time.sleep(LEAD_S)
    start_s, before = time.monotonic(), metrics(url)
    time.sleep(load.seconds - LEAD_S)
    now, seconds = metrics(url), time.monotonic() - start_s
    used = {name: now[name] - before[name] for name in (TOKENS, CPU)}
    tally = Tally(**json.loads(clients.read()))
    for _ in range(100):
        after = metrics(url)
        if not after["puna_cache_blocks_used"] and not after["puna_queue_length"]:
            break
        time.sleep(0.1)
    return Round(used[TOKENS] / seconds, used[CPU] / max(used[TOKENS], 1), tally, after)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="of serving, per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--leaving", type=float, default=0.1, help="share that disconnects midway")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", choices=("int8",))
    parser.add_argument("--part", choices=("clients", "offline"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "clients":
        serve_as_clients(options.url)
        return 0
    loading = {"dtype": options.dtype, "quantize": options.quantize}
    if options.part == "offline":
        serve_offline(loading, options.clients)
        return 0
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Start the processes, run the rounds, print the table."""
    from peers import smollm2_path

    kind = ["--dtype", options.dtype]
    kind += ["--quantize", options.quantize] if options.quantize else []
    me = str(Path(__file__))
    children = [
        Child("-m", "puna.cli.main", "serve", str(smollm2_path()), "--port", "0", "--name", "bench",
              "--max-batch", str(options.clients), *kind),
        Child(me, "--part", "offline", "--clients", str(options.clients), *kind),
    ]  # fmt: skip
    try:
        url = children[0].read().split(" at ")[1].split("/v1")[0]
        children[1].read()
        children.append(Child(me, "--part", "clients", "--url", url))
        return run_rounds(url, children[1], children[2], options)
    finally:
        for child in reversed(children):
            child.stop()


def run_rounds(url: str, offline: Child, clients: Child, options: argparse.Namespace) -> int:
    """Alternate between the two sides."""
    seconds = options.seconds + LEAD_S
    shares, total, resident = [], Tally(), []
    after: dict[str, float] = {}
    print(f"{'':>5} {'tokens/s':>17} {'':>7} {'CPU ms per token':>27}\n"
          f"{'round':>5} {'offline':>8} {'server':>8} {'share':>7} {'offline':>8} {'server':>8} "
          f"{'clients':>9} {'RSS MiB':>8} {'cache MiB':>10}")  # fmt: skip
    for number in range(options.rounds):
        load = Load(options.clients, seconds, options.max_tokens, options.leaving, number)
        offline.send(load)
        alone, alone_cpu_s = map(float, offline.read().split())
        served = run_server(url, clients, load)
        tally, after = served.tally, served.after
        shares.append(served.rate / alone)
        resident.append(after["process_resident_memory_bytes"] / 2**20)
        total.n_requests += tally.n_requests
        total.n_left += tally.n_left
        total.n_tokens += tally.n_tokens
        total.errors += tally.errors
        print(f"{number:>5} {alone:>8.1f} {served.rate:>8.1f} {shares[-1]:>7.1%} "
              f"{1e3 * alone_cpu_s:>8.2f} {1e3 * served.cpu_s_per_token:>8.2f} "
              f"{1e3 * tally.cpu_s / max(tally.n_tokens, 1):>9.3f} {resident[-1]:>8.0f} "
              f"{after['puna_cache_bytes'] / 2**20:>10.0f}", flush=True)  # fmt: skip
    leaked = after["puna_cache_blocks_used"] + after["puna_cache_blocks_reserved"]
    leaked += after["puna_queue_length"] + after["puna_running"]
    print(f"{options.clients} clients: {total.n_requests} requests, {total.n_left} left midway, "
          f"{total.n_tokens} tokens read, {len(total.errors)} errors, {leaked:.0f} leaked, memory "
          f"{resident[-1] - resident[0]:+.0f} MiB from the first round to the last; "
          f"median share of the offline rate {statistics.median(shares):.1%}")  # fmt: skip
    for error in total.errors[:5]:
        print(f"  error: {error[:200]}")
    return 1 if total.errors or leaked else 0


if __name__ == "__main__":
    sys.exit(main())
