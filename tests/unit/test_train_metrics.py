"""What a step tells about itself: parts of its time, losses of sources, FLOPs, memory."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch

from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.accounting import account
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.resilience.heartbeat import HeartbeatWriter
from puna.tokens.loader import NO_LABEL, Batch
from puna.train.batch import TensorBatch
from puna.train.config import CheckpointConfig, MemoryConfig, TrainingConfig
from puna.train.loop import train
from puna.train.metrics import StepCost
from puna.train.parallel.world import World
from puna.train.spec import JobSpec, SourceSpec
from puna.train.watch.clock import StepClock
from puna.train.watch.memory import peak_memory_bytes

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU, 1, None)
MODEL = LlamaConfig(
    vocab_size=37, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=32
)
N_ROWS, SEQ_LEN = 4, 16
SOURCES = ("code", "news", "web")


def batch_of(step: int) -> Batch:
    rng = np.random.default_rng([5, step])
    tokens = rng.integers(0, MODEL.vocab_size, (N_ROWS, SEQ_LEN + 1))
    labels = tokens[:, 1:].copy()
    labels[0, 3:] = NO_LABEL
    doc_ids = np.zeros((N_ROWS, SEQ_LEN), np.int32)
    doc_ids[:, 5:] = 1
    doc_ids[3, 12:] = -1
    positions = np.arange(SEQ_LEN, dtype=np.int32) - np.where(doc_ids == 0, 0, 5)
    positions = np.where(doc_ids < 0, 0, positions).astype(np.int32)
    labels[3, 12:] = NO_LABEL
    source_B = np.array([2, 0, 2, 0])
    return Batch(tokens[:, :-1].copy(), labels, doc_ids, positions, SOURCES, source_B)


class Rows:
    n_rows = N_ROWS

    def batch(self, step: int, rank: int, world: int) -> Batch:
        return batch_of(step)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("puna.train.metrics.measure_peak_flops", lambda *_: 1e9)
    monkeypatch.setitem(sys.modules, "rows_for_tests", type(sys)("rows_for_tests"))
    sys.modules["rows_for_tests"].Rows = Rows  # type: ignore[attr-defined]


def run(folder, **training) -> list[dict]:
    values = {
        "steps": 4, "seq_len": SEQ_LEN, "global_batch": N_ROWS, "precision": "fp32",
        "checkpoint": CheckpointConfig(every=2, memory_every=0), **training,
    }  # fmt: skip
    spec = JobSpec(
        job="j", out=folder, ledger=folder / LEDGER_FILE, common={}, model=MODEL, weights=None,
        source=SourceSpec("rows_for_tests:Rows"), special_ids={},
        training=TrainingConfig(**values),
    )  # fmt: skip
    spec.attempt_dir(0).mkdir(parents=True)
    train(spec, 0, WORLD, HeartbeatWriter(spec.attempt_dir(0), 0), Ledger(spec.ledger, job="j"))
    return list(read_events(folder / LEDGER_FILE, "train.step"))


def test_a_moment_counts_to_the_innermost_part():
    clock = StepClock(CPU)
    begin_s = time.perf_counter()
    with clock.part("backward"):
        time.sleep(0.02)
        with clock.part("communication"):
            time.sleep(0.05)
        time.sleep(0.02)
    clock.timed("data", time.sleep)(0.03)
    passed_s, parts = time.perf_counter() - begin_s, clock.take()
    assert parts["communication"] >= 0.05
    assert parts["data"] >= 0.03
    assert 0.04 <= parts["backward"] <= passed_s - 0.08
    assert sum(parts.values()) <= passed_s
    assert set(clock.take().values()) == {0.0}


def test_a_clock_is_not_read_in_the_middle_of_a_part():
    clock = StepClock(CPU)
    with clock.part("forward"), pytest.raises(ValueError, match="forward"):
        clock.take()


def test_the_loss_of_each_source_is_that_of_its_rows(tmp_path):
    events = run(tmp_path, steps=1)
    model = Llama(MODEL)
    batch = batch_of(0)
    with torch.no_grad():
        logits = model(*(torch.from_numpy(x) for x in (batch.tokens_BT, batch.positions_BT)),
                       doc_ids_BT=torch.from_numpy(batch.doc_ids_BT))  # fmt: skip
    found = events[0]["sources"]
    assert set(found) == {"code", "web"}  # news has no row
    for name, rows in (("code", [1, 3]), ("web", [0, 2])):
        labels = torch.from_numpy(batch.labels_BT[rows])
        expected = torch.nn.functional.cross_entropy(logits[rows].flatten(0, 1), labels.flatten())
        assert found[name]["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert found[name]["tokens"] == int((labels != NO_LABEL).sum())


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_sources_are_a_mean_over_the_steps_of_an_event(tmp_path, micro_batch):
    single = run(tmp_path / "single", micro_batch=micro_batch, steps=2)
    (both,) = run(tmp_path / "both", micro_batch=micro_batch, steps=2, log_every=2)
    for name, found in both["sources"].items():
        of_steps = [event["sources"][name] for event in single]
        nats = sum(one["loss"] * one["tokens"] for one in of_steps)
        assert found["tokens"] == sum(one["tokens"] for one in of_steps)
        assert found["loss"] == pytest.approx(nats / found["tokens"], rel=1e-6)
    total = sum(one["loss"] * one["tokens"] for one in single[1]["sources"].values())
    n_tokens = sum(one["tokens"] for one in single[1]["sources"].values())
    assert single[1]["loss"] == pytest.approx(total / n_tokens, rel=1e-6)


def test_the_loss_of_a_source_is_without_the_z_loss(tmp_path):
    plain = run(tmp_path / "plain", steps=1)[0]
    with_z = run(tmp_path / "z", steps=1, z_loss=0.1)[0]
    assert with_z["loss"] > plain["loss"]
    assert with_z["sources"] == plain["sources"]


def test_the_parts_fit_into_the_step_and_saving_is_beside_it(tmp_path):
    events = run(tmp_path)
    names = ("data_s", "forward_s", "backward_s", "optimizer_s", "communication_s")
    for event in events:
        parts = [event[name] for name in names]
        assert all(part >= 0 for part in parts)
        assert min(event["forward_s"], event["backward_s"], event["optimizer_s"]) > 0
        assert sum(parts) <= event["step_s"]
    assert [event["checkpoint_s"] > 0 for event in events] == [False, False, True, False]
    assert all(event["peak_memory_bytes"] > 1 << 20 for event in events)


def test_flops_are_counted_by_convention_by_hardware_and_by_documents(tmp_path):
    plain = run(tmp_path / "plain", steps=1)[0]
    again = run(tmp_path / "again", steps=1, memory=MemoryConfig(recompute="full"))[0]
    forward = account(MODEL).flops_per_token(SEQ_LEN, training=False)
    head = 2 * MODEL.vocab_size * MODEL.dim
    assert plain["hfu"] == plain["mfu"]
    # A whole forward pass more, without the head.
    assert again["hfu"] / again["mfu"] == pytest.approx((4 * forward - head) / (3 * forward))
    assert plain["tflops_per_device"] * 1e12 == pytest.approx(plain["mfu"] * 1e9)
    n_tokens = N_ROWS * SEQ_LEN
    # 5 + 11 tokens in three rows, 5 + 7 and padding in one.
    n_visible = 4 * 15 + 3 * 66 + 28
    matrices = 2 * account(MODEL).n_matmul_params * n_tokens
    by_documents = matrices + 4 * MODEL.n_layers * MODEL.dim * n_visible
    ratio = plain["mfu_documents"] / plain["mfu"]
    assert ratio == pytest.approx(by_documents / (forward * n_tokens))


def test_documents_of_one_row_see_what_causality_leaves():
    cost = StepCost(account(MODEL), 0.0, 1.0)
    whole = cost.document_flops(SEQ_LEN, SEQ_LEN * (SEQ_LEN + 1) / 2)
    assert whole == SEQ_LEN * account(MODEL).flops_per_token(SEQ_LEN, causal=True)


def test_a_batch_without_sources_counts_its_visible_keys():
    whole = batch_of(0)
    rows = Batch(whole.tokens_BT, whole.labels_BT, whole.doc_ids_BT, whole.positions_BT)
    batch = TensorBatch.of(rows, CPU)
    assert batch.sources == ()
    assert batch.source_B.tolist() == [0] * N_ROWS
    assert batch.n_visible == 4 * 15 + 3 * 66 + 28


def test_the_peak_of_memory_grows_with_what_is_taken():
    before = peak_memory_bytes(CPU)
    held = np.ones(1 << 25)  # 256 MiB
    assert peak_memory_bytes(CPU) >= before
    del held
    assert peak_memory_bytes(CPU) >= 1 << 28
