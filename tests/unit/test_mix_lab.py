"""Design, noise, recommendation, attribution, schedules, confirmation, extrapolation, commands."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from puna.core.errors import PunaError
from puna.mix import baselines
from puna.mix.analyse import fit_runs, recommend_from
from puna.mix.attribution import left_out, measured_left_out, shapley
from puna.mix.confirm import confirm
from puna.mix.design import design, extend, run_key, to_csv
from puna.mix.extrapolate import fit_extrapolation
from puna.mix.noise import measure_noise, refuse_noisy
from puna.mix.runs import read_runs
from puna.mix.schedule import anneal_value, two_phases
from puna.mix.sources import Manifest, Objective, Source
from puna.mix.task import make_task

pytest.importorskip("scipy", reason="the extra `mix`")

TOKENS = {"web": 8e9, "code": 1e9, "books": 5e8, "wiki": 1e8}
RATES = {"prose": [1.0, 0.05, 0.8, 0.7], "python": [0.1, 1.0, 0.05, 0.1]}


def manifest(**changes):
    sources = tuple(Source(name=name, unique_tokens=int(n)) for name, n in TOKENS.items())
    return Manifest(source=sources, objective=Objective(n_tokens=1e9, **changes))


def losses(shares, sd=0.0, seed=0):
    effective = np.array(list(RATES.values())) @ (np.asarray(shares) ** 0.7).T
    noise = sd * np.random.default_rng(seed).standard_normal(effective.shape)
    return 1.5 + 1.2 * (effective + 1e-3) ** -0.3 + noise


def made_runs(folder, sd=0.01, n=40):
    """A design, as if all its runs had been made."""
    names = list(TOKENS)
    planned = design(manifest(), n)
    shares = np.array([[one.shares.get(name, 0.0) for name in names] for one in planned])
    values = losses(shares, sd)
    path = folder / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        first = planned[0].row(names)
        writer.writerow([*first, "loss.prose", "loss.python"])
        for one, loss in zip(planned, values.T, strict=True):
            writer.writerow([*one.row(names).values(), *loss])
    return path


@pytest.mark.parametrize("how", ["maximin", "d-optimal"])
def test_a_design_has_its_parts_and_rows_that_sum_to_one(how):
    runs = design(manifest(), 40, how=how)
    kinds = [one.kind for one in runs]
    assert sum(one.held_out for one in runs) == 8
    assert {"natural", "uniform", "temperature", "corner", "without", "repeat"} <= set(kinds)
    assert kinds.count("without") == 4
    assert kinds.count("repeat") == 7
    assert len({one.key for one in runs}) == len(runs) == 48
    assert all(abs(sum(one.shares.values()) - 1) < 1e-9 for one in runs)
    held = {tuple(sorted(one.shares.items())) for one in runs if one.held_out}
    seen = {tuple(sorted(one.shares.items())) for one in runs if not one.held_out}
    assert not held & seen


def test_maximin_spreads_wider_than_chance():
    names = list(TOKENS)

    def nearest(runs):
        x = np.sqrt([[one.shares.get(n, 0) for n in names] for one in runs if one.kind == "random"])
        gaps = np.linalg.norm(x[:, None] - x[None], axis=2) + 9 * np.eye(len(x))
        return gaps.min()

    drawn = np.random.default_rng(0).dirichlet(np.ones(4), 22)
    x = np.sqrt(drawn)
    chance = (np.linalg.norm(x[:, None] - x[None], axis=2) + 9 * np.eye(22)).min()
    assert nearest(design(manifest(), 40)) > 2 * chance


def test_keys_do_not_change_when_a_source_is_added():
    shares = {"web": 0.6, "code": 0.4}
    assert run_key(shares, 0, {}) == run_key({**shares, "math": 0.0}, 0, {})
    assert run_key(shares, 0, {}) != run_key(shares, 1, {})
    assert run_key(shares, 0, {}) != run_key(shares, 0, {"dim": 64})


def test_an_added_source_keeps_the_old_ratios():
    more = manifest().model_copy(
        update={"source": (*manifest().source, Source(name="math", unique_tokens=10**8))}
    )
    runs = extend(more, {"web": 0.6, "code": 0.4}, 12)
    assert len(runs) == 12
    for one in runs:
        if one.shares.get("web", 0) > 0.1:
            assert one.shares["code"] / one.shares["web"] == pytest.approx(2 / 3, abs=0.01)
    assert max(one.shares.get("math", 0) for one in runs) >= 0.69
    with pytest.raises(PunaError, match="has all sources already"):
        extend(manifest(), dict.fromkeys(TOKENS, 0.25), 12)


def test_few_runs_for_a_design_are_refused():
    with pytest.raises(PunaError, match="plan at least 11 runs"):
        design(manifest(), 8)


def test_noise_is_measured_and_a_noisy_target_is_refused(tmp_path):
    noise = {one.target: one for one in measure_noise(read_runs([made_runs(tmp_path, 0.02)]))}
    assert noise["prose"].sd_seed_low < 0.02 < noise["prose"].sd_seed_high
    assert noise["python"].snr > 5
    loud = measure_noise(read_runs([made_runs(tmp_path, 0.5)]))
    with pytest.raises(PunaError) as caught:
        refuse_noisy(loud, ["prose", "python"])
    assert "signal-to-noise under 2" in str(caught.value)
    assert "seeds per mix" in str(caught.value)
    with pytest.raises(PunaError, match="signal-to-noise"):
        fit_runs([made_runs(tmp_path, 0.5)], manifest())


def test_the_recommendation_is_near_the_optimum_and_respects_limits(tmp_path):
    fit = fit_runs([made_runs(tmp_path)], manifest())
    made = recommend_from(fit, n_replicates=20)
    grid = np.random.default_rng(1).dirichlet(np.ones(4), 40_000)
    allowed = grid[(grid <= fit.task.caps_K).all(axis=1)]
    worth = losses(manifest().effective(allowed)).mean(axis=0)
    mine = losses(manifest().effective(made.shares_K[None])).mean()
    assert mine - worth.min() < 0.02  # the losses of the grid spread over more than 1
    assert made.shares_K.sum() == pytest.approx(1.0)
    assert (made.shares_K <= fit.task.caps_K + 1e-9).all()
    assert (made.flat_low_K <= made.shares_K + 1e-9).all()
    natural = next(one for one in made.duels if one.name == "natural")
    gained = losses(manifest().effective(fit.task.natural_K[None])).mean() - mine
    assert natural.gain_low < gained < natural.gain_high
    assert natural.probability > 0.9


def test_it_does_not_know_when_mixes_do_not_differ(tmp_path):
    path = made_runs(tmp_path, 0.01)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    rng = np.random.default_rng(0)
    for row in rows:  # noise, whatever the mix
        row["loss.prose"], row["loss.python"] = 3 + 0.01 * rng.standard_normal(2)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    made = recommend_from(
        fit_runs([path], manifest(), only="returns", allow_noisy=True), n_replicates=20
    )
    assert not made.known
    assert made.verdict.startswith("Not known")


def test_the_prior_holds_the_mix_and_the_worst_target_counts(tmp_path):
    path = made_runs(tmp_path)
    free = recommend_from(fit_runs([path], manifest(), only="returns"), n_replicates=10)
    held = recommend_from(fit_runs([path], manifest(kl=5.0), only="returns"), n_replicates=10)
    natural = held.task.natural_K
    assert np.abs(held.shares_K - natural).sum() < 0.5 * np.abs(free.shares_K - natural).sum()
    worst = recommend_from(
        fit_runs([path], manifest(kind="worst"), only="returns"), n_replicates=10
    )
    ratios = losses(worst.shares_K[None])[:, 0] / losses(natural[None])[:, 0]
    assert ratios.max() < 1.01


def test_a_table_and_a_manifest_of_other_sources_are_refused(tmp_path):
    with pytest.raises(PunaError, match="only in the manifest: wiki"):
        make_task(["web", "code", "books"], ["prose"], manifest())


def test_caps_move_what_is_too_much_to_others():
    task = make_task(list(TOKENS), ["prose"], manifest())
    moved = task.allowed(np.array([[0.0, 0.1, 0.1, 0.8], [0.7, 0.1, 0.1, 0.1]]))
    assert moved.sum(axis=1) == pytest.approx([1, 1])
    assert (moved <= task.caps_K + 1e-9).all()
    assert moved[1] == pytest.approx([0.7, 0.1, 0.1, 0.1])


def test_shapley_values_add_up_and_find_the_helper():
    mix = np.array([0.4, 0.3, 0.2, 0.1])
    values = shapley(losses, mix)
    single = losses(np.eye(4)).mean(axis=1)
    assert values.sum(axis=1) == pytest.approx(single - losses(mix[None])[:, 0])
    assert np.argmax(values[1]) == 1  # code, for python
    gaps = left_out(losses, mix)
    assert gaps[1, 1] > 0.1
    assert gaps[0, 1] < 0  # prose is better off without code


def test_leaving_out_is_measured_between_runs(tmp_path):
    runs = read_runs([made_runs(tmp_path, sd=0.0)])
    natural = manifest().natural()
    found = measured_left_out(runs, natural)
    rest = natural.copy()
    rest[0] = 0
    want = losses((rest / rest.sum())[None]) - losses(natural[None])
    assert found[:, 0] == pytest.approx(want[:, 0], abs=0.02)  # shares have 4 digits


def test_baselines_follow_their_formulas():
    p = np.log(np.array([[0.6, 0.2], [0.3, 0.3], [0.1, 0.5]]))
    w = baselines.mixmin(p, n_steps=2000, rate=0.3)
    grid = np.linspace(0, 1, 1001)
    value = [-np.mean(np.log(np.exp(p) @ np.array([x, 1 - x]))) for x in grid]
    assert w[0] == pytest.approx(grid[int(np.argmin(value))], abs=0.01)
    weights = baselines.doremi(np.array([[0.2, 0.0, -1.0]] * 30))
    assert weights[0] > weights[1] == pytest.approx(weights[2])
    assert baselines.temperature(np.array([0.81, 0.19]), 0.0) == pytest.approx([0.5, 0.5])


def test_a_schedule_counts_both_phases():
    made = two_phases(manifest(), {"web": 0.9, "code": 0.1}, {"web": 0.5, "wiki": 0.5})
    assert made.mix()["wiki"] == pytest.approx(0.05)
    assert made.features(list(TOKENS)).sum() == pytest.approx(1.0)
    recipe = made.to_recipe(seq_len=1000, global_batch=100)
    assert recipe["phases"] == [{"first_step": 9000, "weights": {"web": 0.5, "wiki": 0.5}}]
    assert recipe["steps"] == 10_000
    with pytest.raises(PunaError, match=r"wiki would be read 5.50 times"):
        two_phases(manifest(), {"web": 0.5, "wiki": 0.5}, {"wiki": 1.0})


def test_an_annealing_trial_needs_two_budgets():
    tokens = np.array([1e8, 3e8, 1e9])
    gain = 0.2 * tokens / (tokens + 4e8)
    value = anneal_value(tokens, gain, np.full(3, 0.002), 4e9)
    assert value.at_target == pytest.approx(0.2 * 4e9 / 4.4e9, abs=0.01)
    assert value.low < value.at_target < value.high
    with pytest.raises(PunaError, match="one annealing budget"):
        anneal_value(tokens[:1], gain[:1], np.array([0.002]), 4e9)


def test_fresh_seeds_decide():
    mix = np.array([2.00, 2.01, 1.99])
    made, words = confirm(mix, {"natural": mix + 0.1, "uniform": mix + 0.2})
    assert all(one.better for one in made)
    assert words.startswith("Confirmed")
    assert confirm(mix, {"natural": np.array([2.0, 2.03, 1.99])})[1].startswith("Not known")
    assert confirm(mix, {"natural": mix - 0.1})[1].startswith("Refuted")
    with pytest.raises(PunaError, match="tell no noise"):
        confirm(mix[:1], {"natural": mix})


def test_a_law_of_mix_and_size_ranks_mixes_of_a_larger_model(tmp_path):
    names = list(TOKENS)
    rng = np.random.default_rng(0)
    lines = [["run", *(f"mix.{n}" for n in names), "n_params", "n_tokens", "loss.prose"]]

    def truth(shares, n, d):
        z = (RATES["prose"] @ (shares**0.8).T) * d / 1e7
        return 1.6 + 0.5 * (n / 1e6) ** -0.3 + 1.5 * (z + 1e-3) ** -0.25

    for size, length in ((1e6, 1e7), (3e6, 3e7), (1e7, 1e8)):
        for shares in rng.dirichlet(np.full(4, 0.7), 24):
            value = truth(shares, size, length)
            lines.append([f"r{len(lines)}", *shares, size, length, value])
    path = tmp_path / "sizes.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    runs = read_runs([path])
    found = fit_extrapolation(runs)
    unseen = rng.dirichlet(np.full(4, 0.7), 50)
    told = found.predict(unseen, 1e8, 1e9)[0]
    true = truth(unseen, 1e8, 1e9)
    assert told == pytest.approx(true, abs=0.1)
    assert np.corrcoef(told, true)[0, 1] > 0.99
    with pytest.raises(PunaError, match="one size and one length"):
        fit_extrapolation(runs.at(1e6, 1e7))


SOURCES = "".join(
    f'[[source]]\nname = "{name}"\nunique_tokens = {int(n)}\n' for name, n in TOKENS.items()
)


def test_the_commands_from_design_to_report(tmp_path):
    from puna.cli.mix import mix

    call = CliRunner().invoke
    (tmp_path / "mix.toml").write_text(SOURCES)
    known = str(tmp_path / "mix.toml")
    plan = tmp_path / "plan.csv"
    done = call(mix, ["design", known, "--runs", "40", "--out", str(plan)])
    assert "48 runs: 8 held out" in done.output
    assert plan.read_text() == to_csv(
        design(manifest(), 40, proxy=manifest().proxy.content()), list(TOKENS)
    )
    again = call(mix, ["design", known, "--runs", "40", "--out", str(plan), "--done", str(plan)])
    assert "48 made before" in again.output

    table = str(made_runs(tmp_path))
    fast = ["--manifest", known, "--model", "returns"]
    fit = call(mix, ["fit", table, *fast, "--json"])
    values = json.loads(fit.output)
    assert values["held_out"]["targets"]["prose"]["spearman"] > 0.9
    assert "ceiling" in call(mix, ["fit", table, *fast]).output
    out = tmp_path / "best.json"
    shown = call(mix, ["recommend", table, *fast, "--out", str(out)])
    assert "beaten with" in shown.output
    assert sum(json.loads(out.read_text())["mix"].values()) == pytest.approx(1, abs=1e-3)
    page = tmp_path / "mix.html"
    call(mix, ["report", table, *fast, "--out", str(page)], catch_exceptions=False)
    html = page.read_text()
    assert json.loads(out.read_text())["verdict"] in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert json.loads(page.with_suffix(".json").read_text())["attribution"]["transfer"]
