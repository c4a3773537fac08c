"""Training over two processes: the same as one, and the same whatever dies on the way.

Few runs, each several times looked at: starting two processes that import torch takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LlamaConfig
from puna.resilience.heartbeat import HeartbeatWriter
from puna.resilience.processes import process_alive
from puna.train.config import (
    AdamWConfig,
    CheckpointConfig,
    FaultConfig,
    ParallelConfig,
    TrainingConfig,
)
from puna.train.loop import train
from puna.train.parallel.world import World
from puna.train.spec import SHARED_MEMORY, JobSpec, SourceSpec
from puna.train.stage import train_job

pytestmark = pytest.mark.distributed

# Odd sizes: no dimension is divided evenly among two ranks.
MODEL = LlamaConfig(
    vocab_size=33, dim=12, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=17, max_seq_len=16
)
N_STEPS, EVERY, BLOCKED_STEP = 10, 3, 8
JOB_OF_THE_HURT = f"hurt{os.getpid()}"
SOURCE_MODULE = '''
"""Stand-in source: counting rows; waits for ever at a step while a file says so."""
import os
import signal
import time
from pathlib import Path

import numpy as np

from puna.core.errors import PunaError
from puna.tokens.loader import NO_LABEL, Batch


class Rows:
    def __init__(self, block="", block_step=-1, fail_step=-1, hurt="", told_step=-1):
        if hurt and os.environ.get("RANK") == "1":  # as a rank begins, before it restores
            notes = [p for p in Path("/dev/shm").glob(f"puna-*-{Path(hurt).read_text()}/rank-1.*")]
            for note in [p for p in notes if p.suffix == ".json"]:
                with note.with_suffix(".bin").open("r+b") as file:
                    byte = file.read(1)[0]
                    file.seek(0)
                    file.write(bytes([byte ^ 16]))
        self.n_rows, self.seq_len = 4, 16
        self.block, self.block_step, self.fail_step = block, block_step, fail_step
        self.told_step = told_step

    def batch(self, step, rank, world):
        while step == self.block_step and Path(self.block).exists():
            time.sleep(0.01)
        if step == self.told_step and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == self.fail_step and rank == 1:
            raise PunaError(f"shard 7 is damaged (step {step})", "make it anew")
        rng = np.random.default_rng([7, step])
        start = rng.integers(0, 33, (self.n_rows, 1))
        tokens = (start + 3 * np.arange(self.seq_len + 1)) % 33
        labels = tokens[:, 1:].copy()
        labels[0, 2:] = NO_LABEL
        doc_ids = np.zeros((self.n_rows, self.seq_len), np.int32)
        doc_ids[:, 9:] = 1
        positions = np.arange(self.seq_len, dtype=np.int32) - 9 * doc_ids
        n = self.n_rows // world
        mine = slice(rank * n, (rank + 1) * n)
        return Batch(tokens[mine, :-1], labels[mine], doc_ids[mine], positions[mine])
'''


@pytest.fixture(scope="module", autouse=True)
def source_module(tmp_path_factory):
    """Make the stand-in source importable here and in the workers."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "rows_of_two.py").write_text(textwrap.dedent(SOURCE_MODULE))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


def config(**values) -> TrainingConfig:
    usual = {
        "steps": N_STEPS,
        "seq_len": 16,
        "global_batch": 4,
        "micro_batch": 1,
        "nproc": 2,
        "precision": "fp32",
        "optim": AdamWConfig(lr=1e-2),
        "checkpoint": CheckpointConfig(every=EVERY, memory_every=0, keep=3),
    }
    return TrainingConfig(**{**usual, **values})


def run(folder: Path, source: SourceSpec | None = None, **values):
    folder.mkdir(exist_ok=True)
    return train_job(
        config(**values), MODEL, source or SourceSpec("rows_of_two:Rows"), folder / "out",
        Ledger(folder / LEDGER_FILE),
    )  # fmt: skip


def steps(folder: Path, key: str = "loss") -> dict[int, float]:
    return {e["step"]: e[key] for e in read_events(folder / LEDGER_FILE, "train.step")}


def kinds(folder: Path, *wanted: str) -> list[dict]:
    return list(read_events(folder / LEDGER_FILE, *wanted))


def model_hash(folder: Path) -> str:
    return hash_file(folder / "out" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Two ranks, nothing happens to them."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder)


def test_two_ranks_leave_a_model_and_metrics(unbroken):
    folder, metrics = unbroken
    assert sorted(steps(folder)) == list(range(N_STEPS))
    assert metrics["final_loss"] == steps(folder)[N_STEPS - 1]
    assert metrics["tokens"] == N_STEPS * 64
    assert metrics["world"] == 2
    assert metrics["mfu"] > 0
    buckets = metrics["goodput"]["buckets"]
    assert sum(buckets.values()) == pytest.approx(metrics["goodput"]["wall_s"], rel=1e-9)
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "checkpoints", "loader.json", "model",
    ]  # fmt: skip
    assert json.loads((folder / "out" / "loader.json").read_text())["factory"] == "rows_of_two:Rows"


def test_one_rank_continues_from_two_with_the_same_data(unbroken, tmp_path):
    """Resharding and data order: the losses of the remaining steps are those of two ranks."""
    folder, _ = unbroken
    kept = tmp_path / "out" / "checkpoints"
    shutil.copytree(folder / "out" / "checkpoints", kept)
    for path in kept.glob("step-*"):
        if path.name > "step-00000006":
            shutil.rmtree(path)
    run(tmp_path, nproc=1)
    assert [event["step"] for event in kinds(tmp_path, "train.restore")] == [6]
    for key in ("loss", "grad_norm"):
        ours, theirs = steps(tmp_path, key), steps(folder, key)
        assert sorted(ours) == [6, 7, 8, 9]
        assert [ours[s] for s in ours] == pytest.approx([theirs[s] for s in ours], rel=1e-5)


def test_one_rank_has_the_losses_of_two(unbroken, tmp_path):
    """Also without accumulation, while the two ranks take a row at a time."""
    folder, _ = unbroken
    spec = JobSpec(
        job="j", out=tmp_path, ledger=tmp_path / LEDGER_FILE, common={}, model=MODEL, weights=None,
        source=SourceSpec("rows_of_two:Rows"), special_ids={},
        training=config(nproc=1, micro_batch=0),
    )  # fmt: skip
    spec.attempt_dir(0).mkdir(parents=True)
    heart, world = (
        HeartbeatWriter(spec.attempt_dir(0), 0),
        World(0, 1, torch.device("cpu"), 1, None),
    )
    train(spec, 0, world, heart, Ledger(spec.ledger, job="j"))
    for key in ("loss", "grad_norm"):
        ours, theirs = steps(tmp_path, key), steps(folder, key)
        assert [ours[s] for s in ours] == pytest.approx([theirs[s] for s in ours], rel=1e-5)


def test_a_killed_rank_changes_nothing(unbroken, tmp_path):
    folder, _ = unbroken
    # Torchrun sends SIGTERM to the others when a rank dies, perhaps before we look: one
    # that gets it must not be taken for the first that died.
    source = SourceSpec("rows_of_two:Rows", {"told_step": 2})
    metrics = run(tmp_path, source, fault=FaultConfig(rank=1, step=5))
    (fault,) = metrics["goodput"]["faults"]
    assert (fault["what"], fault["rank"], fault["step"]) == ("killed", 1, 5)
    assert fault["steps_lost"] == 5 - EVERY
    assert fault["detect_s"] >= 0
    assert fault["recover_s"] > 0
    assert metrics["goodput"]["n_recomputed"] == 5 - EVERY
    assert len(kinds(tmp_path, "fault.injected")) == 1
    assert steps(tmp_path) == steps(folder)
    assert model_hash(tmp_path) == model_hash(folder)


def test_a_snapshot_in_memory_loses_no_step(unbroken, tmp_path):
    """Also the checkpoint that was being written when the rank died changes nothing."""
    folder, _ = unbroken
    checkpoint = CheckpointConfig(every=EVERY, memory_every=1, keep=3)
    metrics = run(tmp_path, checkpoint=checkpoint, fault=FaultConfig(rank=1, step=5))
    assert [(e["step"], e["tier"]) for e in kinds(tmp_path, "train.restore")] == [(5, "memory")]
    (fault,) = metrics["goodput"]["faults"]
    assert fault["steps_lost"] == 0
    assert steps(tmp_path) == steps(folder)
    assert model_hash(tmp_path) == model_hash(folder)
    job = kinds(tmp_path, "job.start")[0]["job"]
    assert not list(SHARED_MEMORY.glob(f"puna-*-{job}"))


@pytest.mark.slow
def test_a_killed_rank_changes_nothing_in_a_pipeline(unbroken, tmp_path):
    """And the pipeline has the losses of the sharded run."""
    layout = ParallelConfig(pp=2)
    run(tmp_path / "quiet", parallel=layout)
    run(tmp_path / "hit", parallel=layout, fault=FaultConfig(rank=1, step=5))
    assert len(kinds(tmp_path / "hit", "fault.injected")) == 1
    assert steps(tmp_path / "hit") == steps(tmp_path / "quiet")
    assert model_hash(tmp_path / "hit") == model_hash(tmp_path / "quiet")
    ours, theirs = steps(tmp_path / "hit"), steps(unbroken[0])
    assert [ours[s] for s in ours] == pytest.approx([theirs[s] for s in ours], rel=1e-5)


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from puna.core.ledger import LEDGER_FILE, Ledger
from puna.train.config import TrainingConfig
from puna.train.spec import SourceSpec
from puna.train.stage import train_job
from puna.model.config import LlamaConfig

folder = Path({folder!r})
train_job(TrainingConfig.model_validate_json({config!r}),
          LlamaConfig.model_validate_json({model!r}),
          SourceSpec("rows_of_two:Rows", {kwargs!r}), folder / "out",
          Ledger(folder / LEDGER_FILE))
"""


def wait_for(condition, what: str, limit_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.02)


def test_kill_9_of_the_whole_command_leaves_no_orphan_and_changes_nothing(unbroken, tmp_path):
    folder, _ = unbroken
    block = tmp_path / "block"
    block.touch()
    kwargs = {"block": str(block), "block_step": BLOCKED_STEP}
    code = DRIVER.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), kwargs=kwargs,
        config=config().model_dump_json(), model=MODEL.model_dump_json(),
    )  # fmt: skip
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(steps(tmp_path)) == BLOCKED_STEP, "the steps before the block")
        beats = list((tmp_path / "out" / "state" / "attempt-0").glob("heartbeat-*.json"))
        ranks = [json.loads(path.read_text())["pid"] for path in beats]
        agents = [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                  for pid in ranks]  # fmt: skip
        assert len(set(ranks)) == 2
        assert len(set(agents)) == 1
        assert agents[0] != driver.pid
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    tree = {*ranks, *agents}
    wait_for(lambda: not any(map(process_alive, tree)), "the orphans to die", limit_s=10.0)

    # On top of that the newest checkpoint has lost a bit.
    newest = tmp_path / "out" / "checkpoints" / "step-00000006"
    shard = sorted(newest.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 4
    shard.write_bytes(data)
    block.unlink()
    metrics = run(tmp_path, SourceSpec("rows_of_two:Rows", kwargs))
    assert [e["step"] for e in kinds(tmp_path, "train.checkpoint_damaged")] == [6]
    assert [e["step"] for e in kinds(tmp_path, "train.restore")] == [3]
    assert [e["steps_lost"] for e in kinds(tmp_path, "recovery.done")] == [BLOCKED_STEP - 3]
    assert metrics["goodput"]["n_attempts"] == 2
    assert steps(tmp_path) == steps(folder)
    assert model_hash(tmp_path) == model_hash(folder)


def test_a_snapshot_that_lost_a_bit_is_healed_by_another_ranks_copy(unbroken, tmp_path):
    folder, _ = unbroken
    hurt = tmp_path / "hurt"
    hurt.write_text(JOB_OF_THE_HURT)
    state = tmp_path / "out" / "state"
    state.mkdir(parents=True)
    source = SourceSpec("rows_of_two:Rows", {"hurt": str(hurt)})
    checkpoint = CheckpointConfig(every=EVERY, memory_every=1, keep=3, replicate=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puna.train.stage._job_id", lambda out: JOB_OF_THE_HURT)
        run(tmp_path, source, checkpoint=checkpoint, fault=FaultConfig(rank=1, step=8))
    (restored,) = kinds(tmp_path, "train.restored")
    assert (restored["step"], restored["tier"]) == (8, "memory")
    assert {(one["rank"], one["tier"]) for one in restored["shards"]} == {(1, "peer")}
    assert steps(tmp_path) == steps(folder)
    assert model_hash(tmp_path) == model_hash(folder)


def test_a_user_error_in_a_worker_is_one_message(tmp_path):
    with pytest.raises(PunaError) as caught:
        run(tmp_path, SourceSpec("rows_of_two:Rows", {"fail_step": 1}))
    assert str(caught.value) == "shard 7 is damaged (step 1)\n  fix: make it anew"
    assert len(kinds(tmp_path, "attempt.start")) == 1
