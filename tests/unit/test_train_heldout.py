"""Held-out text measured in the middle of a training, which it must not change."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from puna.core.fsio import hash_file
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.eval.likelihood import measure
from puna.model.formats.load import load_model
from puna.resilience.heartbeat import HeartbeatWriter
from puna.tokens.heldout import TextSet
from puna.tokens.loader import NO_LABEL
from puna.tokens.windows import document_windows
from puna.train.config import CheckpointConfig, TrainingConfig
from puna.train.loop import train
from puna.train.parallel.layout import Layout
from puna.train.parallel.world import World
from puna.train.spec import HeldOutSpec, JobSpec, SourceSpec
from puna.train.watch.heldout import share_of_rows
from tests.unit import test_train_metrics
from tests.unit.test_train_metrics import CPU, MODEL, N_ROWS, SEQ_LEN, WORLD, Rows

quick = test_train_metrics.quick


def text_sets() -> list[TextSet]:
    rng = np.random.default_rng(0)
    found = []
    for name, lengths in (("code", (9, 40, 3)), ("web", (16, 5, 70))):
        documents = [rng.integers(0, MODEL.vocab_size, n) for n in lengths]
        pieces = [piece for one in documents for piece in document_windows(one, SEQ_LEN, 4)]
        n_tokens = sum(len(one) - 1 for one in documents)
        found.append(TextSet(name, pieces, len(documents), n_tokens, 3 * n_tokens, 0))
    return found


@pytest.fixture(autouse=True)
def factory(monkeypatch):
    monkeypatch.setitem(sys.modules, "sets_for_tests", type(sys)("sets_for_tests"))
    sys.modules["sets_for_tests"].text_sets = text_sets  # type: ignore[attr-defined]


def job(folder, every: int | None, **training) -> JobSpec:
    values = {
        "steps": 5, "seq_len": SEQ_LEN, "global_batch": N_ROWS, "precision": "fp32",
        "checkpoint": CheckpointConfig(every=2, memory_every=0), **training,
    }  # fmt: skip
    heldout = HeldOutSpec(SourceSpec("sets_for_tests:text_sets"), every) if every else None
    spec = JobSpec(
        job="j", out=folder, ledger=folder / LEDGER_FILE, common={}, model=MODEL, weights=None,
        source=SourceSpec("rows_for_tests:Rows"), special_ids={}, heldout=heldout,
        training=TrainingConfig(**values),
    )  # fmt: skip
    spec.attempt_dir(0).mkdir(parents=True)
    return spec


def run(spec: JobSpec) -> list[dict]:
    train(spec, 0, WORLD, HeartbeatWriter(spec.attempt_dir(0), 0), Ledger(spec.ledger, job="j"))
    assert spec.ledger is not None
    return list(read_events(spec.ledger, "train.eval"))


def test_it_is_measured_every_so_many_steps_and_at_the_end_as_eval_measures(tmp_path):
    assert Rows.n_rows == N_ROWS
    spec = job(tmp_path, 2)
    events = run(spec)
    assert [event["step"] for event in events] == [1, 3, 4]
    model = load_model(tmp_path / "model")
    sets = text_sets()
    total_bits = 0.0
    for one in sets:
        expected = measure(model, one.pieces, SEQ_LEN, 3)
        found = events[-1]["sources"][one.name]
        assert expected.n_tokens == one.n_tokens == found["n_tokens"]
        assert found["bits_per_byte"] == pytest.approx(expected.bits / one.n_bytes, rel=1e-5)
        assert found["nats_per_token"] == pytest.approx(expected.nll_nats / one.n_tokens, rel=1e-5)
        total_bits += expected.bits
    whole = total_bits / sum(one.n_bytes for one in sets)
    assert events[-1]["bits_per_byte"] == pytest.approx(whole, rel=1e-5)
    assert events[0]["sources"] != events[-1]["sources"]


@pytest.mark.parametrize("training", [{}, {"micro_batch": 1}, {"log_every": 3}])
def test_a_training_with_and_without_it_gives_the_same_bits(tmp_path, training):
    specs = [job(tmp_path / str(every), every, **training) for every in (None, 1)]
    assert [len(run(spec)) for spec in specs] == [0, 5]
    plain, measured = (hash_file(spec.out / "model" / "model.safetensors") for spec in specs)
    assert plain == measured


def test_its_time_is_beside_the_steps(tmp_path):
    spec = job(tmp_path, 2)
    run(spec)
    events = list(read_events(spec.ledger, "train.step"))  # type: ignore[arg-type]
    assert [event["eval_s"] > 0 for event in events] == [False, False, True, False, True]
    measured = next(read_events(spec.ledger, "train.eval"))  # type: ignore[arg-type]
    assert measured["seconds"] == pytest.approx(events[2]["eval_s"], rel=0.2)


def test_the_ranks_share_the_rows_and_all_have_as_many():
    sets = text_sets()
    whole = [label for one in sets for piece in one.pieces for label in piece.labels.tolist()]
    for n_ranks, micro_batch in ((1, 2), (3, 2), (8, 4)):
        world = World(0, n_ranks, CPU, 1, None, Layout(shard=n_ranks))
        shares = [
            share_of_rows(sets, SEQ_LEN, micro_batch, replace(world, rank=rank))
            for rank in range(n_ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        assert {batch.tokens_BT.shape for share in shares for batch in share} == {
            (micro_batch, SEQ_LEN)
        }
        labels = torch.cat([batch.labels_BT.flatten() for share in shares for batch in share])
        kept = labels[labels != NO_LABEL].tolist()
        assert sorted(kept) == sorted(label for label in whole if label != NO_LABEL)


def test_a_job_file_keeps_what_is_measured(tmp_path):
    spec = job(tmp_path, 7)
    assert JobSpec.read(spec.write()).heldout == spec.heldout
