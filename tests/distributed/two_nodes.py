"""What a node of the tests runs: ``python -m tests.distributed.two_nodes FOLDER BLOCK``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from puna.core.ledger import LEDGER_FILE, Ledger
from puna.model.config import LlamaConfig
from puna.tokens.loader import Batch
from puna.train.config import AdamWConfig, CheckpointConfig, RestartConfig, TrainingConfig
from puna.train.follow import follow
from puna.train.launch_config import LaunchConfig
from puna.train.nodes import NODES_DIR, Leader, node_rank
from puna.train.spec import SourceSpec
from puna.train.stage import train_job

MODEL = LlamaConfig(
    vocab_size=33, dim=12, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=17, max_seq_len=16
)
N_STEPS, BLOCKED_STEP = 10, 8


class Rows:
    """Counting rows; waits at a step while a file is there."""

    def __init__(self, block: str = "") -> None:
        self.n_rows, self.seq_len, self._block = 4, 16, block

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Rows of a rank."""
        while self._block and step == BLOCKED_STEP and Path(self._block).exists():
            time.sleep(0.01)
        start = np.random.default_rng([7, step]).integers(0, 33, (self.n_rows, 1))
        tokens = (start + 3 * np.arange(self.seq_len + 1)) % 33
        positions = np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), (4, self.seq_len))
        n = self.n_rows // world
        mine = slice(rank * n, (rank + 1) * n)
        return Batch(
            tokens[mine, :-1].copy(), tokens[mine, 1:].copy(),
            np.zeros((n, self.seq_len), np.int32), positions[mine].copy(),
        )  # fmt: skip


def config(nodes: int = 2, nproc: int = 2) -> TrainingConfig:
    """The training on so many nodes."""
    return TrainingConfig(
        steps=N_STEPS, seq_len=16, global_batch=4, micro_batch=1, nproc=nproc, precision="fp32",
        optim=AdamWConfig(lr=1e-2), checkpoint=CheckpointConfig(every=3, keep=3), prefetch=0,
        restart=RestartConfig(start_timeout_s=100),
        launch=LaunchConfig(nodes=nodes, node_timeout_s=5, wait_s=60),
    )  # fmt: skip


def main(folder: Path, block: str) -> int:
    """Be the node that the environment names."""
    cfg, node = config(), node_rank()
    if node > 0:
        return follow(folder / NODES_DIR, node, cfg.launch)
    leader = Leader.of(folder / NODES_DIR)
    source = SourceSpec("tests.distributed.two_nodes:Rows", {"block": block})
    train_job(cfg, MODEL, source, folder / "out", Ledger(folder / LEDGER_FILE))
    leader.wait_for(leader.call("end", nodes=2, code=0), 10.0)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
