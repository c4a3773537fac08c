"""Bits per byte of a checkpoint of a training that has not ended."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.eval.checkpoint import measure_checkpoint
from puna.train.checkpoint.manifest import list_steps, step_dir
from puna.train.eval_config import EvalConfig
from puna.train.stage import pretrain
from tests.unit import test_train_stage
from tests.unit.test_train_stage import config, hold_out

tokens, tokenizer = test_train_stage.tokens, test_train_stage.tokenizer
in_this_process = test_train_stage.in_this_process


@pytest.fixture
def run_dir(tmp_path: Path, tokens: SimpleNamespace, tokenizer: SimpleNamespace) -> Path:
    """A run whose training still has its partial name."""
    hold_out(tokens)
    out = tmp_path / "train.pretrain.partial"
    out.mkdir()
    cfg = config(eval=EvalConfig(every=1, max_tokens_per_source=300), steps=4)
    events = Ledger(tmp_path / LEDGER_FILE, stage="train.pretrain")
    pretrain(cfg, {"tokens": tokens, "tokenizer": tokenizer}, out, events)  # type: ignore[arg-type]
    return tmp_path


def test_a_checkpoint_gives_the_numbers_that_the_training_itself_measured(run_dir):
    of_training = {e["step"] + 1: e for e in read_events(run_dir / LEDGER_FILE, "train.eval")}
    for step in (None, 2):
        found = measure_checkpoint(run_dir, step, max_tokens=300)
        assert found["step"] == (step or 4)
        expected = of_training[found["step"]]
        assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
        for name, row in found["sources"].items():
            assert row["n_tokens"] == expected["sources"][name]["n_tokens"]
            value = expected["sources"][name]["bits_per_byte"]
            assert row["bits_per_byte"] == pytest.approx(value, rel=1e-5)


def test_a_damaged_newest_checkpoint_is_passed_over_unless_it_is_named(run_dir):
    folder = run_dir / "train.pretrain.partial" / "checkpoints"
    assert list_steps(folder) == [4, 2]
    shard = next(step_dir(folder, 4).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert measure_checkpoint(run_dir, max_tokens=300)["step"] == 2
    with pytest.raises(PunaError, match="step 4 cannot be read"):
        measure_checkpoint(run_dir, 4, max_tokens=300)


def test_what_is_not_there_is_named(run_dir, tmp_path_factory):
    with pytest.raises(PunaError, match="no checkpoint of step 3") as caught:
        measure_checkpoint(run_dir, 3)
    assert "4, 2" in str(caught.value.fix)
    with pytest.raises(PunaError, match="has begun"):
        measure_checkpoint(tmp_path_factory.mktemp("empty"))


def test_the_command_prints_json(run_dir):
    from click.testing import CliRunner

    from puna.cli.main import cli

    result = CliRunner().invoke(cli, ["eval", "checkpoint", str(run_dir), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["step"] == 4
