"""All of the lab on one table of runs: noise, fit, held-out mixes, recommendation, attribution."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.core.errors import PunaError
from puna.mix.attribution import Attribution, attribute
from puna.mix.metrics import decision_accuracy, regret, rmse, spearman
from puna.mix.noise import TargetNoise, measure_noise, refuse_noisy
from puna.mix.recommend import Recommendation, recommend
from puna.mix.regressors.choose import Surrogate, choose
from puna.mix.regressors.models import has_trees
from puna.mix.runs import Runs, read_runs
from puna.mix.sources import Manifest, named, read_manifest
from puna.mix.task import Task, make_task

SCHEMA = 1


@dataclass(frozen=True)
class Fit:
    """What was learnt from a table of runs.

    Attributes:
        runs: Runs that were fitted, all of one size and length.
        held_out: Runs that were not.
        task: What is looked for.
        noise: Noise of each target; None when no mix was run twice.
        found: The chosen regressor.
        notes: What was mended, left out or assumed.
    """

    runs: Runs
    held_out: Runs
    task: Task
    noise: list[TargetNoise] | None
    found: Surrogate
    notes: list[str]

    def held_out_json(self) -> dict[str, Any] | None:
        """Return how well runs that no fit saw are predicted; None without three of them."""
        if len(self.held_out) < 3:
            return None
        predicted = self.found.predict(self.held_out.shares_NK)
        ceiling = {one.target: one.best_rank for one in self.noise or []}
        rows = {}
        for name, guess, true in zip(
            self.runs.targets, predicted, self.held_out.loss_TN, strict=True
        ):
            rho = spearman(guess, true)
            rows[name] = {
                "spearman": None if np.isnan(rho) else rho, "rmse": rmse(guess, true),
                "regret": regret(guess, true), "decision_accuracy": decision_accuracy(guess, true),
                "noise_ceiling": ceiling.get(name),
            }  # fmt: skip
        return {"n": len(self.held_out), "targets": rows}

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        found, runs = self.found, self.runs
        size, length = float(runs.n_params_N[0]), float(runs.n_tokens_N[0])
        return {
            "schema": SCHEMA, "sources": runs.sources, "targets": runs.targets,
            "n_runs": len(runs), "n_mixes": runs.n_mixes(), "n_params": size, "n_tokens": length,
            "notes": self.notes, "chosen": found.name, "weights": found.weights,
            "scores": [one.to_json() for one in sorted(found.scores, key=lambda one: one.behind)],
            "per_target": {
                target: {"spearman": None if np.isnan(rho) else float(rho), "rmse": float(error),
                         "scatter": float(y.std())}
                for target, rho, error, y in zip(
                    runs.targets, self._chosen().spearman_T, found.rmse_T, runs.loss_TN, strict=True
                )
            },
            "noise": None if self.noise is None else [one.to_json() for one in self.noise],
            "held_out": self.held_out_json(),
        }  # fmt: skip

    def parity(self) -> dict[str, list[list[float]]]:
        """Return predicted and measured losses of runs that the prediction had not seen."""
        return {
            target: np.column_stack([guess, true]).tolist()
            for target, guess, true in zip(
                self.runs.targets, self.found.out_of_fold_TN, self.runs.loss_TN, strict=True
            )
        }

    def _chosen(self) -> Any:
        return next(one for one in self.found.scores if one.name == self.found.name)


def fit_runs(
    tables: list[Path], manifest: Path | Manifest | None = None, *, only: str | None = None,
    allow_noisy: bool = False, seed: int = 0,
) -> Fit:  # fmt: skip
    """Read a table of runs, measure its noise and fit the best regressor.

    Args:
        tables: Files of the table.
        manifest: Sources, targets and objective; None for none.
        only: Regressor to take; None for the best by cross-validation.
        allow_noisy: Fit targets with a signal-to-noise under 2 all the same.
        seed: Seed of the splits.

    Raises:
        PunaError: The input is wrong, noisy, or too little.
    """
    runs = read_runs(tables)
    known = read_manifest(manifest) if isinstance(manifest, Path) else manifest
    notes = list(runs.notes)
    runs = _one_scale(runs, notes)
    task = make_task(runs.sources, runs.targets, known)
    notes += task.notes
    noise = measure_noise(runs)
    if noise is None:
        notes.append(
            "no mix was run with two seeds: the noise is not known, and nothing here can tell "
            "luck from a better mix; repeat some runs"
        )
    elif not allow_noisy:
        wanted = [t for t, w in zip(task.targets, task.weight_T, strict=True) if w > 0]
        refuse_noisy(noise, wanted)
    held_out = runs.only(np.flatnonzero(runs.held_out_N))
    seen = runs.only(np.flatnonzero(~runs.held_out_N))
    if seen.n_mixes() < len(runs.sources) + 1:
        raise PunaError(
            f"{seen.n_mixes()} different mixes for {len(runs.sources)} sources: each effect is "
            "hidden in another",
            f"run at least {len(runs.sources) + 5} different mixes (better "
            f"{4 * len(runs.sources)}), or merge sources",
        )
    if not has_trees():
        notes.append("LightGBM is not installed: no trees among the regressors")
    found = choose(seen.shares_NK, seen.loss_TN, only=only, seed=seed)
    return Fit(seen, held_out, task, noise, found, notes)


def recommend_from(fit: Fit, *, n_replicates: int = 40, seed: int = 0) -> Recommendation:
    """Look for the best mix of a fit; unknown noise keeps it from being recommended."""
    noise = None
    if fit.noise is not None:
        noise = np.array([one.sd_seed for one in fit.noise])
    return recommend(fit.task, fit.found, seed_sd_T=noise, n_replicates=n_replicates, seed=seed)


def attribute_from(fit: Fit, made: Recommendation) -> Attribution:
    """Attribute the losses of the recommended mix to its sources."""
    return attribute(fit.runs, fit.found.predict, made.shares_K, fit.task.natural_K)


def report_values(
    fit: Fit, made: Recommendation, helped: Attribution, schedule: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return everything that the report shows, as JSON values."""
    manifest = fit.task.manifest
    sources = None
    if manifest is not None:
        epochs = manifest.epochs(made.shares_K)
        sources = [
            one.model_dump() | {"epochs": float(passes), "share": float(share)}
            for one, passes, share in zip(manifest.source, epochs, made.shares_K, strict=True)
        ]
    every = (fit.runs, fit.held_out)
    tokens = float(sum(one.n_tokens_N.sum() for one in every))
    flop = float(sum((6 * one.n_params_N * one.n_tokens_N).sum() for one in every))
    return {
        **fit.to_json(), "recommendation": made.to_json(), "attribution": helped.to_json(),
        "parity": fit.parity(), "manifest_sources": sources,
        "natural": named(fit.task.natural_K, fit.task.sources),
        "cost": {"proxy_tokens": tokens, "proxy_flop": flop},
        "schedule": schedule,
    }  # fmt: skip


def _one_scale(runs: Runs, notes: list[str]) -> Runs:
    """Take the runs of the size and length that most runs have."""
    scales = runs.scales()
    if len(scales) == 1:
        return runs
    most = max(scales, key=lambda one: (len(runs.at(*one)), one))
    rest = ", ".join(
        f"{n:.3g} parameters x {d:.3g} tokens ({len(runs.at(n, d))})"
        for n, d in scales
        if (n, d) != most
    )
    notes.append(
        f"fitted are the {len(runs.at(*most))} runs of {most[0]:.3g} parameters x {most[1]:.3g} "
        f"tokens; other scales: {rest}"
    )
    return runs.at(*most)
