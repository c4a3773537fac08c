"""A node of the tests of elastic worlds: ``python -m tests.distributed.elastic_nodes FOLDER``.

All nodes are processes of one machine, with names of their own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.tokens.loader import Batch
from puna.train.config import AdamWConfig, CheckpointConfig, RestartConfig, TrainingConfig
from puna.train.follow import follow
from puna.train.launch_config import LaunchConfig
from puna.train.nodes import NODES_DIR, Leader, node_rank
from puna.train.restart_config import QuarantineConfig
from puna.train.spec import SourceSpec
from puna.train.stage import train_job
from tests.distributed import two_nodes

N_STEPS = 16


class Rows(two_nodes.Rows):
    """Counting rows that wait for events of the ledger.

    Args:
        ledger: Where it stands.
        holds: Number of ranks, step from which on they wait, kind of the event; after it one rank
            alone goes on slowly, so that the supervisor sees it between two checkpoints.
    """

    def __init__(self, ledger: str = "", holds: Sequence[tuple[int, int, str]] = ()) -> None:
        super().__init__()
        self._ledger, self._holds = Path(ledger), holds

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Rows of a rank."""
        for n_ranks, first, kind in self._holds:
            if world == n_ranks and step >= first:
                while not any(read_events(self._ledger, kind)):
                    time.sleep(0.02)
                time.sleep(0.2 if world == 1 else 0.0)
        return super().batch(step, rank, world)


def config(**values: Any) -> TrainingConfig:
    """A training that may shrink to one rank."""
    usual: dict[str, Any] = {
        "steps": N_STEPS, "seq_len": 16, "global_batch": 4, "nproc": 2, "precision": "fp32",
        "optim": AdamWConfig(lr=1e-2), "prefetch": 0,
        "checkpoint": CheckpointConfig(every=3, memory_every=1, keep=3),
        "restart": RestartConfig(
            min_nproc=1, quarantine=QuarantineConfig(strikes=1, burn_in_s=0)
        ),
    }  # fmt: skip
    return TrainingConfig(**{**usual, **values})


def train(
    folder: Path, cfg: TrainingConfig, holds: Sequence[tuple[int, int, str]] = ()
) -> dict[str, Any]:
    """Train in a folder; ``holds`` as in :class:`Rows`."""
    ledger = folder / LEDGER_FILE
    source = {"ledger": str(ledger), "holds": list(holds)}
    return train_job(
        cfg, two_nodes.MODEL, SourceSpec("tests.distributed.elastic_nodes:Rows", source),
        folder / "out", Ledger(ledger),
    )  # fmt: skip


def main(folder: Path) -> int:
    """Be the node that the environment names, of two with a spare."""
    cfg = config(
        restart=RestartConfig(min_nproc=1),
        launch=LaunchConfig(nodes=2, spares=1, node_timeout_s=3, wait_s=60),
    )
    node = node_rank()
    if node > 0:
        return follow(folder / NODES_DIR, node, cfg.launch)
    leader = Leader.of(folder / NODES_DIR)
    train(folder, cfg, [(2, 4, "test.replaced"), (2, 8, "test.shrunk"), (1, 9, "test.back")])
    leader.wait_for(leader.call("end", nodes=3, code=0), 10.0)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
