"""What waiting for data costs: five sources in a store, batches made ahead and not.

    python benchmarks/bench_feed.py [--steps 12] [--rounds 3] [--delay-ms 60]

A web server in a process of its own gives out the shards; every request waits first (60 ms: a
store's latency and 4 MiB at 100 MB/s). A small Llama (15.7M parameters, rows of 512 tokens, 4 per
step) trains on them in this process through the real loop, with an empty cache, once with batches
made when they are needed and once with two made ahead, in turn. The last pair has a cache of a
quarter of the data, so that every step downloads. The first step, for which nothing can be made
ahead, is shown apart. Then what a batch costs alone, with and without the hashes of its blocks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import PRESETS
from puna.resilience.heartbeat import HeartbeatWriter
from puna.tokens.loader import PackedLoader
from puna.tokens.remote import Cache
from puna.train.config import CheckpointConfig, TrainingConfig
from puna.train.loop import train
from puna.train.parallel.world import World
from puna.train.spec import JobSpec, SourceSpec
from tests.unit.range_server import Server
from tests.unit.token_shards import seal

N_SOURCES, SEQ_LEN, ROWS = 5, 512, 4
VOCAB = 8192


def write(folder: Path, n_tokens: int) -> int:
    """Write five sources of random tokens; return the bytes of all tokens."""
    import json

    rng, index = np.random.default_rng(0), {}
    for number in range(N_SOURCES):
        where = folder / "train" / f"source{number}"
        where.mkdir(parents=True)
        lengths = rng.integers(20, 2000, n_tokens // 1000)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        rng.integers(3, VOCAB, offsets[-1], dtype=np.uint16).tofile(where / "tokens.bin")
        np.save(where / "offsets.npy", offsets)
        np.save(where / "ids.npy", np.array([f"{i:09d}" for i in range(len(lengths))], "S32"))
        np.save(where / "n_bytes.npy", lengths.astype(np.int64))
        counts = {"n_docs": len(lengths), "n_tokens": int(offsets[-1]), "n_bytes": 1}
        index[where.name] = counts
    text = {"dtype": "uint16", "vocab_size": VOCAB, "splits": {"train": index}}
    (folder / "index.json").write_text(json.dumps(text))
    seal(folder)
    return sum(2 * counts["n_tokens"] for counts in index.values())


def serve(folder: Path, delay_s: float, port: Any) -> None:
    """Give out a folder for ever."""
    server = Server(folder)
    server.delay_s = delay_s
    port.put(server.server_address[1])
    server.serve_forever()


def run(url: str, depth: int, steps: int, max_bytes: int) -> tuple[float, float, float]:
    """Train from an empty cache; return seconds of a step, of waiting in it, and in the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loader = PackedLoader(
            url, "train", None, SEQ_LEN, ROWS, 0, cache=Cache(folder / "cache", max_bytes)
        )
        spec = JobSpec(
            job="bench", out=folder, ledger=folder / LEDGER_FILE, common={},
            source=SourceSpec(**loader.spec()), model=PRESETS.get("small"), weights=None,
            special_ids={},
            training=TrainingConfig(
                steps=steps, seq_len=SEQ_LEN, global_batch=ROWS, precision="fp32", prefetch=depth,
                checkpoint=CheckpointConfig(every=steps),
            ),
        )  # fmt: skip
        spec.attempt_dir(0).mkdir(parents=True)
        world = World(0, 1, torch.device("cpu"), 1, None)
        train(spec, 0, world, HeartbeatWriter(spec.attempt_dir(0), 0), Ledger(spec.ledger))
        events = list(read_events(folder / LEDGER_FILE, "train.step"))
    later = events[1:]
    step_s = sum(event["step_s"] for event in later) / len(later)
    data_s = sum(event["data_s"] for event in later) / len(later)
    return step_s, data_s, events[0]["data_s"]


def cost_of_a_batch(folder: Path, steps: int = 150) -> dict[str, float]:
    """CPU milliseconds of a batch of 64 rows: hashes checked the first time, and known."""
    found: dict[str, list[float]] = {}
    for _ in range(5):
        loader = PackedLoader(folder, "train", None, SEQ_LEN, 64, 0)
        for name in ("blocks hashed on the way", "blocks known"):
            begin = time.process_time()
            for step in range(steps):
                loader.batch(step, 0, 1)
            found.setdefault(name, []).append((time.process_time() - begin) / steps * 1e3)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=60.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_bytes = write(folder, 8_000_000)
        port = multiprocessing.get_context("spawn").Queue()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(folder, given.delay_ms / 1e3, port), daemon=True
        )
        server.start()
        url = f"http://127.0.0.1:{port.get()}"
        print(f"{N_SOURCES} sources, {n_bytes / 1e6:.0f} MB, {given.delay_ms:g} ms per request")
        print(f"{'cache':<22}{'ahead':>6}{'step s':>9}{'stall':>9}{'first step waits s':>20}")
        kinds = [("all of it", 1 << 34), ("a quarter", n_bytes // 4)]
        results: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        for _ in range(given.rounds):
            for kind, max_bytes in kinds:
                for depth in (0, 2):
                    found = run(url, depth, given.steps, max_bytes)
                    results.setdefault((kind, depth), []).append(found)
        for (kind, depth), rows in results.items():
            step_s, _, first_s = map(statistics.median, zip(*rows, strict=True))
            stall = statistics.median(row[1] / row[0] for row in rows)
            print(f"{kind:<22}{depth:>6}{step_s:>9.3f}{stall:>9.2%}{first_s:>20.3f}")
        for what, cost_ms in cost_of_a_batch(folder).items():
            print(f"a batch of 64 rows of {SEQ_LEN} tokens, {what}: {cost_ms:.2f} CPU ms")
        server.kill()


if __name__ == "__main__":
    main()
