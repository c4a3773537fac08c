"""Numbers that cannot be right are found, and ordinary ones are not taken for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.resilience.anomaly import NumberCheck, SpikeDetector
from puna.resilience.policy import RULES, actions_of, most_times
from puna.train.numbers_config import NumbersConfig


def check(cfg: NumbersConfig | None = None) -> NumberCheck:
    cfg = cfg or NumbersConfig()
    return NumberCheck(cfg.window, cfg.sigmas, cfg.loss_factor, cfg.grad_factor)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_no_number_is_found_at_once(bad, where):
    numbers = [2.0, 1.0]
    numbers[where] = bad
    found = check().find(*numbers)
    assert found is not None
    assert found.kind == "not_finite"
    assert found.value is bad


def test_a_training_that_goes_well_gives_no_alarm():
    """10,000 steps: the loss falls from 11 to 2 with noise, the norm has a long tail."""
    rng, numbers = np.random.default_rng(0), check()
    steps = np.arange(10_000)
    losses = 2 + 9 * (1 + steps / 30) ** -0.6 + rng.normal(0, 0.05, len(steps))
    norms = 0.3 * np.exp(rng.normal(0, 0.25, len(steps)))
    for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True):
        assert numbers.find(loss, norm) is None
        numbers.add([(loss, norm)])


@pytest.mark.parametrize(
    ("loss", "norm", "kind"), [(3.1, 1.0, "loss_spike"), (2.0, 9.0, "grad_spike"), (2.0, 4.0, None)]
)
def test_a_spike_is_found_against_the_last_steps(loss, norm, kind):
    rng, numbers = np.random.default_rng(1), check()
    numbers.add((2 + x / 50, 1 + x / 10) for x in rng.normal(0, 1, 40).tolist())
    found = numbers.find(loss, norm)
    assert (found and found.kind) == kind


def test_a_level_that_stays_is_no_spike_any_more():
    numbers = check(NumbersConfig(window=8))
    numbers.add([(2.0, 1.0)] * 8)
    assert numbers.find(4.0, 1.0) is not None
    numbers.add([(4.0, 1.0)] * 5)
    assert numbers.find(4.0, 1.0) is None


@given(st.lists(st.floats(0.1, 100), min_size=16, max_size=64), st.floats(0.1, 100))
def test_the_limit_is_above_the_median_and_outliers_do_not_move_it_far(values, outlier):
    detector = SpikeDetector(128, 10.0, 1.2)
    for value in values:
        detector.add(value)
    assert detector.limit >= np.median(values)
    assert detector.limit >= 1.2 * np.median(values) * (1 - 1e-9)


def test_the_table_says_what_the_configuration_does():
    for rule in RULES:
        assert rule.actions
        assert len(set(rule.actions)) == len(rule.actions)
    for kind in ("not_finite", "loss_spike", "grad_spike"):
        assert list(actions_of(kind)) == getattr(NumbersConfig(), kind)
    assert most_times("killed") == 2
    assert most_times("crash") == most_times("something new") == 1


def test_an_update_with_nan_cannot_be_asked_for():
    with pytest.raises(ValueError, match="cannot contain `report`"):
        NumbersConfig(not_finite=["replay", "report"])
