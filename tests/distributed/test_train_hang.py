"""Hung ranks of a real training: found, named, and without consequences for the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from puna.train.config import CheckpointConfig, FaultConfig
from tests.distributed.test_train_distributed import (  # noqa: F401 (source_module is a fixture)
    kinds,
    model_hash,
    run,
    source_module,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SETTINGS = {"steps": 40, "checkpoint": CheckpointConfig(every=10, memory_every=0, keep=3)}
STEP = 27


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, source_module) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("quiet")
    run(folder, **SETTINGS)
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("hang", "rank 1 is stopped by a signal"),
        *(
            pytest.param(
                what, "rank 1 is between two parts of its step", marks=pytest.mark.exhaustive
            )
            for what in ("loop", "wait")
        ),
    ],
)
def test_a_hung_rank_is_named_by_default_settings_and_changes_nothing(
    unbroken: Path, tmp_path: Path, what: str, words: str
):
    run(tmp_path, fault=FaultConfig(rank=1, step=STEP, what=what), **SETTINGS)
    (fault,) = kinds(tmp_path, "fault.detected")
    assert (fault["what"], fault["rank"], fault["step"]) == ("hang", 1, STEP)
    assert words in fault["message"]
    assert sorted(fault["stacks"]) == ["0", "1"]
    texts = {rank: Path(path).read_text() for rank, path in fault["stacks"].items()}
    assert "faults.py" in texts["1"]
    assert "clip_gradients" in texts["0"]
    assert all(str(tmp_path / "stacks") in path for path in fault["stacks"].values())
    assert model_hash(tmp_path) == model_hash(unbroken)
