"""The lab end to end on token shards of one's own: design, runs, held-out mixes, fresh seeds.

    python benchmarks/bench_mix_lab.py SHARDS --manifest mix.toml --out lab [--large large.toml]

Prints how well held-out mixes are ranked against the ceiling that the noise of seeds sets, and
whether the recommended mix beats natural and uniform on three fresh seeds: at the size of the
proxies and, with a manifest of larger ones, at theirs. Goal: a Spearman of 0.9 of the ceiling, and
both baselines beaten at both sizes. Everything that was made before is taken from ``--out``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from puna.core.fsio import write_json
from puna.core.pool import usable_cores
from puna.mix.analyse import Fit, fit_runs, recommend_from
from puna.mix.design import design
from puna.mix.fresh import Confirmed, confirm_mix
from puna.mix.metrics import spearman
from puna.mix.proxy.runs import headline, make_runs
from puna.mix.sources import read_manifest


def print_held_out(fit: Fit) -> None:
    """Print the rank correlation of held-out mixes beside its ceiling, target by target."""
    held = fit.held_out_json()
    if held is None:
        print("fewer than three held-out runs")
        return
    shares = []
    for name, one in held["targets"].items():
        rho, ceiling = one["spearman"], one["noise_ceiling"]
        shares.append((rho or 0.0) / ceiling)
        print(f"  {name:12s} Spearman {rho:.3f}, ceiling {ceiling:.3f}, error {one['rmse']:.4f}")
        print(f"    pairs right {one['decision_accuracy']:.0%}, regret {one['regret']:.4f}")
    print(f"  mean of Spearman / ceiling over targets: {np.mean(shares):.3f} (goal 0.9)")
    task = fit.task
    weight = task.weight_T * task.factor_T
    rho = spearman(
        weight @ fit.found.predict(fit.held_out.shares_NK), weight @ fit.held_out.loss_TN
    )
    print(f"  of their weighted mean: Spearman {rho:.3f} over {held['n']} mixes")


def print_fresh(found: Confirmed) -> None:
    """Print what fresh seeds say."""
    print(f"fresh seeds, {found.n_params} parameters, {found.n_tokens} tokens:")
    for name, values in found.values.items():
        print(f"  {name:18s} {np.mean(values):.4f}  {' '.join(f'{v:.4f}' for v in values)}")
    for one in found.comparisons:
        print(f"  against {one.baseline:18s} gain {one.gain:+.4f} ({one.low:+.4f} to "
              f"{one.high:+.4f}): {'beaten' if one.better else 'not beaten'}")  # fmt: skip
    print(f"  {found.verdict}")


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--large", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=usable_cores())
    args = parser.parse_args()
    known = read_manifest(args.manifest)
    begin_s = time.monotonic()
    planned = design(
        known, args.runs, proxy=known.proxy.content(), first_seed=known.proxy.seed
    )  # fmt: skip
    made = make_runs(known, planned, args.shards, args.out, n_workers=args.workers)
    print(headline(made))
    fit = fit_runs([made.table], known)
    for one in fit.noise or []:
        print(
            f"  {one.target:12s} seed {one.sd_seed:.4f}, mixes {one.sd_mix:.4f}, S/N {one.snr:.1f}"
        )
    print(f"taken: {fit.found.name}")
    print_held_out(fit)
    found = recommend_from(fit)
    print({name: round(float(s), 3) for name, s in zip(known.names, found.shares_K, strict=True)})
    print(found.verdict)
    best = args.out / "best.json"
    write_json(best, found.to_json())
    fresh = confirm_mix(best, known, args.shards, args.out, n_seeds=args.seeds,
                        n_workers=args.workers)  # fmt: skip
    print_fresh(fresh)
    if args.large is not None:
        large = read_manifest(args.large)
        print_fresh(confirm_mix(best, large, args.shards, args.out / "large",
                                n_seeds=args.seeds, n_workers=args.workers))  # fmt: skip
    print(f"{time.monotonic() - begin_s:.0f} s")


if __name__ == "__main__":
    main()
