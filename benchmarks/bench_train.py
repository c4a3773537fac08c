"""Training speed and memory: ours against transformers, plain PyTorch, and what compiles them.

    python benchmarks/bench_train.py [--part speed packed memory stack] [--precision bf16 fp32]

``speed``, ``packed`` and ``memory`` train a Llama of 15.7M parameters (dim 384, 6 layers, 6 heads,
2 of keys, feed-forward 1024, vocabulary 8192), AdamW, clipping at 1.0, weights in fp32. Every
trainer is a process of its own; they take turns, a step each, so that other load hits all.
Counted are CPU-seconds, with one thread; ratios are medians over the rounds. The utilisation (MFU)
is against the matrix products of the same precision measured in the same rounds; attention is
counted without regard to causality, for all alike. ``litgpt`` takes part when it is installed, or
with ``--litgpt PYTHON``.

``stack`` trains through the real stack (supervisor, torchrun, FSDP2, checkpoints) with 1 rank x all
threads and with as many ranks as cores x 1 thread, and kills a rank to time detection and restart.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_peers import llama

from puna.core.ledger import LEDGER_FILE, Ledger
from puna.core.pool import usable_cores
from puna.model.accounting import account
from puna.model.config import PRESETS, LlamaConfig
from puna.tokens.loader import Batch
from puna.train.config import CheckpointConfig, FaultConfig, TrainingConfig
from puna.train.parallel.threads import thread_env
from puna.train.spec import SourceSpec
from puna.train.stage import train_job


class RandomRows:
    """Random tokens; rows of whole documents or of short packed ones."""

    def __init__(self, vocab_size: int, seq_len: int, n_rows: int, doc_len: int = 0) -> None:
        self.vocab_size, self.seq_len, self.n_rows = vocab_size, seq_len, n_rows
        self.doc_len = doc_len or seq_len

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Rows of a rank."""
        rng = np.random.default_rng([1, step])
        tokens = rng.integers(0, self.vocab_size, (self.n_rows, self.seq_len + 1))
        at = np.arange(self.seq_len, dtype=np.int32)
        shape = (self.n_rows, self.seq_len)
        n = self.n_rows // world
        mine = slice(rank * n, (rank + 1) * n)
        return Batch(
            tokens[mine, :-1].copy(),
            tokens[mine, 1:].copy(),
            np.broadcast_to(at // self.doc_len, shape)[mine].copy(),
            np.broadcast_to(at % self.doc_len, shape)[mine].copy(),
        )


class Worker:
    """A trainer in a process of its own; see ``train_peers.py``.

    Args:
        name: As shown.
        spec: What it is told.
        python: Of its environment.
    """

    def __init__(self, name: str, spec: dict[str, Any], python: str = sys.executable) -> None:
        self.name, self.steps = name, []  # type: ignore[var-annotated]
        env = dict(os.environ)
        if spec["trainer"] == "puna":
            env |= thread_env(1)
        env["OMP_NUM_THREADS"] = str(spec["threads"])
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("train_peers.py")), json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip

    def step(self) -> dict[str, float]:
        """Let it compute one step; others wait."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}")
        self.steps.append(json.loads(line))
        return self.steps[-1]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def spec_of(trainer: str, precision: str, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    return {
        "trainer": trainer, "precision": precision, "threads": args.threads, "rows": 4,
        "seq_len": 512, "vocab": 8192, "mean_doc": 0, "padded": False, "compiled": False, **more,
    }  # fmt: skip


def take_turns(workers: list[Worker], rounds: int, warmup: int = 2) -> None:
    """Let all compute steps in turn, backwards in every second round, and forget the first ones."""
    for number in range(warmup + rounds):
        for worker in workers if number % 2 else workers[::-1]:
            begin_s = time.perf_counter()
            worker.step()
            if number == 0 and time.perf_counter() - begin_s > 10:
                print(f"  ({worker.name}: first step {time.perf_counter() - begin_s:.0f} s)")
    for worker in workers:
        del worker.steps[:warmup]


def show(workers: list[Worker], flops: float | None, peak: Worker | None) -> None:
    """Print labelled tokens per CPU-second, and the ratio of ours to each, round by round."""
    rates = {w.name: [s["labels"] / s["cpu_s"] for s in w.steps] for w in workers}
    peaks = [step["loss"] for step in peak.steps] if peak else []
    print(f"{'':28} {'tok/cpu-s':>10} {'best':>8} {'MFU':>7} {'puna is':>9} {'peak RSS':>10}")
    for worker in workers:
        own = rates[worker.name]
        ratio = statistics.median(a / b for a, b in zip(rates["puna"], own, strict=True))
        mfu = ""
        if peaks and flops:
            mfu = f"{statistics.median(r * flops / p for r, p in zip(own, peaks, strict=True)):.1%}"
        rss = max(step["rss"] for step in worker.steps) / 2**30
        print(
            f"{worker.name:28} {statistics.median(own):10.0f} {max(own):8.0f} {mfu:>7} "
            f"{ratio:8.2f}x {rss:6.2f} GiB  loss {worker.steps[-1]['loss']:.4f}"
        )
    if peaks:
        print(
            f"matrix products: {statistics.median(peaks) / 1e9:.0f} GFLOP/s (median of rounds), "
            f"{max(peaks) / 1e9:.0f} (best); {(flops or 0) / 1e6:.0f} MFLOP per token\n"
        )


def speed(precision: str, args: argparse.Namespace) -> None:
    """Rows of one document, every trainer."""
    print(f"{precision}, 4 rows of 512 tokens")
    named = {
        "puna": {"trainer": "puna"},
        "transformers": {"trainer": "transformers"},
        "transformers + compile": {"trainer": "transformers", "compiled": True},
        "plain PyTorch": {"trainer": "plain"},
        "plain PyTorch + compile": {"trainer": "plain", "compiled": True},
    }
    workers = [
        Worker(name, spec_of(precision=precision, args=args, **v))
        for name, v in named.items()
        if args.compiled or not v.get("compiled")
    ]
    if args.litgpt:
        workers.append(Worker("litgpt", spec_of("litgpt", precision, args), args.litgpt))
    peak = Worker("peak", spec_of("peak", precision, args))
    take_turns([*workers, peak], args.rounds)
    show(workers, account(llama(spec_of("puna", precision, args))).flops_per_token(512), peak)
    for worker in (*workers, peak):
        worker.close()


def packed(precision: str, args: argparse.Namespace) -> None:
    """Short documents in rows of 2,048 tokens; only labelled tokens count."""
    print(f"{precision}, documents of 150 tokens on average in 4 rows of 2048; useful tokens")
    more = {"seq_len": 2048, "mean_doc": 150}
    workers = [
        Worker("puna", spec_of("puna", precision, args, **more)),
        Worker("transformers, TRL packing", spec_of("transformers", precision, args, **more)),
        Worker(
            "transformers, padding", spec_of("transformers", precision, args, padded=True, **more)
        ),
    ]
    take_turns(workers, max(3, args.rounds // 2), warmup=1)
    show(workers, None, None)
    print()
    for worker in workers:
        worker.close()


def memory(precision: str, args: argparse.Namespace) -> None:
    """Peak memory of two steps with a large vocabulary, each in a fresh process."""
    print(f"{precision}, vocabulary 128,256, 4 rows of {args.memory_seq_len}: peak of a process")
    found = {}
    for name in ("puna", "transformers", "plain"):
        spec = spec_of(name, precision, args, vocab=128256, seq_len=args.memory_seq_len)
        worker = Worker(name, spec)
        worker.step()
        found[name] = worker.step()["rss"]
        worker.close()
        share = found["puna"] / found[name]
        print(f"{name:28} {found[name] / 2**30:6.2f} GiB; puna takes {share:.0%} of it")
    print()


def stack(config: LlamaConfig, args: argparse.Namespace) -> None:
    n_ranks = min(usable_cores(), args.rows)
    while args.rows % n_ranks:
        n_ranks -= 1
    print(f"{'':24} {'tokens/s':>10} {'MFU':>6} {'first step after':>17}")
    for nproc, fault in ((1, False), (n_ranks, False), (n_ranks, True)):
        with tempfile.TemporaryDirectory() as folder:
            metrics = train_job(
                TrainingConfig(
                    steps=args.steps, seq_len=args.seq_len, global_batch=args.rows, nproc=nproc,
                    precision="fp32",
                    checkpoint=CheckpointConfig(every=max(1, args.steps // 3)),
                    fault=FaultConfig(rank=nproc - 1, step=args.steps // 2) if fault else None,
                ),
                config,
                SourceSpec(
                    "bench_train:RandomRows",
                    {"vocab_size": config.vocab_size, "seq_len": args.seq_len, "n_rows": args.rows},
                ),
                Path(folder) / "out",
                Ledger(Path(folder) / LEDGER_FILE),
            )  # fmt: skip
        buckets = metrics["goodput"]["buckets"]
        threads = metrics["n_threads"]
        if not fault:
            print(
                f"{nproc} ranks x {threads} threads {'':6} {metrics['tokens_per_s']:10.0f} "
                f"{metrics['mfu']:6.1%} {buckets['restart_init']:15.1f} s"
            )
            continue
        (found,) = metrics["goodput"]["faults"]
        print(
            f"kill -9 of a rank: detected after {found['detect_s'] * 1e3:.0f} ms, first new step "
            f"{found['recover_s']:.1f} s later, {found['steps_lost']} steps done again"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--precision", nargs="*", default=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=1, help="of each trainer, one at a time")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each trainer")
    parser.add_argument(
        "--no-compiled", dest="compiled", action="store_false", help="leave out what compiles"
    )
    parser.add_argument("--litgpt", help="Python of an environment that has litgpt")
    parser.add_argument("--memory-seq-len", type=int, default=512)
    parser.add_argument("--preset", default="demo", help="of the part `stack`")
    parser.add_argument("--seq-len", type=int, default=256, help="of the part `stack`")
    parser.add_argument("--rows", type=int, default=16, help="of the part `stack`")
    parser.add_argument("--steps", type=int, default=12, help="of each run of the part `stack`")
    args = parser.parse_args()
    if args.litgpt is None and importlib.util.find_spec("litgpt"):
        args.litgpt = sys.executable
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for the ranks: our RandomRows
    config = PRESETS.get(args.preset)
    print(f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads\n")
    for part, run in PARTS.items():
        if part in args.part and part == "stack":
            stack(config, args)
        elif part in args.part:
            for precision in args.precision:
                run(precision, args)


PARTS: dict[str, Any] = {"speed": speed, "packed": packed, "memory": memory, "stack": stack}


if __name__ == "__main__":
    main()
