"""Confirmation on fresh seeds, schedules for the trainer, scaling laws: as commands."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from puna.cli.mix import mix
from puna.core.errors import PunaError
from puna.mix.fresh import confirm_mix
from puna.mix.proxy import runs as proxy_runs
from puna.mix.schedule import two_phases
from puna.mix.sources import Manifest, Objective, Source
from puna.train.config import PretrainConfig
from puna.train.mixture import consumed, read_schedule, with_schedule
from tests.unit.token_shards import loader, write_shards

SOURCES = Manifest(
    source=tuple(Source(name=n, unique_tokens=t, max_epochs=50) for n, t in
                 (("code", 125), ("notes", 21), ("web", 135))),
    objective=Objective(n_tokens=16 * 8 * 40),
)  # fmt: skip
LARGE = SOURCES.model_copy(update={"source": tuple(
    one.model_copy(update={"unique_tokens": 1000 * one.unique_tokens}) for one in SOURCES.source
)})  # fmt: skip


@pytest.fixture
def shards(tmp_path):
    sizes = {"web": [9, 1, 30, 4, 17, 55, 3], "code": [100, 7, 12], "notes": [2, 2, 2, 2, 3]}
    return write_shards(tmp_path / "shards", {"train": sizes, "heldout": sizes})


def recommendation(folder, mix, **baselines):
    path = folder / "best.json"
    path.write_text(json.dumps({
        "mix": mix, "baselines": [{"name": name, "mix": m} for name, m in baselines.items()],
    }))  # fmt: skip
    return path


def lossy(monkeypatch, loss_of):
    """Runs that need no training: the loss is what a function of mix and seed says."""

    def made(job):
        losses = dict.fromkeys(job.targets, loss_of(job.shares, job.seed))
        return {
            "run": job.run, "data": job.data, "losses": losses, "diverged": False, "consumed": {},
            "n_params": 1000, "n_tokens": 10_000,
        }  # fmt: skip

    monkeypatch.setattr(proxy_runs, "make_run", made)


def noise(shares, seed):
    key = int(1e6 * shares.get("web", 0)) + seed
    return 0.01 * np.random.default_rng(key).standard_normal()


NATURAL = {"web": 0.5, "code": 0.4, "notes": 0.1}
EVEN = {"web": 0.33, "code": 0.33, "notes": 0.34}


def test_a_mix_that_wins_on_fresh_seeds_is_confirmed(shards, tmp_path, monkeypatch):
    seeds = set()

    def loss(shares, seed):
        seeds.add(seed)
        return 3 - shares.get("code", 0) + noise(shares, seed)

    lossy(monkeypatch, loss)
    best = recommendation(tmp_path, {"web": 0.2, "code": 0.8}, natural=NATURAL, uniform=EVEN)
    found = confirm_mix(best, SOURCES, str(shards), tmp_path / "out", n_workers=1)
    assert found.known
    assert "Recommended" in found.verdict
    assert seeds == {100, 101, 102}
    gains = {one.baseline: one.gain for one in found.comparisons}
    assert gains["natural"] == pytest.approx(0.4, abs=0.03)
    assert found.to_json()["confirmed"]
    assert len(found.values["natural"]) == 3
    rows = list(csv.DictReader((tmp_path / "out/confirm.csv").read_text().splitlines()))
    assert len(rows) == 9


def test_a_mix_that_differs_by_less_than_the_noise_is_not(shards, tmp_path, monkeypatch):
    lossy(monkeypatch, lambda shares, seed: 3 - 0.001 * shares.get("code", 0) + noise(shares, seed))
    best = recommendation(tmp_path, {"web": 0.2, "code": 0.8}, natural=NATURAL, uniform=EVEN)
    found = confirm_mix(best, SOURCES, str(shards), tmp_path / "out", n_workers=1)
    assert not found.known
    assert found.verdict.startswith("Not known")
    lossy(monkeypatch, lambda shares, seed: 3 + shares.get("code", 0) + noise(shares, seed))
    lost = confirm_mix(best, SOURCES, str(shards), tmp_path / "other", n_workers=1)
    assert lost.verdict.startswith("Refuted")


def test_the_worst_target_is_measured_against_the_natural_mix(shards, tmp_path, monkeypatch):
    lossy(monkeypatch, lambda shares, seed: 3 - shares.get("code", 0) + noise(shares, seed))
    worst = SOURCES.model_copy(update={
        "objective": SOURCES.objective.model_copy(update={"kind": "worst"})
    })  # fmt: skip
    best = recommendation(tmp_path, {"web": 0.2, "code": 0.8}, natural=NATURAL, uniform=EVEN)
    found = confirm_mix(best, worst, str(shards), tmp_path / "out", n_workers=1)
    assert np.mean(found.values["natural"]) == pytest.approx(2.6, abs=0.03)
    assert found.known


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_seeds": 1}, "1 seed tells no noise"),
        ({"first_seed": 1}, "were used by the design"),
    ],
)
def test_seeds_that_tell_nothing_are_refused(shards, tmp_path, change, words):
    best = recommendation(tmp_path, NATURAL, natural=NATURAL)
    with pytest.raises(PunaError, match=words):
        confirm_mix(best, SOURCES, str(shards), tmp_path / "out", **change)


def test_what_is_no_recommendation_is_refused(shards, tmp_path):
    best = recommendation(tmp_path, NATURAL, uniform=EVEN)
    for text, words in ((None, "has no natural mix"), ("{}", "is no recommendation"),
                        ("{", "no valid JSON")):  # fmt: skip
        if text is not None:
            best.write_text(text)
        with pytest.raises(PunaError, match=words):
            confirm_mix(best, SOURCES, str(shards), tmp_path / "out")


def write_schedule(folder, stable, anneal, share=0.25):
    path = folder / "schedule.json"
    path.write_text(json.dumps(two_phases(LARGE, stable, anneal, share).to_json()))
    return path


def config(path, **changes):
    values = {"mix": str(path), "steps": 40, "seq_len": 16, "global_batch": 8, "seed": 3}
    return PretrainConfig(**{**values, **changes})


def test_a_schedule_becomes_weights_and_phases_of_the_trainers_loader(shards, tmp_path):
    path = write_schedule(tmp_path, {"web": 0.7, "code": 0.3}, {"web": 0.2, "notes": 0.8})
    cfg = with_schedule(config(path), ["code", "notes", "web"])
    assert cfg.weights == {"code": 0.3, "notes": 0.0, "web": 0.7}
    (phase,) = cfg.curriculum.phases
    assert phase.first_step == 30
    one = loader(shards, weights=cfg.weights, curriculum=cfg.curriculum)
    found = consumed(one, [0, 30, 40])
    stable, anneal = (part["sources"] for part in found["phases"])
    assert stable["web"]["planned_tokens"] == pytest.approx(0.7 * 30 * 128)
    assert anneal["notes"]["share"] == pytest.approx(0.8)
    assert found["most_off_tokens"] < 2 * 16  # rows are whole, at both ends of a phase
    drawn = dict.fromkeys(one.rows_per_source(0), 0)
    for step in range(30, 40):
        batch = one.batch(step, 0, 1)
        for number in batch.source_B:
            drawn[batch.sources[number]] += 16
    assert drawn == {name: part["tokens"] for name, part in anneal.items()}


def test_a_schedule_for_another_training_is_refused(tmp_path):
    path = write_schedule(tmp_path, {"web": 1.0}, {"code": 1.0})
    names = ["code", "notes", "web"]
    with pytest.raises(PunaError, match="is for 5120 tokens, the run has 6400"):
        with_schedule(config(path, steps=50), names)
    with pytest.raises(PunaError, match="'code' is not among the shards"):
        with_schedule(config(path), ["notes", "web"])
    with pytest.raises(ValueError, match="mix brings weights and phases"):
        config(path, weights={"web": 1.0})
    path.write_text('{"schema": 1, "phases": [{"n_tokens": 5, "shares": {"web": 0.4}}]}')
    with pytest.raises(PunaError, match="phase 1: shares sum to"):
        read_schedule(path)
    path.write_text('{"schema": 1, "phases": [{"n_tokens": "x", "shares": {}}]}')
    with pytest.raises(PunaError, match="phase 1 needs n_tokens and shares"):
        read_schedule(path)
    path.write_text("[]")
    with pytest.raises(PunaError, match="is no schedule"):
        read_schedule(path)


def points():
    law = np.random.default_rng(0)
    n = np.repeat(np.geomspace(1e6, 1e8, 5), 5)
    d = np.tile(np.geomspace(1e7, 1e10, 5), 5)
    loss = 1.8 + 480 * n**-0.35 + 2100 * d**-0.37
    return n, d, loss * np.exp(0.001 * law.standard_normal(25))


def table(path, n, d, loss, name="loss"):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["n_params", "n_tokens", name])
        writer.writerows(zip(n, d, loss, strict=True))
    return str(path)


def test_scaling_laws_as_a_command(tmp_path):
    call = CliRunner().invoke
    path = table(tmp_path / "runs.csv", *points(), name="loss.web")
    done = call(mix, ["scaling", path, "--loss", "loss.web", "--flop", "1e18", "--draws", "20",
                      "--json"])  # fmt: skip
    made = json.loads(done.output)
    assert made["law"]["E"] == pytest.approx(1.8, abs=0.05)
    assert made["law"]["alpha"] == pytest.approx(0.35, abs=0.03)
    low, high = made["interval"]["E"]
    assert low < made["law"]["E"] < high
    (best,) = made["optima"]
    assert 6 * best["n_params"] * best["n_tokens"] == pytest.approx(1e18)
    shown = call(mix, ["scaling", path, "--loss", "loss.web", "--flop", "1e18", "--draws", "5"])
    assert "Best model of a budget" in shown.output
    missing = call(mix, ["scaling", path])
    assert isinstance(missing.exception, PunaError)
    assert "loss.web" in missing.exception.fix


def test_isoflop_optima_are_told_where_budgets_have_sizes(tmp_path):
    n, d, loss = [], [], []
    for flop in (1e15, 4e15, 1.6e16):
        for ratio in (0.3, 0.6, 1, 1.6, 3):
            size = ratio * (flop / 6 / 20) ** 0.5
            n.append(size)
            d.append(round(flop / 6 / size / 1000) * 1000)
            loss.append(1.8 + 480 * n[-1] ** -0.35 + 2100 * d[-1] ** -0.37)
    path = table(tmp_path / "runs.csv", n, d, loss)
    done = CliRunner().invoke(mix, ["scaling", path, "--draws", "3", "--json"])
    made = json.loads(done.output)
    assert made["isoflop"]["n_budgets"] == 3
    assert made["isoflop"]["exponent"] == pytest.approx(0.35 / 0.72, abs=0.08)
    plan = CliRunner().invoke(mix, ["isoflop", "1e17", "--budgets", "2", "--sizes", "3"])
    assert plan.output.count("e+1") == 6


def test_a_schedule_is_written_by_a_command(tmp_path):
    (tmp_path / "mix.toml").write_text(
        "[objective]\nn_tokens = 1000\n"
        '[[source]]\nname = "a"\nunique_tokens = 1000\n'
        '[[source]]\nname = "b"\nunique_tokens = 100\nmax_epochs = 2\n'
    )
    (tmp_path / "best.json").write_text('{"mix": {"a": 0.9, "b": 0.1}}')
    (tmp_path / "last.json").write_text('{"a": 0.2, "b": 0.8}')
    args = ["schedule", str(tmp_path / "best.json"), "--manifest", str(tmp_path / "mix.toml"),
            "--anneal", str(tmp_path / "last.json"), "--out", str(tmp_path / "s.json")]  # fmt: skip
    done = CliRunner().invoke(mix, args)
    assert "stable: 900 tokens: a 90.0%, b 10.0%" in done.output
    phases = read_schedule(tmp_path / "s.json")["phases"]
    assert [one["n_tokens"] for one in phases] == pytest.approx([900, 100])
    many = CliRunner().invoke(mix, [*args, "--anneal-share", "0.5"])
    assert isinstance(many.exception, PunaError)
    assert "b would be read" in str(many.exception)
