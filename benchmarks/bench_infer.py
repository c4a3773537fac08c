"""Inference on the real model, SmolLM2-135M, beside transformers and Meta's reference code.

    python benchmarks/bench_infer.py [--repeats 5] [--new 64] [--prefill 512] [--skip-meta]
                                     [--json FILE]

Prints whether logits and greedy continuations agree, then rates as medians of interleaved runs:
every repeat runs each contender once, one after the other, so that load from elsewhere hits all of
them. Decoding is measured as n tokens over t(n + 1 tokens) - t(1 token), the prompt left out. The
bound is the bytes of the weights that one token reads, over the read bandwidth of the same repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import puna  # isort: skip  # before torch, whose threads it tells how to wait

import numpy as np
import torch
from numba import njit, prange
from peers import meta_greedy, meta_model, smollm2_path, transformers_greedy, transformers_model
from rich.console import Console
from rich.table import Table

from puna.lm.engine.engine import Engine
from puna.lm.engine.types import Request
from puna.model.sampling import Sampling

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a land far away,",
    "The three laws of motion are",
)
Runs = dict[str, Callable[[], float]]


@njit(parallel=True, fastmath=True)
def _sum(values):
    total = np.float32(0)
    for i in prange(len(values)):
        total += values[i]
    return total


def read_bandwidth(buffer: np.ndarray) -> float:
    """Bytes per second at which all threads read an array far larger than the caches."""
    start_s = time.perf_counter()
    _sum(buffer)
    return buffer.nbytes / (time.perf_counter() - start_s)


def timed(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def decode_rate(run: Callable[[int], object], n_new: int, batch: int = 1) -> float:
    """Tokens per second of ``batch`` sequences, the prompt's forward left out."""
    first_s = timed(lambda: run(1))
    return batch * n_new / (timed(lambda: run(n_new + 1)) - first_s)


def engine_greedy(engine: Engine, prompts: list[list[int]], n_new: int) -> list[list[int]]:
    """Greedy continuations of exactly ``n_new`` tokens by our engine."""
    out: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    sampling = Sampling(temperature=0.0, max_new_tokens=n_new)
    for i, prompt in enumerate(prompts):
        engine.submit(Request(str(i), prompt, sampling))
    while engine.has_work:
        for event in engine.step():
            if event.token is not None:
                out[event.request_id].append(event.token)
    return list(out.values())


def interleave(runs: Runs, repeats: int) -> dict[str, list[float]]:
    """Every contender once per repeat, after one warm-up round."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            rate = run()
            if repeat:
                rates[name].append(rate)
    return rates


def agreement(ours: Any, peer: Any, prompts: list[list[int]], n_new: int) -> dict[str, Any]:
    """Logits and greedy continuations against transformers, in float32."""
    engine = Engine(ours.model)
    mine = engine_greedy(engine, prompts, n_new)
    theirs = [transformers_greedy(peer, prompt, n_new) for prompt in prompts]
    worst = 0.0
    with torch.inference_mode():
        for prompt, new in zip(prompts, theirs, strict=True):
            ids = prompt + new
            logits_TV = peer(torch.tensor([ids])).logits[0]
            worst = max(worst, float((ours.logits(ids) - logits_TV).abs().max()))
    return {
        "logits_max_difference": worst,
        "greedy_identical": sum(a == b for a, b in zip(mine, theirs, strict=True)),
        "greedy_prompts": len(prompts),
        "greedy_tokens": n_new,
        "greedy": mine,
    }


def meta_agreement(ours: Any, prompts: list[list[int]], greedy: list[list[int]]) -> dict[str, Any]:
    """The same against Meta's reference, which loads the Meta folder that puna writes."""
    n_new = len(greedy[0])
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "meta"
        command = ["model", "convert", str(smollm2_path()), str(target), "--to", "meta",
                   "--dtype", "float32"]  # fmt: skip
        subprocess.run([sys.executable, "-m", "puna.cli.main", *command], check=True)
        params = json.loads((target / "params.json").read_text())
        state = torch.load(target / "consolidated.00.pth", weights_only=True)
    model = meta_model(params, state, max_seq_len=1024)
    worst, same = 0.0, 0
    with torch.inference_mode():
        for prompt, new in zip(prompts, greedy, strict=True):
            ids = prompt + new
            difference = model(torch.tensor([ids]), 0)[0] - ours.logits(ids)
            worst = max(worst, float(difference.abs().max()))
            same += meta_greedy(model, prompt, n_new) == new
    return {"logits_max_difference": worst, "greedy_identical": same, "greedy_tokens": n_new}


def decoding(
    repeats: int, n_new: int, n_prefill: int, prompts: list[list[int]], peers: dict[str, Any]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Decoding and prefill rates of every contender, and the bytes a token reads."""
    path = smollm2_path()
    models = {
        "fp32": puna.load(path),
        "bf16": puna.load(path, dtype="bfloat16"),
        "int8": puna.load(path, quantize="int8"),
    }
    n_bytes = {
        name: sum(t.numel() * t.element_size() for t in one.model.state_dict().values())
        for name, one in models.items()
    }
    engines = {name: Engine(one.model) for name, one in models.items()}
    eight = [(prompt * 8)[:16] for prompt in (prompts * 2)[:8]]
    long = np.random.default_rng(0).integers(0, 49_152, n_prefill).tolist()
    buffer = np.ones(64 << 20, np.float32)
    runs: Runs = {"read bandwidth": lambda: read_bandwidth(buffer)}

    def ours(engine: Engine, batch: list[list[int]]) -> Callable[[int], object]:
        return lambda n: engine_greedy(engine, batch, n)

    def theirs(peer: Any) -> Callable[[int], object]:
        return lambda n: transformers_greedy(peer, prompts[0], n)

    for name, engine in engines.items():
        runs[f"{name}, batch 1"] = lambda e=engine: decode_rate(ours(e, prompts[:1]), n_new)
        runs[f"{name}, batch 8"] = lambda e=engine: decode_rate(ours(e, eight), n_new, 8)
    for name, peer in peers.items():
        runs[f"transformers {name}, batch 1"] = lambda p=peer: decode_rate(theirs(p), n_new)
        runs[f"transformers {name}, prefill"] = lambda p=peer: (
            n_prefill / timed(lambda: transformers_greedy(p, long, 1))
        )
    for name, engine in engines.items():
        runs[f"{name}, prefill"] = lambda e=engine: (
            n_prefill / timed(lambda: engine_greedy(e, [long], 1))
        )
    return interleave(runs, repeats), n_bytes


def load_times(repeats: int) -> dict[str, list[float]]:
    """Seconds to load the GGUF file, and to inspect it in a new process."""
    path = smollm2_path()
    inspect = [sys.executable, "-m", "puna.cli.main", "model", "inspect", str(path), "--json"]
    return interleave(
        {
            "puna load": lambda: timed(lambda: puna.load(path)),
            "transformers load": lambda: timed(lambda: transformers_model(path)),
            "puna model inspect (process)": lambda: timed(
                lambda: subprocess.run(inspect, check=True, capture_output=True)
            ),
        },
        repeats,
    )


def rows(
    rates: dict[str, list[float]], n_bytes: dict[str, int], n_prefill: int
) -> list[tuple[str, str, str, str]]:
    """(what, tokens/s, ratio, wanted) of the table; ratios are medians of ratios per repeat."""

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))

    out = []
    for kind in ("fp32", "bf16", "int8"):
        one, eight = f"{kind}, batch 1", f"{kind}, batch 8"
        peer = f"transformers {kind}, batch 1"
        bound = statistics.median(
            rate * n_bytes[kind] / width
            for rate, width in zip(rates[one], rates["read bandwidth"], strict=True)
        )
        against = (
            f"{ratio(one, peer):.2f}x transformers"
            if peer in rates
            else f"{ratio(one, 'fp32, batch 1'):.2f}x our fp32"
        )
        wanted = ">= 1.5x" if peer in rates else ">= 3x"
        out += [
            (f"decode {one}", f"{statistics.median(rates[one]):.1f}", against, wanted),
            ("  of the memory bound", "", f"{bound:.0%}", ""),
            (f"decode {eight}", f"{statistics.median(rates[eight]):.1f}",
             f"{ratio(eight, one):.2f}x batch 1", ">= 4x"),
        ]  # fmt: skip
        if peer in rates:
            out.append((f"transformers {kind}, batch 1", f"{statistics.median(rates[peer]):.1f}",
                        "", ""))  # fmt: skip
        mine, its = f"{kind}, prefill", f"transformers {kind}, prefill"
        against = f"{ratio(mine, its):.2f}x transformers" if its in rates else ""
        rate = f"{statistics.median(rates[mine]):.0f}"
        wanted = ">= 1x" if its in rates else ""
        out.append((f"prefill {kind}, {n_prefill} tokens", rate, against, wanted))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=64, help="tokens per decoding run")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--greedy", type=int, default=256, help="tokens of the comparison")
    parser.add_argument("--skip-meta", action="store_true")
    parser.add_argument("--json", type=Path, help="write every number here")
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)

    loads = load_times(max(2, arguments.repeats // 2))
    peer = transformers_model(smollm2_path())
    ours = puna.load(smollm2_path())
    prompts = [ours.tokenizer.encode(prompt) for prompt in PROMPTS]
    found: dict[str, Any] = {"transformers": agreement(ours, peer, prompts, arguments.greedy)}
    if not arguments.skip_meta:
        found["meta"] = meta_agreement(ours, prompts, found["transformers"]["greedy"])
    for name, values in found.items():
        console.print(
            f"float32 against {name}: logits differ by at most "
            f"{values['logits_max_difference']:.2e} (wanted <= 1e-4); greedy continuations of "
            f"{values['greedy_tokens']} tokens: {values['greedy_identical']} of {len(prompts)} "
            "identical"
        )
    peers = {"fp32": peer, "bf16": transformers_model(smollm2_path(), torch.bfloat16)}
    rates, n_bytes = decoding(arguments.repeats, arguments.new, arguments.prefill, prompts, peers)
    gbps = statistics.median(rates["read bandwidth"]) / 1e9
    table = Table(title=f"SmolLM2-135M, {torch.get_num_threads()} threads, {gbps:.1f} GB/s read",
                  title_justify="left")  # fmt: skip
    for name in ("", "tokens/s", "ratio", "wanted"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows(rates, n_bytes, arguments.prefill):
        table.add_row(*row)
    console.print(table)
    ratio = statistics.median(
        b / a for a, b in zip(loads["puna load"], loads["transformers load"], strict=True)
    )
    console.print(
        f"load of the GGUF file: {statistics.median(loads['puna load']):.2f} s, {ratio:.1f}x "
        "faster than transformers (wanted >= 5x); puna model inspect: "
        f"{statistics.median(loads['puna model inspect (process)']):.2f} s (wanted < 1 s)"
    )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"agreement": found, "rates": rates, "load_s": loads, "bytes": n_bytes})
        )


if __name__ == "__main__":
    main()
