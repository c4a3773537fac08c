"""Scaling laws against published refits, on public points that puna does not ship.

    python benchmarks/bench_scaling.py --chinchilla svg_extracted_data.csv --llama3 isoflops.csv

The first file is that of epoch-research/analyzing-chinchilla (columns Model Size, Training FLOP,
loss); its five points of highest loss are left out, as its authors do. The second is that of Llama
3 in Open-Athena/scaling-law-analysis (columns tokens, params, budget, loss). Neither states a
licence.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np

from puna.mix.scaling.isoflop import isoflop_optima, optimal_tokens
from puna.mix.scaling.surface import Surface, bootstrap, fit_projected, fit_surface, objective

PUBLISHED = Surface(1.8172, 482.01, 2085.43, 0.3478, 0.3658, 0.0)
"""Besiroglu et al. 2024, Chinchilla scaling: a replication attempt."""
TARGET_FLOP = 3.8e25


def columns(path: Path, *names: str) -> list[np.ndarray]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [np.array([float(row[name]) for row in rows]) for name in names]


def told(name: str, value: float, wanted: float, slack: float) -> None:
    ok = "yes" if abs(value - wanted) <= slack else "NO"
    print(f"  {name:<12}{value:>12.4f}   wanted {wanted:g} within {slack:g}: {ok}")


def chinchilla(path: Path) -> None:
    n, flop, loss = columns(path, "Model Size", "Training FLOP", "loss")
    kept = np.argsort(loss)[:-5]
    n, d, loss = n[kept], flop[kept] / 6 / n[kept], loss[kept]
    start_s = time.process_time()
    first = fit_projected(n, d, loss)
    found = fit_surface(n, d, loss)
    spent_s = time.process_time() - start_s
    print(f"Chinchilla, approach 3, {len(loss)} points, {spent_s:.2f} s")
    told("E", found.e, 1.817, 0.01)
    told("alpha", found.alpha, 0.348, 0.01)
    told("beta", found.beta, 0.366, 0.01)
    told("exponent", found.exponent, 0.51, 0.01)
    theirs = objective(PUBLISHED, n, d, loss)
    print(f"  objective {found.objective:.5e} (wanted: at most 1.023e-3); parameters as published")
    print(f"  {theirs:.5e}; projection alone {first.objective:.5e}")
    start_s = time.process_time()
    drawn = bootstrap(lambda *some: fit_surface(*some, start=found), n, d, loss, n=200)
    words = ", ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in drawn.items()
                      if name in ("E", "alpha", "beta", "exponent"))  # fmt: skip
    print(f"  90 % intervals of 200 draws ({time.process_time() - start_s:.1f} s): {words}")


def llama3(path: Path) -> None:
    tokens, flop, loss = columns(path, "tokens", "budget", "loss")
    optima = isoflop_optima(flop, tokens, loss)
    law = optimal_tokens(optima)
    best = law(TARGET_FLOP)
    print(f"\nLlama 3, IsoFLOP parabolas, {len(optima)} budgets")
    told("exponent", law.exponent, 0.5368, 0.001)
    told("scale", law.scale, 0.2985, 0.001)
    told("T tokens", best / 1e12, 16.1, 0.1)
    told("B params", TARGET_FLOP / 6 / best / 1e9, 393, 3)
    for one in optima:
        print(f"    {one.flop:.0e} FLOP: {one.n_tokens / 1e9:8.2f} B tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chinchilla", type=Path)
    parser.add_argument("--llama3", type=Path)
    given = parser.parse_args()
    if given.chinchilla is None and given.llama3 is None:
        print("give --chinchilla and --llama3: their points are not shipped (see this file)")
        return
    if given.chinchilla is not None:
        chinchilla(given.chinchilla)
    if given.llama3 is not None:
        llama3(given.llama3)


if __name__ == "__main__":
    main()
