"""What sharing a training costs: layouts of 2 processes against 2 that know nothing of each other.

    python benchmarks/bench_parallel.py [--precision fp32 bf16] [--rounds 5] [--ranks 2]

The shape is the 15.7M Llama of the training benchmarks, rows of 512 tokens, one thread per process.
Every layout takes the same number of rows in all; the processes of a round run at the same time and
layouts take turns, so that other load on the machine hits all of them. The ratio is what counts.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from puna.model.config import LlamaConfig
from puna.tokens.loader import Batch
from puna.train.batch import TensorBatch
from puna.train.config import AdamWConfig, ParallelConfig
from puna.train.optim import make_optimizer
from puna.train.parallel.layout import Layout
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.world import World, make_world
from puna.train.precision import Precision

MODEL = LlamaConfig(
    vocab_size=8192, dim=384, n_layers=6, n_heads=6, n_kv_heads=2, ffn_dim=1024, max_seq_len=512
)
SEQ_LEN, ROWS_PER_RANK = 512, 4
LAYOUTS: dict[str, dict[str, Any] | None] = {
    "independent": None,
    "FSDP2": {},
    "FSDP2, resharding": {"reshard_after_forward": True},
    "HSDP": {"replicate": 2},
    "TP + SP": {"tp": 2},
    "CP": {"cp": 2},
    "PP 1F1B": {"pp": 2},
    "PP zero bubble (V)": {"pp": 2, "schedule": "zbv"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trained:
    """A model and its optimiser in one layout."""

    def __init__(self, values: dict[str, Any] | None, n_ranks: int, precision: str) -> None:
        parallel = ParallelConfig(**(values or {}))
        device = torch.device("cpu")
        alone = World(0, 1, device, 1, None)
        self.world = (
            alone if values is None else make_world(device, 1, Layout.of(parallel, n_ranks))
        )
        n_rows = ROWS_PER_RANK * (1 if values is None else n_ranks // self.world.layout.data)
        micro = 1 if parallel.pp > 1 else n_rows
        self.model = ParallelModel(
            MODEL, SEQ_LEN, micro, n_rows // micro, self.world, parallel,
            Precision(DTYPES[precision], "benchmark"),
        )  # fmt: skip
        self.model.fill_random(0)
        self.optimizer = make_optimizer(AdamWConfig(), self.model)
        rng = np.random.default_rng(self.world.data_rank)
        tokens = rng.integers(0, MODEL.vocab_size, (n_rows, SEQ_LEN + 1))
        at = np.arange(SEQ_LEN, dtype=np.int32)
        positions = np.broadcast_to(at, (n_rows, SEQ_LEN)).copy()
        batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), 0 * positions, positions)
        self.batch = TensorBatch.of(batch, device)

    def step(self) -> None:
        """One optimiser step."""
        self.model.forward_backward(self.batch)
        self.model.clip_gradients(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def rank_main(rank: int, n_ranks: int, port: int, options: argparse.Namespace, box: Any) -> None:
    """Be one rank of all layouts in turn."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=n_ranks)
    for precision in options.precision:
        runs = {name: Trained(values, n_ranks, precision) for name, values in LAYOUTS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(options.rounds + 1):
            for name, run in runs.items():
                dist.barrier()
                start_s = time.perf_counter()
                for _ in range(2):
                    run.step()
                dist.barrier()
                if number:
                    seconds[name].append(time.perf_counter() - start_s)
        if rank == 0:
            box.put((precision, seconds))
    dist.destroy_process_group()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    box = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank_main, (options.ranks, port, options, box), nprocs=options.ranks)
    n_tokens = 2 * options.ranks * ROWS_PER_RANK * SEQ_LEN
    while not box.empty():
        precision, seconds = box.get()
        print(f"\n{precision}, {options.ranks} processes of one thread")
        for name, values in seconds.items():
            shares = [a / b for a, b in zip(seconds["independent"], values, strict=True)]
            rate, share = n_tokens / statistics.median(values), statistics.median(shares)
            print(f"  {name:20s} {rate:7.0f} tokens/s  {share:6.1%} of independent")


if __name__ == "__main__":
    main()
