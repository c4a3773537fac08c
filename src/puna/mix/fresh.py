"""A recommended mix and its baselines, trained again with seeds that no fit has seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.core.errors import PunaError
from puna.mix.confirm import FEWEST_SEEDS, Confirmation, confirm
from puna.mix.design import PlannedRun, rounded, run_key
from puna.mix.proxy.runs import Made, make_runs
from puna.mix.runs import read_runs
from puna.mix.sources import Manifest, shares_of
from puna.mix.task import make_task

FIRST_SEED = 100
"""Fresh seeds begin so many after the first seed of the proxies; a design takes two."""
TABLE_FILE = "confirm.csv"
_MIX = "the mix"


@dataclass(frozen=True)
class Confirmed:
    """What fresh seeds say.

    Attributes:
        values: Objective of each seed, by the name of the mix; lower is better.
        shares: The mixes.
        comparisons: The mix against each baseline.
        verdict: In words.
        n_params: Parameters of the proxies.
        n_tokens: Tokens of each.
        made: The runs.
    """

    values: dict[str, list[float]]
    shares: dict[str, dict[str, float]]
    comparisons: list[Confirmation]
    verdict: str
    n_params: int
    n_tokens: int
    made: Made

    @property
    def known(self) -> bool:
        """Whether the mix has beaten every baseline beyond the noise of seeds."""
        return all(one.better for one in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "mix": self.shares[_MIX], "confirmed": self.known, "verdict": self.verdict,
            "n_params": self.n_params, "n_tokens": self.n_tokens,
            "values": self.values,
            "baselines": [
                {"name": one.baseline, "mix": self.shares[one.baseline], "gain": one.gain,
                 "gain_low": one.low, "gain_high": one.high, "better": one.better}
                for one in self.comparisons
            ],
        }  # fmt: skip


def confirm_mix(
    recommended: Path, manifest: Manifest, shards: str, out: Path, *, n_seeds: int = 3,
    first_seed: int | None = None, n_workers: int = 0,
) -> Confirmed:  # fmt: skip
    """Train a mix and what it is to beat with fresh seeds, and compare.

    Args:
        recommended: What ``puna mix recommend --out`` wrote.
        manifest: Sources, targets, objective and proxies; larger proxies than those of the design
            tell whether the mix is the better one there, too.
        shards: Folder of token shards.
        out: Folder of the results; may be that of the design.
        n_seeds: Seeds of each mix.
        first_seed: First of them; by default 100 after the first seed of the proxies.
        n_workers: Processes; 0 for one per core.

    Raises:
        PunaError: The file is no recommendation, seeds are too few or not fresh, or as of
            :func:`puna.mix.proxy.runs.make_runs`.
    """
    if n_seeds < FEWEST_SEEDS:
        raise PunaError(
            f"{n_seeds} seed tells no noise", f"train at least {FEWEST_SEEDS}, better 3"
        )
    own = manifest.proxy.seed
    first = own + FIRST_SEED if first_seed is None else first_seed
    if first < own + 2 and first + n_seeds > own:
        raise PunaError(
            f"seeds {first} to {first + n_seeds - 1} were used by the design ({own} and {own + 1})",
            f"begin at {own + 2} or later",
        )
    shares = {name: _shares(mix, manifest) for name, mix in _mixes(recommended).items()}
    content = manifest.proxy.content()
    planned = [
        PlannedRun(run_key(mix, seed, content), name, mix, seed)
        for name, mix in shares.items()
        for seed in range(first, first + n_seeds)
    ]
    unique = list({one.key: one for one in planned}.values())
    made = make_runs(manifest, unique, shards, out, n_workers=n_workers, table=TABLE_FILE)
    lost = [result["run"] for result in made.results if result["diverged"]]
    if lost:
        raise PunaError(
            f"run {lost[0]} ended with a loss that is no number", "lower optim.lr under [proxy]"
        )
    worth = _worth(manifest, made, shares["natural"])
    values = {name: [worth[one.key] for one in planned if one.kind == name] for name in shares}
    arrays = {name: np.array(found) for name, found in values.items()}
    own_values = arrays.pop(_MIX)
    same = [name for name in arrays if shares[name] == shares[_MIX]]
    for name in same:
        del arrays[name]
    if not arrays:
        raise PunaError("the mix is one of its baselines", "there is nothing to confirm")
    comparisons, verdict = confirm(own_values, arrays)
    if same:
        verdict += f" It is the same as {', '.join(same)}."
    result = made.results[0]
    return Confirmed(
        values, shares, comparisons, verdict, result["n_params"], result["n_tokens"], made
    )


def _mixes(path: Path) -> dict[str, Mapping[str, float]]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise PunaError(f"{path}: no such file", "write it with `puna mix recommend`") from error
    except ValueError as error:
        raise PunaError(f"{path}: no valid JSON: {error}", "correct that line") from error
    try:
        mixes: dict[str, Mapping[str, float]] = {_MIX: dict(found["mix"])}
        mixes |= {one["name"]: dict(one["mix"]) for one in found["baselines"]}
    except (KeyError, TypeError, ValueError) as error:
        raise PunaError(
            f"{path}: is no recommendation: {error!r}", "write it with `puna mix recommend --out`"
        ) from error
    if "natural" not in mixes:
        raise PunaError(
            f"{path}: has no natural mix to beat", "recommend with --manifest, which tells it"
        )
    return mixes


def _shares(mix: Mapping[str, float], manifest: Manifest) -> dict[str, float]:
    vector = rounded(shares_of(dict(mix), manifest.names, "the recommendation")[None])[0]
    pairs = zip(manifest.names, vector.tolist(), strict=True)
    return {name: share for name, share in pairs if share > 0}


def _worth(manifest: Manifest, made: Made, natural: Mapping[str, float]) -> dict[str, float]:
    """Return the objective of each run; the worst target is measured against the natural mix."""
    runs = read_runs([made.table])
    # A source that no run has is not in the table: give it back for the manifest's sake.
    shares_NK = np.zeros((len(runs), len(manifest.names)))
    for column, name in enumerate(runs.sources):
        shares_NK[:, manifest.names.index(name)] = runs.shares_NK[:, column]
    task = make_task(manifest.names, runs.targets, manifest)
    of_natural = np.array([natural.get(name, 0.0) for name in manifest.names])
    is_natural = np.abs(shares_NK - of_natural).max(axis=1) < 1e-6
    reference_T = runs.loss_TN[:, is_natural].mean(axis=1)
    values = task.value(runs.loss_TN, shares_NK, reference_T)
    return dict(zip(runs.names, values.tolist(), strict=True))
