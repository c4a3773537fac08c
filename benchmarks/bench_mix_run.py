"""How fast proxies train: tokens per second of one process and of all, and where the time goes.

    python benchmarks/bench_mix_run.py [--workers 2] [--vocab 1024] [--runs 4]

Shards of random documents are made, with a vocabulary like that of a small tokenizer; every process
makes whole runs (initial weights, loader, steps, evaluation). Counted are the tokens of the rows
that were trained on; held-out text is not counted, its time is. Wall clock of a busy machine says
little: the load average is printed, and tokens per CPU second beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from puna.core.pool import usable_cores
from puna.mix.design import design
from puna.mix.proxy.config import ProxyConfig
from puna.mix.proxy.runs import make_runs
from puna.mix.sources import Manifest, Objective, Source

NAMES = ("a", "b", "c", "d")


def write_shards(folder: Path, vocab: int, n_docs: int, length: int) -> None:
    """Four sources of random tokens with Zipf's frequencies, each in an order of its own."""
    rng = np.random.default_rng(0)
    odds = 1 / np.arange(1, vocab - 2)
    splits: dict[str, Any] = {}
    for split, share in (("train", 1.0), ("heldout", 0.02)):
        splits[split] = {}
        for name in NAMES:
            where = folder / split / name
            where.mkdir(parents=True)
            lengths = rng.integers(length // 4, 2 * length, max(4, int(n_docs * share)))
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            order = 3 + rng.permutation(vocab - 3)
            drawn = rng.choice(order, offsets[-1], p=odds / odds.sum())
            drawn.astype(np.uint16).tofile(where / "tokens.bin")
            np.save(where / "offsets.npy", offsets)
            np.save(
                where / "ids.npy", np.array([f"{name}-{i:06d}" for i in range(len(lengths))], "S32")
            )
            np.save(where / "n_bytes.npy", (3 * lengths).astype(np.int64))
            splits[split][name] = {
                "n_docs": len(lengths), "n_tokens": int(offsets[-1]),
                "n_bytes": int(3 * offsets[-1]),
            }  # fmt: skip
    index = {"dtype": "uint16", "vocab_size": vocab, "splits": splits}
    (folder / "index.json").write_text(json.dumps(index))


def parts_of_a_step(cfg: ProxyConfig, vocab: int, n_steps: int) -> dict[str, float]:
    """Return CPU microseconds per token of the calls of a step, in this process."""
    import torch

    from puna.mix.proxy import kernels, model
    from puna.tokens.loader import Batch
    from puna.train.fused import loops
    from puna.train.precision import decide_precision

    torch.set_num_threads(1)
    spent: dict[str, float] = {}

    def timed(function: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin_s = time.thread_time()
            result = function(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + time.thread_time() - begin_s
            return result

        return call

    class Timed:
        def __init__(self, module: Any) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._module, name)
            return timed(found, name) if callable(found) else found

    dtype = decide_precision(cfg.precision, torch.device("cpu")).dtype
    proxy = model.ProxyModel(cfg.model(vocab), cfg.global_batch, cfg.seq_len, cfg.optim, dtype)
    rng = np.random.default_rng(0)
    shape = (cfg.global_batch, cfg.seq_len)
    tokens, labels = (rng.integers(0, vocab, shape) for _ in range(2))
    positions = np.broadcast_to(np.arange(cfg.seq_len, dtype=np.int32), shape)
    batch = Batch(tokens, labels, np.zeros(shape, np.int32), positions)
    for _ in range(3):
        proxy.step(batch, 1e-3, 1.0)
    proxy._optimizer.step = timed(proxy._optimizer.step, "optimizer")
    model.kernels, model.loops = Timed(kernels), Timed(loops)  # type: ignore[assignment]
    mm, bmm = torch.mm, torch.bmm
    torch.mm, torch.bmm = timed(mm, "mm"), timed(bmm, "bmm")
    begin_s = time.thread_time()
    for _ in range(n_steps):
        proxy.step(batch, 1e-3, 1.0)
    total_s = time.thread_time() - begin_s
    torch.mm, torch.bmm = mm, bmm
    model.kernels, model.loops = kernels, loops
    spent["all else"] = total_s - sum(spent.values())
    n_tokens = n_steps * cfg.tokens_per_step
    return {name: 1e6 * s / n_tokens for name, s in sorted(spent.items(), key=lambda x: -x[1])}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=4, help="runs per process")
    parser.add_argument("--tokens", type=int, default=327_680)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    cfg = ProxyConfig(tokens=args.tokens, global_batch=args.batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, args.vocab, 4000, 300)
        known = Manifest(
            source=tuple(Source(name=n, unique_tokens=10**6) for n in NAMES),
            objective=Objective(n_tokens=1e6), proxy=cfg,
        )  # fmt: skip
        planned = design(known, 40, n_held_out=0, proxy=cfg.content())
        warm = make_runs(
            known, planned[: args.workers], name, folder / "warm", n_workers=args.workers
        )
        n = args.workers * args.runs
        before = os.getloadavg()[0]
        made = make_runs(known, planned[-n:], name, folder / "out", n_workers=args.workers)
        shape = cfg.model(args.vocab)
        print(f"model: {warm.results[0]['n_params']} parameters, of which "
              f"{warm.results[0]['n_params'] - args.vocab * shape.dim} are no embedding; rows of "
              f"{cfg.seq_len}, {cfg.global_batch} a step, {made.results[0]['dtype']}")  # fmt: skip
        print(f"load average before {before:.1f}, after {os.getloadavg()[0]:.1f} "
              f"on {usable_cores()} cores")  # fmt: skip
        for what, key in (("training alone", "train_s"), ("whole runs", "seconds")):
            rate = statistics.median(cfg.n_tokens / one[key] for one in made.results)
            print(f"one process, {what}: {rate:,.0f} tokens/s")
        cpu = statistics.median(cfg.n_tokens / one["cpu_s"] for one in made.results)
        print(f"one process, whole runs: {cpu:,.0f} tokens per CPU second")
        seconds = max(sum(one["seconds"] for one in made.results) / args.workers, 1e-9)
        print(f"{args.workers} processes, whole runs: {made.n_tokens / seconds:,.0f} tokens/s")
        print(f"the same with the start of the processes: {made.tokens_per_s:,.0f} tokens/s")
        data = sum(one["data_s"] for one in made.results) / made.n_tokens * 1e6
        held = sum(one["seconds"] - one["train_s"] for one in made.results) / made.n_tokens * 1e6
        print(f"us per token: batches {data:.2f}, evaluation {held:.2f}; a step, in CPU time:")
        for part, us in parts_of_a_step(cfg, args.vocab, 40).items():
            print(f"  {part:18s} {us:6.2f}")


if __name__ == "__main__":
    main()
