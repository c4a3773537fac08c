"""Ranks that have done what a start costs, and wait to be needed: a restart then is a word to them.

Imports and the first use of compiled loops take seconds, a restart without them one. A waiting
rank has the memory of an idle process (some 0.5 GB, mostly PyTorch) and touches no GPU.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from puna.train.spec import JobSpec

GO_FILE = "go"
_POLL_S = 0.005


def get_ready(spec: JobSpec) -> None:
    """Import what a training imports, and on a CPU compute a step of a tiny model as it would."""
    from puna.model.device import pick_device
    from puna.train import loop  # noqa: F401 (what it imports is what costs)
    from puna.train.checkpoint import dcp  # noqa: F401

    if pick_device(spec.training.device).type == "cpu":
        _compute_a_step(spec)


def wait_for_go(folder: Path, rank: int) -> None:
    """Return when the supervisor wants this attempt; its death ends the wait with the process.

    Meanwhile ``ready-<rank>`` in the folder of the attempt holds the process id.
    """
    (folder / f"ready-{rank}").write_text(str(os.getpid()), encoding="ascii")
    while not (folder / GO_FILE).exists():
        time.sleep(_POLL_S)


def _compute_a_step(spec: JobSpec) -> None:
    import torch

    from puna.model.config import LlamaConfig
    from puna.train.batch import TensorBatch
    from puna.train.config import ParallelConfig
    from puna.train.optim import make_optimizer
    from puna.train.parallel.model import ParallelModel
    from puna.train.parallel.world import World
    from puna.train.precision import decide_precision
    from puna.train.watch.random_rows import RandomRows

    seq_len, n_rows = 32, 2
    config = LlamaConfig(
        vocab_size=64, dim=64, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=64, max_seq_len=seq_len
    )
    cfg = spec.training
    world = World(0, 1, torch.device("cpu"), torch.get_num_threads(), None)
    precision = decide_precision(cfg.precision, world.device, None)
    model = ParallelModel(config, seq_len, n_rows, 1, world, ParallelConfig(), precision)
    model.fill_random(0)
    optimizer = make_optimizer(cfg.optim, model, world, precision.dtype)
    batch = RandomRows(config.vocab_size, seq_len, n_rows, seq_len // 4).batch(0, 0, 1)
    model.forward_backward(TensorBatch.of(batch, world.device))
    model.clip_gradients(1.0)
    optimizer.step()
