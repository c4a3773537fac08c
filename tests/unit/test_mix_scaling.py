"""Scaling laws: known laws are found again, budgets are planned, what cannot be told is refused."""

import numpy as np
import pytest

from puna.core.errors import PunaError
from puna.mix.metrics import decision_accuracy, regret, spearman
from puna.mix.scaling.isoflop import (
    envelope,
    fit_power,
    isoflop_optima,
    optimal_tokens,
    plan_isoflops,
)
from puna.mix.scaling.surface import (
    Surface,
    bootstrap,
    fit_projected,
    fit_surface,
    objective,
    table_of,
)
from puna.mix.scaling.twostage import fit_two_stage

pytest.importorskip("scipy", reason="the extra `mix`")

TRUE = Surface(1.82, 480.0, 2100.0, 0.35, 0.37, 0.0)
"""About Chinchilla's law as Besiroglu et al. 2024 refitted it."""


def points(noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    flop = np.repeat(np.geomspace(1e18, 1e21, 6), 9)
    ratio = np.tile(np.geomspace(2, 200, 9), 6)
    n = np.sqrt(flop / 6 / ratio)
    d = flop / 6 / n
    return n, d, TRUE.loss(n, d) * np.exp(noise * rng.standard_normal(len(n))), flop


def test_a_noiseless_law_is_found_again():
    n, d, loss, _ = points()
    found = fit_surface(n, d, loss)
    assert found.e == pytest.approx(TRUE.e, abs=1e-3)
    assert found.alpha == pytest.approx(TRUE.alpha, abs=1e-3)
    assert found.beta == pytest.approx(TRUE.beta, abs=1e-3)
    assert found.optimum(1e23)[1] == pytest.approx(TRUE.optimum(1e23)[1], rel=0.01)


def test_the_optimum_has_the_lowest_loss_of_its_budget():
    n, d = TRUE.optimum(1e22)
    assert 6 * n * d == pytest.approx(1e22)
    best = TRUE.loss(np.array([n]), np.array([d]))[0]
    for factor in (0.8, 1.25):
        assert TRUE.loss(np.array([n * factor]), np.array([d / factor]))[0] > best


def test_the_descent_improves_on_the_projection_and_holds_against_outliers():
    n, d, loss, _ = points(noise=0.002, seed=1)
    loss[::17] *= 1.05
    first, found = fit_projected(n, d, loss), fit_surface(n, d, loss)
    assert found.objective <= first.objective
    assert found.objective <= objective(TRUE, n, d, loss)
    assert abs(found.alpha - TRUE.alpha) < abs(first.alpha - TRUE.alpha)


def test_an_interval_holds_the_truth():
    n, d, loss, _ = points(noise=0.003, seed=2)
    first = fit_surface(n, d, loss)
    found = bootstrap(lambda *drawn: fit_surface(*drawn, start=first), n, d, loss, n=60)
    low, high = found["exponent"]
    assert low < TRUE.exponent < high
    assert high - low < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, d, y: (n[:5], d[:5], y[:5]), "too few"),
        (lambda n, d, y: (n, d, np.where(np.arange(len(y)) == 3, np.nan, y)), "point 3: loss"),
        (lambda n, d, y: (np.full_like(n, 1e8), d, y), "n_params takes 1 different"),
    ],
)
def test_points_that_tell_nothing_are_refused(change, words):
    n, d, loss, _ = points()
    with pytest.raises(PunaError, match=words):
        fit_surface(*change(n, d, loss))


def test_tokens_follow_from_compute():
    n, d, loss, flop = points()
    columns = {"n_params": n, "flop": flop, "loss": loss}
    assert table_of(columns)[1] == pytest.approx(d)
    with pytest.raises(PunaError, match="n_params"):
        table_of({"n_params": n, "loss": loss})


def test_parabolas_find_the_optimum_of_each_budget():
    # exact in log tokens, so that the parabola is no approximation
    flop = np.repeat(np.geomspace(1e19, 1e21, 5), 7)
    best = 0.3 * flop**0.53
    d = best * np.tile(np.geomspace(0.3, 3, 7), 5)
    loss = 3 - 0.05 * np.log(flop / 1e19) + 0.02 * np.log(d / best) ** 2
    optima = isoflop_optima(flop, d, loss)
    assert all(one.inside for one in optima)
    law = optimal_tokens(optima)
    assert law.exponent == pytest.approx(0.53, abs=1e-6)
    assert law(3.8e25) == pytest.approx(0.3 * 3.8e25**0.53, rel=1e-4)
    with pytest.raises(PunaError, match="no budget"):
        isoflop_optima(flop, d, -loss)


def test_the_envelope_follows_the_best_size():
    sizes = np.geomspace(1e7, 1e10, 12)
    n = np.repeat(sizes, 200)
    d = np.tile(np.geomspace(1e8, 1e12, 200), 12)
    law, kept = envelope(6 * n * d, n, TRUE.loss(n, d))
    assert law.exponent == pytest.approx(TRUE.exponent, abs=0.03)
    assert np.all(np.diff(kept[:, 2]) <= 0)


def test_a_plan_spends_its_budget_and_brackets_the_optimum():
    runs = plan_isoflops(1e20, n_budgets=3, n_sizes=5)
    assert len(runs) == 15
    assert sum(flop for flop, _, _ in runs) == pytest.approx(1e20)
    for flop, n, d in runs:
        assert 6 * n * d == pytest.approx(flop)
    ratios = [d / n for _, n, d in runs[:5]]
    assert min(ratios) == pytest.approx(5, rel=0.01)
    assert max(ratios) == pytest.approx(80, rel=0.01)


def test_two_stages_predict_an_accuracy_that_was_not_seen():
    flop = np.geomspace(1e19, 1e22, 8)
    nll = 3.0 - 0.1 * np.log10(flop)
    every = np.linspace(0.4, 1.4, 20)
    accuracy = 0.25 + 0.7 / (1 + np.exp(-12 * (0.7 - every)))
    found = fit_two_stage(flop, nll, every, accuracy, chance=0.25)
    mid, low, high = found.accuracy(1e24)
    assert found.likelihood(1e24) == pytest.approx(0.6)
    assert mid == pytest.approx(0.25 + 0.7 / (1 + np.exp(-1.2)), abs=0.005)
    assert low <= mid <= high
    with pytest.raises(PunaError, match="does not improve"):
        fit_two_stage(flop, nll[::-1], every, accuracy)


def test_measures_of_a_ranking():
    true = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(true, true**3) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(
        3**0.5 / 2
    )
    assert np.isnan(spearman(np.ones(4), true))
    assert decision_accuracy(np.array([1.0, 3.0, 2.0, 4.0]), true) == pytest.approx(5 / 6)
    assert decision_accuracy(np.ones(4), true) == pytest.approx(0.5)
    assert regret(np.array([3.0, 1.0, 2.0, 4.0]), true) == pytest.approx(1.0)
    assert fit_power(true, 2 * true**0.5).exponent == pytest.approx(0.5)
