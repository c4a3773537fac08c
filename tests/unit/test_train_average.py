"""Averages of the weights: which steps count, and what the final model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from puna.model.formats.load import load_model
from puna.train.average import weight_of
from puna.train.checkpoint.manifest import step_dir
from puna.train.config import CheckpointConfig
from puna.train.optim_config import EmaConfig, LastConfig
from tests.unit.test_train_loop import (  # noqa: F401 - fixtures
    N_STEPS,
    factory,
    job,
    quick,
    run,
    run_until,
)


@settings(deadline=None)
@given(
    n_steps=st.integers(1, 60),
    steps=st.floats(0.01, 0.99) | st.integers(1, 80),
    every=st.integers(1, 9),
)
def test_the_last_steps_count_alike(n_steps, steps, every):
    config = LastConfig(steps=steps, every=every)
    shares = torch.zeros(n_steps, dtype=torch.float64)
    for step in range(n_steps):
        weight = weight_of(config, step, n_steps)
        shares *= 1 - weight
        shares[step] += weight
    window = max(1, round(steps * n_steps) if steps < 1 else steps)
    counted = list(range(n_steps - 1, max(-1, n_steps - 1 - window), -every))[::-1]
    assert torch.nonzero(shares).flatten().tolist() == counted
    expected = torch.full((len(counted),), 1 / len(counted), dtype=torch.float64)
    torch.testing.assert_close(shares[counted], expected)


@pytest.mark.parametrize(("every", "n_steps"), [(1, 7), (3, 9), (3, 11), (10, 4)])
def test_a_moving_average_decays_by_step_however_often_it_is_updated(every, n_steps):
    config = EmaConfig(decay=0.9, every=every)
    weights = [weight_of(config, step, n_steps) for step in range(n_steps)]
    counted = [step for step, weight in enumerate(weights) if weight]
    first = every - 1 if every <= n_steps else n_steps - 1
    assert counted == sorted({*range(first, n_steps, every), n_steps - 1})
    assert weights[first] == 1.0  # begins as the weights, and not as zero
    left = 1.0
    for step in counted[1:]:
        left *= 1 - weights[step]
    assert left == pytest.approx(0.9 ** (n_steps - 1 - first))


def all_weights(out: Path) -> list[dict[str, torch.Tensor]]:
    """The weights after each step, from its checkpoint."""
    found = []
    for step in range(1, N_STEPS + 1):
        tensors: dict[str, torch.Tensor] = {}
        for file in step_dir(out / "checkpoints", step).glob("*.safetensors"):
            tensors |= load_file(file)
        found.append({k: v for k, v in tensors.items() if k.startswith("model.")})
    return found


def averaged(out: Path, average: Any) -> Any:
    return job(out, average=average, checkpoint=CheckpointConfig(every=1, keep=N_STEPS))


def final(out: Path, folder: str) -> dict[str, torch.Tensor]:
    """Parameters by their names in a checkpoint."""
    return {f"model.{k}": v.detach() for k, v in load_model(out / folder).named_parameters()}


def test_the_final_model_is_the_mean_of_the_last_weights(tmp_path):
    spec = averaged(tmp_path, LastConfig(steps=4, every=2))
    run(spec)
    weights = all_weights(tmp_path)
    model, last = final(tmp_path, "model"), final(tmp_path, "model-last")
    for name, value in model.items():
        mean = (weights[3][name] + weights[5][name]) / 2
        torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-7)
        assert torch.equal(last[name], weights[-1][name])


def test_the_final_model_is_the_moving_average(tmp_path):
    spec = averaged(tmp_path, EmaConfig(decay=0.5))
    run(spec)
    weights = all_weights(tmp_path)
    for name, value in final(tmp_path, "model").items():
        expected = weights[0][name]
        for later in weights[1:]:
            expected = 0.5 * expected + 0.5 * later[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_without_an_average_there_is_one_model(tmp_path):
    run(job(tmp_path))
    assert (tmp_path / "model").is_dir()
    assert not (tmp_path / "model-last").exists()


@pytest.mark.parametrize("average", [EmaConfig(decay=0.9, every=2), LastConfig(steps=5)])
def test_an_average_goes_on_bitwise_after_a_break(tmp_path, monkeypatch, average):
    whole, broken = job(tmp_path / "a", average=average), job(tmp_path / "b", average=average)
    run(whole)
    run_until(broken, 5, monkeypatch)
    run(broken, attempt=1)
    expected = final(whole.out, "model")
    for name, value in final(broken.out, "model").items():
        assert torch.equal(value, expected[name])
