"""Two ranks go back and round data that make the loss jump, through the supervisor."""

from __future__ import annotations

import os
import textwrap

import pytest

from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LlamaConfig
from puna.train.config import AdamWConfig, CheckpointConfig, TrainingConfig
from puna.train.numbers_config import NumbersConfig
from puna.train.spec import SourceSpec
from puna.train.stage import train_job

pytestmark = pytest.mark.distributed

MODEL = LlamaConfig(
    vocab_size=33, dim=12, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=17, max_seq_len=16
)
STEPS, BAD_STEP = 24, 18
SOURCE_MODULE = f'''
"""Rows that repeat one token, and rows of noise at one step."""
import numpy as np

from puna.tokens.loader import Batch


class Rows:
    n_rows, seq_len = 4, 16

    def batch(self, step, rank, world):
        rng = np.random.default_rng([7, step])
        tokens = np.repeat(rng.integers(0, 4, (4, 1)), 17, axis=1)
        if step == {BAD_STEP}:
            tokens = rng.integers(4, 33, (4, 17))
        n = 4 // world
        mine = slice(rank * n, (rank + 1) * n)
        zeros = np.zeros((n, 16), np.int32)
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (n, 16)).copy()
        return Batch(tokens[mine, :-1], tokens[mine, 1:], zeros, positions)
'''


def test_the_run_goes_on_without_the_data_that_harm_it(tmp_path, monkeypatch):
    (tmp_path / "rows_of_noise.py").write_text(textwrap.dedent(SOURCE_MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    cfg = TrainingConfig(
        steps=STEPS, seq_len=16, global_batch=4, nproc=2, precision="fp32",
        optim=AdamWConfig(lr=2e-2), checkpoint=CheckpointConfig(every=4, memory_every=2),
        numbers=NumbersConfig(
            window=8, loss_factor=1.5, loss_spike=["replay", "roll_back", "stop"], skip_steps=2
        ),
    )  # fmt: skip
    metrics = train_job(
        cfg, MODEL, SourceSpec("rows_of_noise:Rows"), tmp_path / "out",
        Ledger(tmp_path / LEDGER_FILE),
    )  # fmt: skip
    events = list(read_events(tmp_path / LEDGER_FILE))
    assert [(e["step"], e["detector"], e["action"]) for e in events
            if e["kind"] == "train.anomaly"] == [
        (BAD_STEP, "loss_spike", "replay"), (BAD_STEP, "loss_spike", "roll_back"),
    ]  # fmt: skip
    skipped = [event["step"] for event in events if event["kind"] == "train.skip"]
    assert skipped == [BAD_STEP, BAD_STEP + 1]
    (fault,) = metrics["goodput"]["faults"]
    assert (fault["what"], fault["step"], fault["steps_lost"]) == ("roll_back", BAD_STEP, 0)
    losses = {e["step"]: e["loss"] for e in events if e["kind"] == "train.step"}
    assert sorted(losses) == [s for s in range(STEPS) if s not in skipped]
    assert max(losses[s] for s in range(BAD_STEP + 2, STEPS)) < losses[0] / 2
    assert sum(metrics["goodput"]["buckets"].values()) == pytest.approx(
        metrics["goodput"]["wall_s"], rel=1e-3
    )
