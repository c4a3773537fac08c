"""The loop on one rank in this process: resume, fall-back, failing saves, invariance to splits."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LlamaConfig
from puna.model.formats.load import load_model
from puna.model.llama import Llama
from puna.resilience.heartbeat import HeartbeatWriter
from puna.tokens.loader import NO_LABEL, Batch
from puna.train.checkpoint import dcp as dcp_module
from puna.train.checkpoint import store as store_module
from puna.train.checkpoint.manifest import (
    DamagedCheckpointError,
    list_steps,
    step_dir,
    verify,
)
from puna.train.config import AdamWConfig, CheckpointConfig, TrainingConfig
from puna.train.loop import train
from puna.train.numbers_config import NumbersConfig
from puna.train.parallel.world import World
from puna.train.precision import decide_precision
from puna.train.spec import JobSpec, SourceSpec

MODEL = LlamaConfig(
    vocab_size=37, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=32
)
WORLD = World(0, 1, torch.device("cpu"), 1, None)
N_STEPS = 6


class Rows:
    """Counting sequences with holes in the labels, two documents per row."""

    def __init__(self, n_rows: int = 4, seq_len: int = 16) -> None:
        self.n_rows, self.seq_len = n_rows, seq_len

    def batch(self, step: int, rank: int, world: int) -> Batch:
        rng = np.random.default_rng([7, step])
        start = rng.integers(0, MODEL.vocab_size, (self.n_rows, 1))
        tokens = (start + 3 * np.arange(self.seq_len + 1)) % MODEL.vocab_size
        labels = tokens[:, 1:].copy()
        labels[0, 2:] = NO_LABEL  # rows with very different numbers of labels
        half = self.seq_len // 2
        doc_ids = np.zeros((self.n_rows, self.seq_len), np.int32)
        doc_ids[:, half:] = 1
        positions = np.tile(np.arange(half, dtype=np.int32), 2)
        positions = np.broadcast_to(positions, doc_ids.shape).copy()
        n = self.n_rows // world
        mine = slice(rank * n, (rank + 1) * n)
        return Batch(tokens[mine, :-1], labels[mine], doc_ids[mine], positions[mine])


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One thread (steps of a millisecond suffer from a second one) and no measuring of the peak."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puna.train.metrics.measure_peak_flops", lambda *_: 1e9)
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def factory(monkeypatch):
    """Make the stand-in source importable by name, as a worker does it."""
    monkeypatch.setitem(sys.modules, "rows_for_tests", type(sys)("rows_for_tests"))
    sys.modules["rows_for_tests"].Rows = Rows  # type: ignore[attr-defined]


def job(out: Path, **training) -> JobSpec:
    values = {
        "steps": N_STEPS, "seq_len": 16, "global_batch": 4, "optim": AdamWConfig(lr=1e-2),
        "checkpoint": CheckpointConfig(every=2, memory_every=0, keep=2), "precision": "fp32",
        **training,
    }  # fmt: skip
    spec = JobSpec(
        job="j", out=out, ledger=out / LEDGER_FILE, common={},
        source=SourceSpec("rows_for_tests:Rows"), model=MODEL, weights=None, special_ids={},
        training=TrainingConfig(**values),
    )  # fmt: skip
    spec.attempt_dir(0).mkdir(parents=True, exist_ok=True)
    return spec


def run(spec: JobSpec, attempt: int = 0, model: LlamaConfig | None = None) -> None:
    if model is not None:
        spec = replace(spec, model=model)
    heart = HeartbeatWriter(spec.attempt_dir(0), 0)
    train(spec, attempt, WORLD, heart, Ledger(spec.ledger, job=spec.job))


def losses(spec: JobSpec) -> dict[int, float]:
    assert spec.ledger is not None
    return {event["step"]: event["loss"] for event in read_events(spec.ledger, "train.step")}


def events(spec: JobSpec, kind: str) -> list[dict]:
    assert spec.ledger is not None
    return list(read_events(spec.ledger, kind))


def weights_hash(spec: JobSpec) -> str:
    return hash_file(spec.out / "model" / "model.safetensors")


class StopHereError(Exception):
    pass


def run_until(spec: JobSpec, step: int, monkeypatch) -> None:
    """Run, and break off in the middle of ``step``."""

    def break_off(self, at: int) -> None:
        if at == step:
            raise StopHereError

    with monkeypatch.context() as patch:
        patch.setattr("puna.train.loop.FaultInjector.take", break_off)
        with pytest.raises(StopHereError):
            run(spec)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    module = type(sys)("rows_for_tests")
    module.Rows = Rows  # type: ignore[attr-defined]
    sys.modules["rows_for_tests"] = module
    spec = job(tmp_path_factory.mktemp("reference"))
    run(spec)
    return spec


def test_it_learns_and_leaves_a_model_that_loads(reference):
    found = losses(reference)
    assert sorted(found) == list(range(N_STEPS))
    assert found[N_STEPS - 1] < 0.9 * found[0]
    model = load_model(reference.out / "model")
    assert model.config == MODEL
    assert next(model.parameters()).dtype == torch.float32


def test_the_first_loss_is_that_of_the_model_as_initialised(reference):
    model = Llama(MODEL)
    model.init_weights(0)
    batch = Rows().batch(0, 0, 1)
    logits = model(*(torch.from_numpy(x) for x in (batch.tokens_BT, batch.positions_BT)),
                   doc_ids_BT=torch.from_numpy(batch.doc_ids_BT))  # fmt: skip
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.labels_BT).flatten()
    )
    assert losses(reference)[0] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_does_not_depend_on_its_split(reference, tmp_path, micro_batch):
    spec = job(tmp_path, micro_batch=micro_batch)
    run(spec)
    for key in ("loss", "grad_norm"):
        ours = [event[key] for event in events(spec, "train.step")]
        theirs = [event[key] for event in events(reference, "train.step")]
        assert ours == pytest.approx(theirs, rel=1e-5)  # fp32, another order of sums


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3, 5])
def test_a_broken_run_ends_bitwise_like_an_unbroken_one(reference, tmp_path, monkeypatch, stop_at):
    spec = job(tmp_path)
    run_until(spec, stop_at, monkeypatch)
    run(spec, attempt=1)
    assert [event["step"] for event in events(spec, "train.restore")] == [stop_at // 2 * 2]
    assert losses(spec) == losses(reference)
    assert weights_hash(spec) == weights_hash(reference)
    assert {
        path.name: hash_file(path) for path in step_dir(spec.out / "checkpoints", 6).iterdir()
    } == {
        path.name: hash_file(path) for path in step_dir(reference.out / "checkpoints", 6).iterdir()
    }  # the optimiser's state, too


def test_a_finished_run_does_nothing_but_write_the_model_again(reference, tmp_path):
    spec = job(tmp_path)
    run(spec)
    run(spec, attempt=1)
    assert len(events(spec, "train.step")) == N_STEPS
    assert weights_hash(spec) == weights_hash(reference)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def swap_in(path: Path) -> None:
    (older,) = step_dir(path.parent.parent, 2).glob("*.safetensors")
    path.write_bytes(older.read_bytes())


DAMAGE = {
    "flipped bit": flip_a_bit,
    "cut short": cut_short,
    "another checkpoint's file": swap_in,
    "missing file": Path.unlink,
    "broken manifest": lambda path: (path.parent / "manifest.json").write_text("{"),
    "missing manifest": lambda path: (path.parent / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_not_trusted(reference, tmp_path, monkeypatch, damage):
    spec = job(tmp_path)
    run_until(spec, 5, monkeypatch)
    checkpoints = spec.out / "checkpoints"
    assert list_steps(checkpoints) == [4, 2]
    (newest,) = step_dir(checkpoints, 4).glob("*.safetensors")
    damage(newest)
    with pytest.raises(DamagedCheckpointError):
        verify(newest.parent)
    run(spec, attempt=1)
    assert [event["step"] for event in events(spec, "train.checkpoint_damaged")] == [4]
    assert [event["step"] for event in events(spec, "train.restore")] == [2]
    assert losses(spec) == losses(reference)
    assert weights_hash(spec) == weights_hash(reference)


def test_with_every_checkpoint_damaged_it_starts_from_the_beginning(
    reference, tmp_path, monkeypatch
):
    spec = job(tmp_path)
    run_until(spec, 5, monkeypatch)
    for path in (spec.out / "checkpoints").glob("*/*.safetensors"):
        flip_a_bit(path)
    run(spec, attempt=1)
    assert len(events(spec, "train.checkpoint_damaged")) == 2
    assert weights_hash(spec) == weights_hash(reference)


def test_a_half_written_checkpoint_is_ignored_and_cleared_away(reference, tmp_path, monkeypatch):
    spec = job(tmp_path)
    run_until(spec, 3, monkeypatch)
    torn = spec.out / "checkpoints" / ".step-00000004.0.partial"
    torn.mkdir()
    (torn / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    run(spec, attempt=1)
    assert not torn.exists()
    assert weights_hash(spec) == weights_hash(reference)


def test_only_the_newest_checkpoints_are_kept(reference):
    assert list_steps(reference.out / "checkpoints") == [6, 4]


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["write", "seal"])
def test_a_full_disk_is_one_clear_error_and_leaves_the_last_good_checkpoint(
    tmp_path, monkeypatch, where
):
    spec = job(
        tmp_path, checkpoint=CheckpointConfig(every=2, memory_every=0, keep=2, on_failure="stop")
    )
    run_until(spec, 3, monkeypatch)
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(dcp_module.HuggingFaceStorageWriter, "write_data", full_disk)
        else:
            patch.setattr(store_module, "seal", full_disk)
        with pytest.raises(PunaError, match=r"checkpoint of step 4 .*disk is full") as caught:
            run(spec, attempt=1)
    assert "free some space" in str(caught.value)
    assert [path.name for path in (spec.out / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_failed_save_may_be_recorded_and_passed_over(reference, tmp_path, monkeypatch):
    spec = job(
        tmp_path,
        checkpoint=CheckpointConfig(every=2, memory_every=0, keep=2, on_failure="continue"),
    )
    seal, calls = store_module.seal, iter(range(10))
    monkeypatch.setattr(
        store_module, "seal", lambda *a, **k: full_disk() if next(calls) == 1 else seal(*a, **k)
    )
    run(spec)
    (failed,) = events(spec, "train.checkpoint_failed")
    assert failed["step"] == 4
    assert "disk is full" in failed["error"]
    assert list_steps(spec.out / "checkpoints") == [6, 2]
    assert weights_hash(spec) == weights_hash(reference)


def test_a_run_that_lost_its_disk_goes_on_from_the_store(reference, tmp_path, monkeypatch):
    settings = CheckpointConfig(every=2, memory_every=0, store=f"file://{tmp_path}/store")
    spec = job(tmp_path, checkpoint=settings)
    run_until(spec, 5, monkeypatch)
    shutil.rmtree(spec.out / "checkpoints")
    run(spec, attempt=1)
    (restored,) = events(spec, "train.restored")
    assert restored["tier"] == "store"
    assert losses(spec) == losses(reference)
    assert weights_hash(spec) == weights_hash(reference)
    assert [event["step"] for event in events(spec, "train.upload")][-1] == 6  # waited for


def test_the_last_checkpoint_must_be_saved_in_any_case(tmp_path, monkeypatch):
    spec = job(
        tmp_path, checkpoint=CheckpointConfig(every=99, memory_every=0, on_failure="continue")
    )
    monkeypatch.setattr(store_module, "seal", full_disk)
    with pytest.raises(PunaError, match="disk is full"):
        run(spec)
    assert not (spec.out / "model").exists()


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, monkeypatch):
    run_until(job(tmp_path), 3, monkeypatch)
    with pytest.raises(PunaError, match="another configuration"):
        run(job(tmp_path, optim=AdamWConfig(lr=5e-2)), attempt=1)


def test_a_loss_that_is_no_number_stops_the_run_with_the_step(tmp_path):
    with pytest.raises(PunaError, match=r"step [1-5]: the loss is .*(nan|inf)"):
        run(job(tmp_path, optim=AdamWConfig(lr=1e30), clip_norm=0.0,
                numbers=NumbersConfig(not_finite=["stop"])))  # fmt: skip


def test_training_starts_from_the_weights_of_a_folder(reference, tmp_path):
    spec = replace(job(tmp_path, steps=1), weights=reference.out / "model")
    run(spec)
    model, batch = load_model(reference.out / "model"), Rows().batch(0, 0, 1)
    logits = model(*(torch.from_numpy(x) for x in (batch.tokens_BT, batch.positions_BT)),
                   doc_ids_BT=torch.from_numpy(batch.doc_ids_BT))  # fmt: skip
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.labels_BT).flatten()
    )
    assert losses(spec)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_log_every_covers_all_steps_in_fewer_events(reference, tmp_path):
    spec = job(tmp_path, log_every=4)
    run(spec)
    found = events(spec, "train.step")
    assert [(e["step"], e["n_steps"]) for e in found] == [(1, 2), (3, 2), (5, 2)]  # and at saves
    assert all(losses(reference)[e["step"]] == e["loss"] for e in found)


def test_precision_is_decided_by_capability_and_kept_by_a_checkpoint(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert decide_precision("auto", cpu).dtype == torch.bfloat16
    assert "avx512_bf16" in decide_precision("auto", cpu).reason
    assert decide_precision("auto", cpu, earlier="float32").dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert decide_precision("auto", cpu).dtype == torch.float32
    assert decide_precision("bf16", cpu).dtype == torch.bfloat16


def test_bf16_trains_with_fp32_weights(reference, tmp_path):
    spec = job(tmp_path, precision="bf16")
    run(spec)
    assert events(spec, "train.start")[0]["dtype"] == "bfloat16"
    assert losses(spec)[5] == pytest.approx(losses(reference)[5], rel=3e-2)
    assert losses(spec) != losses(reference)
    assert next(load_model(spec.out / "model").parameters()).dtype == torch.float32


def test_every_rank_beats_and_the_job_file_survives_a_round_trip(reference):
    assert JobSpec.read(reference.write()) == reference
    beat = json.loads((reference.attempt_dir(0) / "heartbeat-0.json").read_text())
    assert (beat["phase"], beat["step"]) == ("done", N_STEPS)


def test_steps_are_compared_with_the_planner_s_prediction(tmp_path):
    """The hardware file is of a machine that is far faster than any; the weights stay the same."""
    fast = tmp_path / "fast.toml"
    fast.write_text(
        "bf16_tflops = 1e6\nfp32_tflops = 1e6\nhbm_tb_s = 1e6\nmemory_gib = 80\nnvlink_gb_s = 1e6\n"
    )
    plain = job(tmp_path / "plain")
    run(plain)
    assert not events(plain, "train.predicted")
    watched = job(tmp_path / "watched", predict={"hardware": str(fast), "over": 2})
    run(watched)
    (predicted,) = events(watched, "train.predicted")
    assert predicted["low_s"] < predicted["step_s"] < predicted["high_s"]
    steps = events(watched, "train.step")
    # The optimiser's constant part alone is 2 ms, so the small model may be faster than predicted.
    told = events(watched, "train.deviation")
    ratios = [one["step_s"] / predicted["step_s"] for one in steps[1:]]
    assert told or all(0.9 <= ratio <= 1.1 for ratio in ratios)
    assert weights_hash(watched) == weights_hash(plain)
    assert watched.identity() == plain.identity()
