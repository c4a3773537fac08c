"""What optimisers, averages and recomputed layers cost beside each other: CPU seconds of a step.

Every variant takes its steps in turn with the others, in this process, on one thread::

    python benchmarks/bench_optim.py [--precision fp32 bf16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from puna.core.units import MIB
from puna.model.activations import Recompute, Shape, joins_pieces, layer_bytes
from puna.model.config import LlamaConfig
from puna.tokens.loader import Batch
from puna.train.average import WeightAverage
from puna.train.batch import TensorBatch
from puna.train.config import MemoryConfig, ParallelConfig
from puna.train.optim import make_optimizer
from puna.train.optim_config import AdamWConfig, EmaConfig, MuonConfig
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.world import World
from puna.train.precision import Precision

MODEL = LlamaConfig(
    vocab_size=8192, dim=384, n_layers=6, n_heads=6, n_kv_heads=2, ffn_dim=1024, max_seq_len=512
)
SEQ_LEN, N_ROWS = 512, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
VARIANTS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, moving average": {"average": EmaConfig()},
    "Muon": {"optim": MuonConfig()},
    "AdamW, selective": {"recompute": "selective"},
    "AdamW, full": {"recompute": "full"},
}


@dataclass
class Variant:
    """A model, its optimiser and its average."""

    precision: str
    optim: Any = field(default_factory=AdamWConfig)
    average: Any = None
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        world = World(0, 1, torch.device("cpu"), 1, None)
        dtype = DTYPES[self.precision]
        self.model = ParallelModel(
            MODEL, SEQ_LEN, N_ROWS, 1, world, ParallelConfig(), Precision(dtype, "benchmark"),
            memory=MemoryConfig(recompute=self.recompute),
        )  # fmt: skip
        self.model.fill_random(0)
        self.optimizer = make_optimizer(self.optim, self.model, world, dtype)
        self.mean = WeightAverage(self.average, self.model, 1000)
        tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (N_ROWS, SEQ_LEN + 1))
        positions = np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int32), (N_ROWS, SEQ_LEN)).copy()
        batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), 0 * positions, positions)
        self.batch = TensorBatch.of(batch, world.device)

    def step(self) -> tuple[float, float]:
        """Return the CPU seconds of both passes and of the update."""
        begin_s = time.process_time()
        self.model.forward_backward(self.batch)
        passes_s = time.process_time()
        self.optimizer.step()
        self.mean.update(0)
        self.optimizer.zero_grad(set_to_none=True)
        return passes_s - begin_s, time.process_time() - passes_s


def main() -> None:
    """Print a table per precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for precision in options.precision:
        variants = {name: Variant(precision, **values) for name, values in VARIANTS.items()}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for number in range(options.rounds + 1):
            for name, variant in variants.items():
                found = variant.step()
                if number:  # the first round warms up
                    seconds[name].append(found)
        base_s = statistics.median(map(sum, seconds["AdamW"]))
        print(f"{precision}: CPU seconds of both passes, of the update, and of the step / AdamW's")
        for name, found in seconds.items():
            passes_s, update_s = (statistics.median(part) for part in zip(*found, strict=True))
            step_s = statistics.median(map(sum, found))
            print(f"  {name:24} {passes_s:7.3f} {update_s:7.3f} {step_s / base_s:6.2f}")
        shape = Shape(
            N_ROWS * SEQ_LEN, str(DTYPES[precision]).removeprefix("torch."), casts_weights=True,
            joins=joins_pieces(SEQ_LEN, "cpu"),
        )  # fmt: skip
        kept = {kind: layer_bytes(MODEL, kind, shape) / MIB for kind in RECOMPUTE}
        print("  MiB kept per layer: " + ", ".join(f"{k} {v:.1f}" for k, v in kept.items()))


if __name__ == "__main__":
    main()
