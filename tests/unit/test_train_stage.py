"""The stage itself: from token shards and a tokenizer to a model folder, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.core.stage import stages
from puna.model.config import ModelConfig
from puna.model.formats.load import load_model
from puna.resilience.heartbeat import HeartbeatWriter, read_heartbeats
from puna.tokens.lineage import open_source
from puna.train import stage as stage_module
from puna.train.config import CheckpointConfig, PretrainConfig
from puna.train.eval_config import EvalConfig
from puna.train.loop import train
from puna.train.parallel.world import World
from puna.train.progress import TrainProgress
from puna.train.stage import pretrain

VOCAB = 40


@pytest.fixture
def tokens(tmp_path: Path) -> SimpleNamespace:
    """Token shards of two small sources."""
    folder, rng = tmp_path / "tokens", np.random.default_rng(0)
    index = {"dtype": "uint16", "vocab_size": VOCAB, "splits": {"train": {}}}
    for source in ("code", "docs"):
        lengths = rng.integers(5, 40, 30)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids = np.array([f"{source}{n:028d}" for n in range(30)], dtype="S32")
        where = folder / "train" / source
        where.mkdir(parents=True)
        rng.integers(0, VOCAB, offsets[-1], dtype=np.uint16).tofile(where / "tokens.bin")
        np.save(where / "offsets.npy", offsets)
        np.save(where / "ids.npy", ids)
        np.save(where / "n_bytes.npy", lengths.astype(np.int64))
        counts = {"n_docs": 30, "n_tokens": int(offsets[-1]), "n_bytes": int(lengths.sum())}
        index["splits"]["train"][source] = counts  # type: ignore[index]
    (folder / "index.json").write_text(json.dumps(index))
    return SimpleNamespace(path=folder, file=lambda name: folder / name)


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch) -> SimpleNamespace:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(stage_module, "_special_ids", lambda _: {"bos_id": 1, "eos_ids": [2]})
    return SimpleNamespace(path=folder)


class InThisProcess:
    """Runs the ranks of a job in this process; the tests of two processes stand elsewhere."""

    n_ranks = 1

    def __init__(self, spec) -> None:
        self.spec = spec
        spec.write()

    def start(self, attempt: int) -> InThisProcess:
        self.folder = self.spec.attempt_dir(attempt)
        self.folder.mkdir(parents=True)
        self.failed: list = []
        world = World(0, 1, torch.device("cpu"), 1, None)
        events = Ledger(self.spec.ledger, job=self.spec.job, **self.spec.common)
        train(self.spec, attempt, world, HeartbeatWriter(self.folder, 0), events)
        return self

    def prepare(self, attempt: int) -> None:
        pass

    def close(self) -> None:
        pass

    def poll(self):
        return 0

    def kill(self):
        pass

    def heartbeats(self):
        return read_heartbeats(self.folder)

    def failures(self):
        return []

    def log_tail(self):
        return ""


def config(**values) -> PretrainConfig:
    usual = {
        "steps": 3,
        "seq_len": 16,
        "global_batch": 4,
        "model": ModelConfig(preset="tiny", dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=8),
        "precision": "fp32",
        "checkpoint": CheckpointConfig(every=2, memory_every=0),
    }
    return PretrainConfig(**{**usual, **values})


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(stage_module, "TrainJob", InThisProcess)
    monkeypatch.setattr("puna.train.metrics.measure_peak_flops", lambda *_: 1e9)


def run(tmp_path: Path, cfg: PretrainConfig, inputs) -> dict:
    out = tmp_path / "train.pretrain.partial"
    out.mkdir()
    events = Ledger(tmp_path / LEDGER_FILE, stage="train.pretrain")
    return pretrain(cfg, inputs, out, events)


def test_it_leaves_model_tokenizer_checkpoints_and_the_way_to_its_batches(
    tmp_path, tokens, tokenizer
):
    inputs = {"tokens": tokens, "tokenizer": tokenizer}
    metrics = run(tmp_path, config(weights={"code": 3.0, "docs": 1.0}), inputs)
    out = tmp_path / "train.pretrain.partial"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "loader.json", "model"]
    model = load_model(out / "model")
    assert model.config.vocab_size == VOCAB  # the tokenizer's, not the preset's
    assert (out / "model" / "tokenizer.json").exists()
    assert json.loads((out / "model" / "config.json").read_text())["bos_token_id"] == 1
    lineage = open_source(json.loads((out / "loader.json").read_text())).lineage(0)
    assert [row["source"] for row in lineage].count("code") == 3
    assert metrics["steps"] == 3
    assert metrics["tokens"] == 3 * 64
    assert metrics["n_params"] == sum(p.numel() for p in model.parameters())
    assert metrics["goodput"]["n_steps"] == 3
    json.dumps(metrics, allow_nan=False)
    events = list(read_events(tmp_path / LEDGER_FILE, "train.step"))
    assert {event["stage"] for event in events} == {"train.pretrain"}


def test_a_run_without_weights_takes_the_sources_as_they_are(tmp_path, tokens, tokenizer):
    run(tmp_path, config(steps=1), {"tokens": tokens, "tokenizer": tokenizer})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"cod": 1.0}}, "cod"),
        ({"seq_len": 256}, "seq_len = 256 is longer than the model's max_seq_len = 128"),
        ({"model": ModelConfig(preset="tiny", vocab_size=30)}, "vocab_size = 30"),
    ],
)
def test_bad_input_is_found_before_anything_is_started(
    tmp_path, tokens, tokenizer, values, message
):
    with pytest.raises(PunaError, match=message):
        run(tmp_path, config(**values), {"tokens": tokens, "tokenizer": tokenizer})
    assert not list(read_events(tmp_path / LEDGER_FILE, "attempt.start"))


def test_the_stage_is_registered_as_resumable():
    stage = stages()["train.pretrain"]
    assert stage.resumable
    assert dict(stage.needs) == {
        "tokens?": "tokens.encode|tokens.import",
        "tokenizer?": "tokens.train|tokens.use|tokens.import",
    }


def test_progress_counts_each_step_once_over_restarts(tmp_path, capsys):
    events = Ledger(tmp_path / LEDGER_FILE, job="j")
    spec = SimpleNamespace(job="j", training=config(steps=4))

    def step(number: int) -> None:
        events.emit("train.step", step=number, loss=2.0, tokens_per_s=1.0, mfu=0.5)

    step(0)  # of an earlier, killed call
    with TrainProgress("train.pretrain", spec, events) as shown:  # type: ignore[arg-type]
        for number in (1, 2, 1, 2, 3):
            step(number)
            shown.update()
        with (tmp_path / LEDGER_FILE).open("a") as file:
            file.write('{"kind": "train.st')  # another process is just writing
        shown.update()
    assert "256/256 tokens" in capsys.readouterr().err


def hold_out(tokens: SimpleNamespace) -> None:
    """Make the train split of the shards the held-out one as well."""
    index = json.loads((tokens.path / "index.json").read_text())
    index["splits"]["heldout"] = index["splits"]["train"]
    (tokens.path / "index.json").write_text(json.dumps(index))
    shutil.copytree(tokens.path / "train", tokens.path / "heldout")


def test_held_out_documents_are_measured_while_it_trains(tmp_path, tokens, tokenizer):
    hold_out(tokens)
    inputs = {"tokens": tokens, "tokenizer": tokenizer}
    run(tmp_path, config(eval=EvalConfig(every=2, max_tokens_per_source=300)), inputs)
    events = list(read_events(tmp_path / LEDGER_FILE, "train.eval"))
    assert [event["step"] for event in events] == [1, 2]
    assert set(events[0]["sources"]) == {"code", "docs"}
    for event in events:
        for found in event["sources"].values():
            assert 0 < found["n_tokens"] <= 300
            assert found["bits_per_byte"] > 0


def test_without_held_out_documents_it_says_so_before_it_trains(tmp_path, tokens, tokenizer):
    inputs = {"tokens": tokens, "tokenizer": tokenizer}
    with pytest.raises(PunaError, match="no held-out document"):
        run(tmp_path, config(eval=EvalConfig()), inputs)
    assert not list(read_events(tmp_path / LEDGER_FILE, "job.start"))


def test_a_schedule_is_executed_and_what_was_consumed_is_told(tmp_path, tokens, tokenizer):
    phases = [
        {"name": "stable", "n_tokens": 8 * 64, "shares": {"code": 0.75, "docs": 0.25}},
        {"name": "anneal", "n_tokens": 2 * 64, "shares": {"docs": 1.0}},
    ]
    (tmp_path / "mix.json").write_text(json.dumps({"schema": 1, "phases": phases}))
    metrics = run(
        tmp_path, config(steps=10, mix=str(tmp_path / "mix.json"), log_every=3),
        {"tokens": tokens, "tokenizer": tokenizer},
    )  # fmt: skip
    assert metrics["source_tokens"] == {"code": 6 * 64, "docs": 4 * 64}
    (told,) = read_events(tmp_path / LEDGER_FILE, "train.sources")
    stable, anneal = told["phases"]
    assert (stable["end_step"], anneal["first_step"], anneal["end_step"]) == (8, 8, 10)
    assert stable["sources"]["code"]["tokens"] == stable["sources"]["code"]["planned_tokens"]
    assert anneal["sources"]["code"]["tokens"] == 0
    assert told["most_off_tokens"] == 0
    # What the ranks counted: the last token of a document has no label.
    for source, n_tokens in metrics["source_tokens"].items():
        assert 0.7 * n_tokens < told["labelled"][source] <= n_tokens
    lineage = open_source(json.loads(
        (tmp_path / "train.pretrain.partial" / "loader.json").read_text()
    ))  # fmt: skip
    assert {row["source"] for row in lineage.lineage(9)} == {"docs"}
