"""Regressors: gradients, known laws, choice by cross-validation, the recommendation."""

import numpy as np
import pytest

from puna.core.errors import PunaError
from puna.mix.regressors import gp, laws
from puna.mix.regressors.choose import choose
from puna.mix.regressors.laws import FORMS, fit_law, predict_law, transfer_rates
from puna.mix.regressors.models import Law, Linear, regressors

optimize = pytest.importorskip("scipy.optimize", reason="the extra `mix`")


def mixes(n, k, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.6), n)


def law_losses(shares, g=1.0):
    """Two targets with known transfer rates."""
    rates = np.array([[1.0, 0.3, 0.02, 0.1], [0.05, 0.1, 1.0, 0.6]])[:, : shares.shape[1]]
    return 1.5 + 1.2 * (1e-3 + rates @ (shares**g).T) ** -0.25


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_laws(form):
    shares = mixes(12, 4)
    law = laws._law(form, shares)
    rng = np.random.default_rng(1)
    n_p = len(law.bounds()[0])
    theta = 0.3 * rng.standard_normal((1, n_p))
    _, jac = law(theta)
    for at in range(n_p):
        step = np.zeros((1, n_p))
        step[0, at] = 1e-6
        slope = (law(theta + step)[0] - law(theta - step)[0]) / 2e-6
        assert jac[0, :, at] == pytest.approx(slope[0], rel=1e-5, abs=1e-7)
    assert law.predict(theta) == pytest.approx(law(theta)[0])


@pytest.mark.parametrize(("form", "g"), [("efftok", 1.0), ("returns", 0.6)])
def test_a_law_is_found_again_with_its_transfer_rates(form, g):
    shares = mixes(60, 4)
    theta = fit_law(form, shares, law_losses(shares, g))
    unseen = mixes(50, 4, seed=1)
    # the penalty pulls the rates together a little: by less than the scatter of the losses
    near = 0.15 * law_losses(unseen, g).std()
    assert predict_law(form, theta, unseen) == pytest.approx(law_losses(unseen, g), abs=near)
    rates = transfer_rates(form, theta, 4)
    assert list(np.argmax(rates, axis=1)) == [0, 2]
    assert rates[0, 1] == pytest.approx(0.3, rel=0.25)


def test_the_batch_is_as_good_as_a_general_minimiser():
    shares = mixes(40, 4)
    y = law_losses(shares) + 0.02 * np.random.default_rng(2).standard_normal((2, 40))
    law = laws._law("efftok", shares)
    low, high = law.bounds()

    def value(theta):
        left = law.predict(theta[None])[0] - y[0]
        size = np.abs(left)
        straight = laws.HUBER * (size - laws.HUBER / 2)
        loss = np.where(size <= laws.HUBER, left**2 / 2, straight).mean()
        return loss + theta @ law.penalty() @ theta

    ours = fit_law("efftok", shares, y)[0]
    start = law.starts(y[:1], np.ones((1, 40)), 0, 1)[0, 0]
    bounds = list(zip(low, high, strict=True))
    theirs = optimize.minimize(value, start, method="L-BFGS-B", bounds=bounds)
    assert value(ours) <= theirs.fun * 1.001


def test_a_weight_of_zero_leaves_a_run_out():
    shares = mixes(40, 4)
    y = law_losses(shares)
    spoilt = y.copy()
    spoilt[:, 7] += 5
    weight = np.ones_like(y)
    weight[:, 7] = 0
    theta = fit_law("efftok", shares, spoilt, weight)
    assert predict_law("efftok", theta, shares[:7]) == pytest.approx(y[:, :7], abs=0.15 * y.std())


def test_the_process_has_the_right_gradient_and_goes_through_its_points():
    shares = mixes(30, 4)
    y = law_losses(shares)[0]
    x, scaled = np.sqrt(shares), (y - y.mean()) / y.std()
    theta = np.random.default_rng(0).normal(0, 0.3, 6)
    error = optimize.check_grad(
        lambda t: gp._evidence(t, x, scaled)[0], lambda t: gp._evidence(t, x, scaled)[1], theta
    )
    assert error < 1e-4
    process = gp.fit_process(shares, y)
    seen = gp.condition(process, shares, y)
    assert seen.predict(shares) == pytest.approx(y, abs=0.02)
    far = np.eye(4)[:1]
    assert seen.std(far)[0] > seen.std(shares).max()


def test_cross_validation_takes_the_law_that_made_the_losses():
    shares = mixes(48, 4)
    noise = 0.01 * np.random.default_rng(3).standard_normal((2, 48))
    found = choose(shares, law_losses(shares, 0.6) + noise, candidates=[Linear(), Law("returns")])
    assert found.name == "returns"
    by_name = {one.name: one for one in found.scores}
    assert (
        by_name["returns"].relative_rmse_T.mean() < 0.3 * by_name["linear"].relative_rmse_T.mean()
    )
    unseen = mixes(200, 4, seed=5)
    off = np.abs(found.predict(unseen) - law_losses(unseen, 0.6)) / found.std(unseen)
    assert np.mean(off < 1.645) > 0.85  # 90 % intervals, on noiseless losses


def test_a_stack_is_no_worse_than_its_members_and_its_shares_sum_to_one():
    shares = mixes(60, 4)
    noise = 0.02 * np.random.default_rng(4).standard_normal((2, 60))
    y = law_losses(shares) + noise + 0.2 * np.sin(9 * shares[:, 0])
    some = [one for one in regressors(trees=False) if one.name in ("linear", "efftok", "gp")]
    found = choose(shares, y, candidates=some, only="stack")
    assert sum(found.weights.values()) == pytest.approx(1.0)
    errors = {one.name: one.relative_rmse_T.mean() for one in found.scores}
    assert errors["stack"] <= 1.02 * min(errors[name] for name in found.weights)


def test_trees_learn_a_step():
    pytest.importorskip("lightgbm", reason="the extra `mix`")
    shares = mixes(120, 3)
    y = np.where(shares[:, :1] > 0.4, 2.0, 3.0).T
    trees = next(one for one in regressors() if one.name == "trees")
    assert trees.fit(shares, y).predict(np.array([[0.8, 0.1, 0.1], [0.1, 0.5, 0.4]]))[
        0
    ] == pytest.approx([2.0, 3.0], abs=0.05)


def test_eight_runs_of_seventeen_sources_are_refused():
    with pytest.raises(PunaError) as caught:
        choose(mixes(8, 17), np.ones((1, 8)))
    assert "8 runs are too few for 17 sources" in str(caught.value)
    assert "at least 23 runs" in str(caught.value)


def test_an_unknown_regressor_is_refused():
    shares = mixes(30, 3)
    with pytest.raises(PunaError, match="use one of linear"):
        choose(shares, law_losses(shares), candidates=[Linear()], only="forest")
