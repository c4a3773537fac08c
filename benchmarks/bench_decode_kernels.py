"""The compiled decoding step on SmolLM2-135M, beside the memory's read bandwidth and two peers.

    python benchmarks/bench_decode_kernels.py [--repeats 7] [--steps 8] [--context 128]
        [--threads N] [--batches 1 8 64] [--skip-peers] [--quality] [--json FILE]

Every repeat runs each contender once, so that load from elsewhere hits all of them; medians, and
the best run. A step decodes one token of every sequence of the batch, all with the same context.
The bound of a step is the bytes it must read (every matrix once, the cache of every sequence) over
the bandwidth at which the same threads read a large array in the same repeat. ``--quality`` adds
what int8 weights cost in exactness, on the text of the documentation.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import puna  # isort: skip  # before torch, whose threads it tells how to wait

import numpy as np
import torch
from peers import smollm2_path, transformers_greedy, transformers_model
from rich.console import Console
from rich.table import Table

from puna.data.kernels.buffers import kernel
from puna.lm.cpu.crew import crew_of
from puna.lm.cpu.decoder import CpuDecoder
from puna.lm.cpu.intrinsics import FLOAT32
from puna.lm.cpu.matmul import AHEAD_BYTES, multiply
from puna.lm.engine.pool import KVPool

BUFFER_BYTES = 512 << 20
ROW_BYTES = 4096
_AHEAD_BYTES, _ROW_BYTES, _FLOAT32 = AHEAD_BYTES, ROW_BYTES, FLOAT32
VOCABULARY = 49_152


@kernel
def read_rows(address, first, last, x_C, out_N):
    """Read a part of a large array in the fastest way there is here: row after row, summed."""
    multiply(
        _FLOAT32, address + first * _ROW_BYTES, _ROW_BYTES, 0, last - first, _AHEAD_BYTES,
        x_C.ctypes.data, 0, 1, _ROW_BYTES // 4, out_N.ctypes.data + 4 * first, 0, 0,
    )  # fmt: skip


class Bandwidth:
    """Bytes per second at which all threads read an array far larger than the caches."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.buffer = torch.ones(BUFFER_BYTES // 4)
        self.x_C = torch.ones(ROW_BYTES // 4).numpy()
        self.out_N = np.zeros(BUFFER_BYTES // ROW_BYTES, np.float32)

    def rate(self) -> float:
        """Measure once."""
        n, threads = len(self.out_N), self.n_threads
        address = self.buffer.data_ptr()

        def part(thread):
            read_rows(
                address, n * thread // threads, n * (thread + 1) // threads, self.x_C, self.out_N
            )

        start_s = time.perf_counter()
        crew_of(threads).run(part)
        return BUFFER_BYTES / (time.perf_counter() - start_s)


class Decoding:
    """Tokens per second of the compiled step."""

    def __init__(self, model: Any, batch: int, context: int, n_steps: int, n_threads: int) -> None:
        self.decoder = CpuDecoder(model, n_threads)
        self.pool = KVPool(model.config, model.norm.weight.dtype, "cpu", 1 << 20)
        n_blocks = self.pool.blocks_for(context + 1)
        self.tables_NM = np.array(
            [self.pool.take(n_blocks) for _ in range(batch)], np.int32
        ).reshape(batch, n_blocks)
        self.batch, self.n_steps = batch, n_steps
        self.positions_N = np.full(batch, context, np.int64)
        c = model.config
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        element = self.pool.keys[0].element_size()
        self.step_bytes = weights + 2 * c.n_layers * c.kv_dim * element * context * batch

    def rate(self) -> float:
        """Measure once."""
        tokens_N = np.arange(self.batch, dtype=np.int64)
        start_s = time.perf_counter()
        for _ in range(self.n_steps):
            logits_NV = self.decoder.forward(tokens_N, self.positions_N, self.tables_NM, self.pool)
            tokens_N = logits_NV.numpy().argmax(axis=1)
        return self.batch * self.n_steps / (time.perf_counter() - start_s)


@torch.inference_mode()
def torch_rate(model: Any, batch: int, n_steps: int) -> float:
    """Rows per second of the model's own forward of one position, without a cache to read."""
    tokens_BT = torch.arange(batch).unsqueeze(1)
    start_s = time.perf_counter()
    for _ in range(n_steps):
        tokens_BT = model(tokens_BT)[:, -1].argmax(-1, keepdim=True)
    return batch * n_steps / (time.perf_counter() - start_s)


def transformers_rate(model: Any, n_steps: int, prompt: list[int]) -> float:
    """Tokens per second of ``generate``, the prompt's forward left out."""

    def timed(n: int) -> float:
        start_s = time.perf_counter()
        transformers_greedy(model, prompt, n)
        return time.perf_counter() - start_s

    return n_steps / (timed(n_steps + 1) - timed(1))


@torch.inference_mode()
def quality(n_tokens: int, window_tokens: int) -> str:
    """int8 against float32, per token of a text in windows."""
    exact, rounded = puna.load(smollm2_path()), puna.load(smollm2_path(), quantize="int8")
    pages = sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    ids = exact.tokenizer.encode("\n".join(page.read_text() for page in pages))[:n_tokens]
    divergence, same, n_bytes, bits = [], 0, 0, [0.0, 0.0]
    for start in range(0, n_tokens, window_tokens):
        window = ids[start : start + window_tokens]
        logs = [model.logits(window).log_softmax(-1) for model in (exact, rounded)]
        divergence.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
        same += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        following = torch.tensor(window[1:]).unsqueeze(1)
        for i, log in enumerate(logs):
            bits[i] -= float(log[:-1].gather(1, following).sum()) / math.log(2)
        n_bytes += len(exact.tokenizer.decode(window[1:]).encode())
    return (
        f"int8 against fp32 on {n_tokens} tokens: KL {torch.cat(divergence).mean():.4f} nats, same "
        f"most likely token {same / n_tokens:.1%}, bits per byte {bits[0] / n_bytes:.4f} -> "
        f"{bits[1] / n_bytes:.4f}"
    )


def measure(
    arguments: argparse.Namespace,
) -> tuple[dict[str, list[float]], dict[str, Decoding], int]:
    n_threads = torch.get_num_threads()
    path = smollm2_path()
    models = {
        "fp32": puna.load(path).model,
        "bf16": puna.load(path, dtype="bfloat16").model,
        "int8": puna.load(path, quantize="int8").model,
    }
    ours = {
        f"{name}, batch {batch}": Decoding(
            model, batch, arguments.context, max(2, arguments.steps // (1 + batch // 8)), n_threads
        )
        for batch in arguments.batches
        for name, model in models.items()
    }
    runs: dict[str, Callable[[], float]] = {"bandwidth": Bandwidth(n_threads).rate}
    runs |= {name: one.rate for name, one in ours.items()}
    if not arguments.skip_peers:
        prompt = np.random.default_rng(0).integers(0, VOCABULARY, arguments.context).tolist()
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            peer = transformers_model(path, dtype)
            runs[f"transformers {name}, batch 1"] = lambda p=peer: transformers_rate(
                p, arguments.steps, prompt
            )
            for batch in arguments.batches:
                runs[f"torch {name}, batch {batch}"] = lambda m=models[name], b=batch: torch_rate(
                    m, b, max(2, arguments.steps // (1 + b // 8))
                )
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, run in runs.items():
            rate = run()
            if repeat:
                rates[name].append(rate)
    return rates, ours, n_threads


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="per run, of a batch of 1")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--threads", type=int, help="of all contenders; PyTorch's number if left out"
    )
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--json", type=Path, help="write every number here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start_s = time.perf_counter()
    rates, ours, n_threads = measure(arguments)

    def ratio(a: str, b: str) -> str:
        if a not in rates or b not in rates:
            return ""
        return f"{statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True)):.2f}x"

    bandwidth = rates["bandwidth"]
    table = Table(
        title=f"SmolLM2-135M, context {arguments.context}, {n_threads} threads, read bandwidth "
        f"{statistics.median(bandwidth) / 1e9:.1f} GB/s (best {max(bandwidth) / 1e9:.1f})",
        title_justify="left",
    )
    for name in ("", "tokens/s", "best", "of bound", "best of best", "to fp32", "to batch 1",
                 "to torch", "to transformers"):  # fmt: skip
        table.add_column(name, justify="left" if not name else "right")
    for name, values in rates.items():
        if name == "bandwidth":
            continue
        row = [name, f"{statistics.median(values):.1f}", f"{max(values):.1f}"]
        if name in ours:
            one = ours[name]
            per_token = one.step_bytes / one.batch
            kind, _, size = name.partition(", ")
            row += [
                f"{statistics.median(v * per_token / b for v, b in zip(values, bandwidth, strict=True)):.0%}",  # noqa: E501
                f"{max(values) * per_token / max(bandwidth):.0%}",
                ratio(name, f"fp32, {size}"),
                ratio(name, f"{kind}, batch 1"),
                ratio(name, f"torch {name}"),
                ratio(name, f"transformers {name}"),
            ]
        table.add_row(*row)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if arguments.quality:
        console.print(quality(1024, 256))
    console.print(f"{time.perf_counter() - start_s:.0f} s in all")
    if arguments.json:
        arguments.json.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
