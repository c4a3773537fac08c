"""Numbers of a training to TensorBoard, Weights & Biases and MLflow, and what fails there."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.train import log_config
from puna.train.log_config import LogConfig, check_log
from puna.train.watch import writers as writers_module
from puna.train.watch.writers import Writers, open_writer
from tests.unit import test_train_metrics
from tests.unit.test_train_metrics import run

quick = test_train_metrics.quick

STEP = {"step": 3, "loss": 2.5, "sources": {"web": {"loss": 2.0, "tokens": 7}}, "note": "text"}


def make(tmp_path: Path, *to: str) -> Writers:
    config = LogConfig(to=list(to), offline=True)  # type: ignore[arg-type]
    return Writers(config, tmp_path, "j", {"lr": 1.0}, 0, Ledger(tmp_path / LEDGER_FILE))


def failures(tmp_path: Path) -> list[dict]:
    return list(read_events(tmp_path / LEDGER_FILE, "train.log_failed"))


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_a_training_draws_its_steps_into_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    events = run(tmp_path, log=LogConfig(to=["tensorboard"]))
    drawn = read_tensorboard(tmp_path / "log" / "tensorboard")
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "forward_s"):
        expected = [(event["step"], pytest.approx(event[name], rel=1e-6)) for event in events]
        assert drawn[f"train/{name}"] == expected
    last = events[-1]["sources"]["web"]["loss"]
    assert drawn["train/sources/web/loss"][-1][1] == pytest.approx(last, rel=1e-6)


def test_a_restart_hides_what_the_attempt_before_drew_from_there_on(tmp_path):
    pytest.importorskip("tensorboard")
    for first, value in ((0, 1.0), (2, 5.0)):
        writer = open_writer("tensorboard", LogConfig(), tmp_path, "j", {}, first)
        for step in range(first, 4):
            writer.write(step, {"loss": value})
        writer.close()
    drawn = read_tensorboard(tmp_path / "tensorboard")["loss"]
    assert drawn == [(0, 1.0), (1, 1.0), (2, 5.0), (3, 5.0)]


def test_mlflow_keeps_numbers_in_files_and_a_restart_goes_on_in_the_same_run(tmp_path):
    pytest.importorskip("mlflow")
    for step in (3, 4):
        with make(tmp_path, "mlflow") as writers:
            writers.put(step, STEP)
    assert [told["why"] for told in failures(tmp_path)] == []
    (metric,) = (tmp_path / "log" / "mlflow").rglob("metrics/train/sources/web/loss")
    assert [line.split()[1:] for line in metric.read_text().splitlines()] == [
        ["2.0", "3"], ["2.0", "4"],
    ]  # fmt: skip


def test_wandb_writes_a_folder_when_it_is_offline(tmp_path):
    pytest.importorskip("wandb")
    with make(tmp_path, "wandb") as writers:
        writers.put(3, STEP)
    assert [told["why"] for told in failures(tmp_path)] == []
    (run_file,) = (tmp_path / "log" / "wandb").rglob("run-j.wandb")
    deadline_s = time.monotonic() + 20  # its own process writes it
    while b"train/sources/web/loss" not in run_file.read_bytes():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


class Fake:
    def __init__(self, fails_at: int | None = None, waits: threading.Event | None = None) -> None:
        self.taken: list[int] = []
        self.fails_at, self.waits, self.is_closed = fails_at, waits, False

    def write(self, step, values) -> None:
        if self.waits is not None:
            self.waits.wait(10)
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.taken.append(step)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def fakes(monkeypatch):
    made: dict[str, Fake] = {}
    monkeypatch.setattr(writers_module, "open_writer", lambda target, *_: made[target])
    return made


def test_a_writer_that_fails_is_told_once_and_the_others_go_on(tmp_path, fakes):
    fakes |= {"wandb": Fake(fails_at=1), "mlflow": Fake()}
    with make(tmp_path, "wandb", "mlflow") as writers:
        for step in range(4):
            writers.put(step, STEP)
    (told,) = failures(tmp_path)
    assert (told["target"], told["why"]) == ("wandb", "ConnectionError: the server is gone")
    assert fakes["wandb"].taken == [0]
    assert fakes["mlflow"].taken == [0, 1, 2, 3]
    assert fakes["mlflow"].is_closed


def test_training_goes_on_without_its_writer(tmp_path, fakes):
    fakes["tensorboard"] = Fake(fails_at=1)
    events = run(tmp_path, log=LogConfig(to=["tensorboard"]))
    assert [event["step"] for event in events] == [0, 1, 2, 3]
    assert len(failures(tmp_path)) == 1


def test_a_server_that_hangs_stops_nothing_and_is_told_once(tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(writers_module, "_MOST_WAITING", 2)
    monkeypatch.setattr(writers_module, "_PATIENCE_S", 0.1)
    answers = threading.Event()
    fakes["wandb"] = Fake(waits=answers)
    with make(tmp_path, "wandb") as writers:
        for step in range(20):
            writers.put(step, STEP)
    (told,) = failures(tmp_path)
    assert "are lost" in told["why"]
    answers.set()


def test_a_package_that_is_missing_is_named_before_training(monkeypatch):
    monkeypatch.setitem(log_config._MODULES, "mlflow", "no_such_package")
    with pytest.raises(PunaError, match=r"log\.to") as caught:
        check_log(LogConfig(to=["mlflow"]))
    assert "puna[mlflow]" in str(caught.value.fix)


def test_wandb_without_a_key_is_refused_unless_it_is_offline(monkeypatch):
    monkeypatch.setattr(log_config, "_has_wandb_key", lambda: False)
    monkeypatch.setattr(log_config.importlib.util, "find_spec", lambda _: True)
    with pytest.raises(PunaError, match="no key"):
        check_log(LogConfig(to=["wandb"]))
    check_log(LogConfig(to=["wandb"], offline=True))
