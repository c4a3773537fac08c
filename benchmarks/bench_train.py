"""Training speed: ours against transformers, one rank against two, and the cost of a restart.

    python benchmarks/bench_train.py [--preset demo] [--seq-len 256] [--rows 16] [--rounds 5]

Part 1 trains our model and ``transformers.LlamaForCausalLM`` by the same plain loop (same shape,
weights of equal scale, data, AdamW, clipping, fp32) in this process, a step of each in turn, so
that other load on the machine hits both; the ratio is what counts. Rows are whole documents, and,
in the second table, packed short documents that do not see each other (transformers gets a mask).
Part 2 trains through the real stack (supervisor, torchrun, FSDP2, checkpoints) with 1 rank x all
threads and with as many ranks as cores x 1 thread, and kills a rank to time detection and restart.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from puna.core.ledger import LEDGER_FILE, Ledger
from puna.core.pool import usable_cores
from puna.model.accounting import account
from puna.model.config import PRESETS, LlamaConfig
from puna.model.llama import Llama
from puna.tokens.loader import Batch
from puna.train.config import AdamWConfig, CheckpointConfig, FaultConfig, TrainingConfig
from puna.train.metrics import measure_peak_flops
from puna.train.optim import make_optimizer
from puna.train.parallel.world import World
from puna.train.precision import Precision
from puna.train.spec import SourceSpec
from puna.train.stage import train_job
from puna.train.step import TensorBatch, clip_gradients, forward_backward


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


class Ours:
    """Our model, optimiser and step."""

    name = "puna"

    def __init__(self, config: LlamaConfig) -> None:
        self.world = World(0, 1, torch.device("cpu"), torch.get_num_threads(), None)
        self.precision = Precision(torch.float32, "benchmark")
        self.model = Llama(config)
        self.optimizer = make_optimizer(AdamWConfig(), self.model)

    def step(self, batch: Batch, packed: bool) -> None:
        """One optimiser step."""
        tensors = TensorBatch.of(batch, self.world.device)
        forward_backward(self.model, tensors, len(batch.tokens_BT), self.precision, self.world)
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Transformers:
    """The peer's model in a plain loop."""

    name = "transformers"

    def __init__(self, config: LlamaConfig) -> None:
        from transformers import LlamaConfig as HFConfig
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM(
            HFConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.dim,
                intermediate_size=config.ffn_dim,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                max_position_embeddings=config.max_seq_len,
                tie_word_embeddings=config.tie_embeddings,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self, batch: Batch, packed: bool) -> None:
        """One optimiser step."""
        extra = {}
        if packed:
            doc_ids = torch.from_numpy(batch.doc_ids_BT)
            same = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]
            extra["attention_mask"] = same & torch.ones_like(same[0, 0]).tril()
            extra["position_ids"] = torch.from_numpy(batch.positions_BT).long()
        logits = self.model(torch.from_numpy(batch.tokens_BT), **extra).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(batch.labels_BT).flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def compare(config: LlamaConfig, args: argparse.Namespace, doc_len: int) -> None:
    source = RandomRows(config.vocab_size, args.seq_len, args.rows, doc_len)
    trainers = [Ours(config), Transformers(config)]
    wall: dict[str, list[float]] = {trainer.name: [] for trainer in trainers}
    cpu: dict[str, list[float]] = {trainer.name: [] for trainer in trainers}
    for step in range(args.rounds + 1):
        batch = source.batch(step, 0, 1)
        for trainer in trainers if step % 2 else trainers[::-1]:
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            trainer.step(batch, packed=doc_len < args.seq_len)
            if step:  # the first one prepares caches
                wall[trainer.name].append(time.perf_counter() - begin_s)
                cpu[trainer.name].append(time.process_time() - begin_cpu_s)
    peak = measure_peak_flops(torch.device("cpu"), torch.float32)
    n_tokens, flops = args.rows * args.seq_len, account(config).flops_per_token(args.seq_len)
    print(f"{'':14} {'tokens/s':>10} {'tok/cpu-s':>10} {'MFU':>6}   (best of {args.rounds} steps)")
    for name, seconds in wall.items():
        per_s = n_tokens / min(seconds)
        print(
            f"{name:14} {per_s:10.0f} {n_tokens / min(cpu[name]):10.0f} {per_s * flops / peak:6.1%}"
        )
    ratios = [b / a for a, b in zip(wall["puna"], wall["transformers"], strict=True)]
    print(f"puna / transformers, median of the pairs: {statistics.median(ratios):.2f}x\n")


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
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each model in part 1")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run in part 2")
    parser.add_argument("--doc-len", type=int, default=0, help="packed documents; seq_len / 4")
    parser.add_argument("--part", choices=("1", "2", "all"), default="all")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for the ranks: our RandomRows
    sys.path.insert(0, str(Path(__file__).parent))
    config = PRESETS.get(args.preset)
    print(
        f"{args.preset}: {account(config).n_params / 1e6:.1f} M parameters, fp32, "
        f"{args.rows} rows x {args.seq_len} tokens, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, torch {torch.__version__}\n"
    )
    if args.part != "2":
        print("rows of one document")
        compare(config, args, args.seq_len)
        doc_len = args.doc_len or args.seq_len // 4
        print(f"packed documents of {doc_len} tokens")
        compare(config, args, doc_len)
    if args.part != "1":
        print("through the whole stack")
        stack(config, args)


if __name__ == "__main__":
    main()
