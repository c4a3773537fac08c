"""The mixture lab on RegMix's public tables, beside RegMix's own LightGBM in the same run.

    python benchmarks/bench_mix.py [--data FOLDER] [--draws 20] [--skip-gp]

FOLDER holds ``{train,test}_mixture_{1m,60m,1B}.csv`` and
``{train,test}_pile_loss_{1m,60m,1B}.csv`` of https://github.com/sail-sg/regmix (MIT). The training
table is all that is fitted and all that the choice of a regressor sees; 1M, 60M and 1B are the
held-out mixes at three sizes.

Times are CPU seconds of one thread. The peer has the settings of RegMix's notebook without its
early stopping, which looks at the test set.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from puna.mix.metrics import decision_accuracy, regret, rmse, spearman
from puna.mix.recommend import recommend
from puna.mix.regressors.choose import choose
from puna.mix.regressors.models import regressors
from puna.mix.runs import Runs, read_runs
from puna.mix.task import make_task

SIZES = ("1m", "60m", "1B")
GOALS = {512: (0.990, 0.984, 0.955), 64: (0.975, 0.970, 0.940)}
Predict = Callable[[np.ndarray], np.ndarray]


def read(folder: Path, part: str, size: str) -> Runs:
    return read_runs(
        [folder / f"{part}_mixture_{size}.csv", folder / f"{part}_pile_loss_{size}.csv"]
    )


def aligned(test: Runs, train: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Shares in the order of the training table, where sources that no test run has are 0."""
    shares = np.zeros((len(test), len(train.sources)))
    for column, name in enumerate(test.sources):
        shares[:, train.sources.index(name)] = test.shares_NK[:, column]
    return shares, test.loss_TN


def regmix(shares: np.ndarray, y: np.ndarray, smallest_leaf: int = 20) -> Predict:
    import lightgbm

    settings = {
        "objective": "regression", "learning_rate": 0.01, "seed": 42, "verbosity": -1,
        "num_threads": 1, "min_child_samples": smallest_leaf,
    }  # fmt: skip
    made = [lightgbm.train(settings, lightgbm.Dataset(shares, one), 1000) for one in y]
    return lambda mixes: np.array([one.predict(mixes) for one in made])


def mean_rank(predict: Predict, tests: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[float]:
    found = []
    for shares, loss in tests.values():
        pairs = zip(predict(shares), loss, strict=True)
        found.append(float(np.mean([_rank(one, true) for one, true in pairs])))
    return found


def _rank(predicted: np.ndarray, true: np.ndarray) -> float:
    rho = spearman(predicted, true)
    return 0.0 if np.isnan(rho) else rho  # a constant ranks nothing


def line(name: str, values: list[float], rest: str = "") -> None:
    print(f"{name:<28}" + "".join(f"{value:>9.4f}" for value in values) + f"  {rest}", flush=True)


def verdict(values: list[float], n: int) -> str:
    goal = GOALS[n]
    reached = [value >= want for value, want in zip(values, goal, strict=True)]
    words = " / ".join(
        f"{want:.3f} {'yes' if ok else 'NO'}" for want, ok in zip(goal, reached, strict=True)
    )
    return f"goal {words}"


def details(predict: Predict, tests: dict[str, tuple[np.ndarray, np.ndarray]], cc: int) -> str:
    errors = [
        np.mean([rmse(p, y) for p, y in zip(predict(x), loss, strict=True)])
        for x, loss in list(tests.values())[:1]
    ]
    regrets = [regret(predict(x)[cc], loss[cc]) for x, loss in tests.values()]
    right = [decision_accuracy(predict(x)[cc], loss[cc]) for x, loss in tests.values()]
    return (
        f"rmse 1M {errors[0]:.3f}; Pile-CC regret {' / '.join(f'{r:.3f}' for r in regrets)}; "
        f"pairs right {' / '.join(f'{r:.3f}' for r in right)}"
    )


def all_runs(train: Runs, tests: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    shares, y = train.shares_NK, train.loss_TN
    cc = train.targets.index("the_pile_pile_cc")
    print(f"\n{len(train)} runs at 1M, mean Spearman over {len(y)} targets")
    print(f"{'':<28}{'1M':>9}{'60M':>9}{'1B':>9}")
    start_s = time.process_time()
    peer = regmix(shares, y)
    spent_s = time.process_time() - start_s
    line("RegMix's LightGBM (peer)", mean_rank(peer, tests), details(peer, tests, cc))
    print(f"{'':<28}fit {spent_s:.1f} s")
    for one in regressors():
        start_s = time.process_time()
        predict = one.fit(shares, y).predict
        spent_s = time.process_time() - start_s
        line(f"  {one.name}", mean_rank(predict, tests),
             f"fit {spent_s:.1f} s; {details(predict, tests, cc)}")  # fmt: skip
    start_s = time.process_time()
    found = choose(shares, y)
    chosen_s = time.process_time() - start_s
    recommendation = recommend(make_task(train.sources, train.targets), found)
    both_s = time.process_time() - start_s
    values = mean_rank(found.predict, tests)
    line(f"puna, chosen: {found.name}", values, details(found.predict, tests, cc))
    print(f"{'':<28}{verdict(values, 512)}")
    print(f"{'':<28}choice and fit {chosen_s:.1f} s, with recommendation and intervals "
          f"{both_s:.1f} s (goal 30 s)")  # fmt: skip
    print(f"{'':<28}verdict: {recommendation.verdict}")
    print("  cross-validation, which alone decided:")
    for score in sorted(found.scores, key=lambda score: score.behind):
        values_json = score.to_json()
        print(f"    {score.name:<12} Spearman {values_json['spearman']:.4f}, error / scatter "
              f"{values_json['relative_rmse']:.4f}")  # fmt: skip
    covered(found, tests)


def covered(found: object, tests: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """How often the 90 % interval of a prediction at 1M holds the measured loss."""
    shares, loss = tests["1m"]
    off = np.abs(found.predict(shares) - loss) / found.std(shares)
    print(f"  90 % intervals of predictions hold {np.mean(off < 1.645):.1%} of unseen losses at 1M")


def few_runs(train: Runs, tests: dict[str, tuple[np.ndarray, np.ndarray]], draws: int) -> None:
    rows: dict[str, list[list[float]]] = {}
    chosen: dict[str, int] = {}
    for draw in range(draws):
        picked = np.random.default_rng(draw).choice(len(train), 64, replace=False)
        shares, y = train.shares_NK[picked], train.loss_TN[:, picked]
        rows.setdefault("RegMix's LightGBM (peer)", []).append(mean_rank(regmix(shares, y), tests))
        rows.setdefault("  with leaves of 5", []).append(mean_rank(regmix(shares, y, 5), tests))
        found = choose(shares, y)
        chosen[found.name] = chosen.get(found.name, 0) + 1
        rows.setdefault("puna, chosen", []).append(mean_rank(found.predict, tests))
    print(f"\n64 random runs, {draws} draws: mean (lowest) of the mean Spearman")
    for name, values in rows.items():
        mean, low = np.mean(values, axis=0), np.min(values, axis=0)
        line(name, list(mean), "lowest " + " / ".join(f"{one:.4f}" for one in low))
    print(f"{'':<28}{verdict(list(np.mean(rows['puna, chosen'], axis=0)), 64)}; chosen: {chosen}")


def scikit_learn(train: Runs) -> None:
    """Our Gaussian process against scikit-learn's, same kernel and hyperparameters, 100 runs."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    from puna.mix.regressors import gp

    shares, y = train.shares_NK[:100], train.loss_TN[0, :100]
    start_s = time.process_time()
    ours = gp.fit_process(shares, y)
    ours_s = time.process_time() - start_s
    kernel = ConstantKernel(np.exp(ours.log_variance)) * Matern(
        np.exp(ours.log_length_K), nu=2.5
    ) + WhiteKernel(np.exp(ours.log_noise))
    fixed = GaussianProcessRegressor(kernel, optimizer=None, alpha=1e-8, normalize_y=True)
    fixed.fit(np.sqrt(shares), y)
    rest = train.shares_NK[100:]
    gap = np.abs(fixed.predict(np.sqrt(rest)) - gp.condition(ours, shares, y).predict(rest)).max()
    start_s = time.process_time()
    GaussianProcessRegressor(kernel, alpha=1e-8, normalize_y=True).fit(np.sqrt(shares), y)
    theirs_s = time.process_time() - start_s
    print(f"\nGaussian process, 100 runs, one target: at most {gap:.1e} off scikit-learn's; "
          f"fit {ours_s:.2f} s against {theirs_s:.2f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mix/regmix"))
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--skip-gp", action="store_true", help="leave scikit-learn out")
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"{given.data} is not there; get the tables of sail-sg/regmix and name their folder")
        return
    train = read(given.data, "train", "1m")
    tests = {size: aligned(read(given.data, "test", size), train) for size in SIZES}
    all_runs(train, tests)
    if given.draws:
        few_runs(train, tests, given.draws)
    if not given.skip_gp:
        scikit_learn(train)


if __name__ == "__main__":
    main()
