"""Design of experiments: which mixes to train, which to repeat, which to hold out.

Held-out mixes are drawn first, before anything else is known. A run has a key made of its content:
the shares above zero of its sources, its seed and the settings of the proxy. A source that is
added later changes no key of a run without it, so such runs are taken from what is there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError
from puna.core.fsio import hash_json
from puna.mix import baselines
from puna.mix.runs import read_columns
from puna.mix.sources import Manifest, shares_of

Choice = Literal["maximin", "d-optimal"]
DIGITS = 4
HELD_OUT = 8
REPEATED = 0.18
"""Share of the runs that repeat a mix with another seed; noise depends on the mix."""
CORNER = 0.7
_POOL = 4000
_TEMPERATURES = (1.0, 0.5, 0.25)
_SMALLEST_SHARE = 1e-3


@dataclass(frozen=True)
class PlannedRun:
    """A run to make.

    Attributes:
        key: Made of its content; the same run has the same key in every design.
        kind: ``natural``, ``uniform``, ``temperature``, ``corner``, ``without``, ``random``,
            ``held out``, ``repeat`` or ``added``.
        shares: Share of each source, above zero only.
        seed: Seed of the run.
        held_out: Whether no fit may see it.
        done: Whether it was made before.
    """

    key: str
    kind: str
    shares: Mapping[str, float]
    seed: int
    held_out: bool = False
    done: bool = False

    def row(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the row of a table of runs, without losses."""
        made: dict[str, Any] = {
            "run": self.key, "kind": self.kind, "held_out": int(self.held_out), "seed": self.seed,
            "done": int(self.done),
        }  # fmt: skip
        return made | {f"mix.{name}": self.shares.get(name, 0.0) for name in names}


def run_key(shares: Mapping[str, float], seed: int, proxy: Mapping[str, Any]) -> str:
    """Return the key of a run."""
    kept = {name: round(share, DIGITS) for name, share in shares.items() if share > 0}
    digest = hash_json({"mix": kept, "seed": seed, "proxy": dict(proxy)})
    return f"r{digest[:12]}"  # a letter first: no reader takes it for a number


def design(
    manifest: Manifest, n_runs: int, *, how: Choice = "maximin", n_held_out: int = HELD_OUT,
    proxy: Mapping[str, Any] | None = None, first_seed: int = 0, done: Sequence[str] = (),
    seed: int = 0,
) -> list[PlannedRun]:  # fmt: skip
    """Plan runs.

    Args:
        manifest: The sources.
        n_runs: Runs that may be seen by a fit, repeats included.
        how: Random mixes are picked far from each other, or for a determined fit.
        n_held_out: Runs that no fit sees, besides.
        proxy: Settings of the proxy model, part of each key.
        first_seed: Seed of the runs; repeated mixes take the next one.
        done: Keys of runs that were made.
        seed: Seed of what is random.

    Raises:
        PunaError: There are too few runs for the sources.
    """
    names = manifest.names
    k = len(names)
    fewest = k + 5
    n_repeats = round(REPEATED * n_runs)
    if n_runs - n_repeats < fewest:
        need = int(np.ceil(fewest / (1 - REPEATED)))
        raise PunaError(
            f"{n_runs} runs, of which {n_repeats} repeat a mix, are too few for {k} sources",
            f"plan at least {need} runs (better {4 * k}), or merge sources",
        )
    rng = np.random.default_rng(seed)
    natural = manifest.natural()
    held = rounded(_pool(natural, n_held_out, rng))
    fixed = _fixed(natural, names)
    room = n_runs - n_repeats
    while len(fixed) > max(room * 2 // 3, 3):  # leave a third of the runs to random mixes
        fixed.pop()
    seen = np.array([shares for _, shares in fixed])
    pool = rounded(_pool(natural, _POOL, rng))
    picked = pool[_pick(pool, seen, room - len(fixed), how)]
    mixes = [*fixed, *(("random", shares) for shares in picked)]
    settings = dict(proxy or {})
    made = [_run("held out", one, names, first_seed, settings, held_out=True) for one in held]
    made += [_run(kind, shares, names, first_seed, settings) for kind, shares in mixes]
    every = np.array([shares for _, shares in mixes])
    for at in _pick(every, every[:1], n_repeats, "maximin"):
        made.append(_run("repeat", every[at], names, first_seed + 1, settings))
    unique = {one.key: one for one in reversed(made)}
    known = set(done)
    return [
        replace(one, done=one.key in known) for one in reversed(unique.values())
    ]  # fmt: skip


def extend(
    manifest: Manifest, base: Mapping[str, float], n_runs: int, *,
    proxy: Mapping[str, Any] | None = None, first_seed: int = 0, seed: int = 0,
) -> list[PlannedRun]:  # fmt: skip
    """Plan runs for sources that were added: what was there stays one source of frozen ratios.

    Args:
        manifest: All sources, old and new.
        base: Shares of the old ones in the mix that is kept (Olmix, 2026, mixture reuse).
        n_runs: Runs to make.
        proxy: Settings of the proxy model.
        first_seed: Seed of the runs.
        seed: Seed of what is random.

    Raises:
        PunaError: No source is new, or there are too few runs.
    """
    new = [name for name in manifest.names if base.get(name, 0.0) <= 0]
    if not new:
        raise PunaError("the kept mix has all sources already", "name one that is new")
    fewest = 2 * len(new) + 2
    if n_runs < fewest:
        raise PunaError(
            f"{n_runs} runs are too few for {len(new)} new sources", f"plan at least {fewest}"
        )
    rng = np.random.default_rng(seed)
    strength = np.exp(rng.uniform(np.log(0.3), np.log(3.0), _POOL))
    centre = np.array([0.6] + [0.4 / len(new)] * len(new))
    drawn = rng.standard_gamma(np.maximum(centre * strength[:, None] * len(centre), 1e-3)) + 1e-12
    virtual = drawn / drawn.sum(axis=1, keepdims=True)
    start = np.concatenate([np.eye(len(centre))[:1], np.eye(len(centre)) * CORNER])
    start[1:, 0] += 1 - CORNER
    start = start[[0, *range(2, len(start))]]
    chosen = virtual[_pick(virtual, start, n_runs - len(start), "maximin")]
    total = sum(base.values())
    made = []
    for row in np.concatenate([start, chosen]):
        shares = {name: row[0] * share / total for name, share in base.items()}
        shares |= {name: float(row[1 + at]) for at, name in enumerate(new)}
        vector = rounded(np.array([[shares.get(name, 0.0) for name in manifest.names]]))[0]
        made.append(_run("added", vector, manifest.names, first_seed, dict(proxy or {})))
    return list({one.key: one for one in made}.values())


def to_csv(runs: Sequence[PlannedRun], names: Sequence[str]) -> str:
    """Return the table of planned runs."""
    text = io.StringIO()
    rows = [one.row(names) for one in runs]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def done_keys(path: Path) -> list[str]:
    """Return the keys of runs that were made: the column ``run`` of a CSV or JSON lines file.

    Raises:
        PunaError: The file is missing or has no such column.
    """
    return read_columns(path, "run")


def read_mix(path: Path, names: Sequence[str]) -> dict[str, float]:
    """Read a mix: a JSON object of shares, or what ``puna mix recommend --out`` wrote.

    Raises:
        PunaError: The file is no JSON object, or names no known source.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise PunaError(f"{path}: no such file", "check the path") from error
    except json.JSONDecodeError as error:
        raise PunaError(f"{path}: no valid JSON: {error}", "correct that line") from error
    mix = values.get("mix", values) if isinstance(values, dict) else None
    if not isinstance(mix, dict) or not all(isinstance(v, int | float) for v in mix.values()):
        raise PunaError(f"{path}: is no object of source: share", 'write {"web": 0.7, ...}')
    shares = shares_of(mix, list(names), str(path))
    return {name: float(share) for name, share in zip(names, shares, strict=True) if share > 0}


def _run(
    kind: str, shares: np.ndarray, names: Sequence[str], seed: int, proxy: Mapping[str, Any],
    held_out: bool = False,
) -> PlannedRun:  # fmt: skip
    kept = {
        name: round(float(share), DIGITS)
        for name, share in zip(names, shares, strict=True)
        if share > 0
    }
    return PlannedRun(run_key(kept, seed, proxy), kind, kept, seed, held_out)


def _fixed(natural: np.ndarray, names: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Return natural, uniform and temperature mixes, corners, and the mixes without one source."""
    k = len(names)
    made = [
        ("natural", natural), ("uniform", np.full(k, 1 / k)),
        ("temperature", baselines.temperature(natural)),
    ]  # fmt: skip
    for j in range(k):
        corner = (1 - CORNER) * natural
        corner[j] += CORNER
        made.append(("corner", corner))
    for j in range(k):
        left = natural.copy()
        left[j] = 0.0
        made.append(("without", left / left.sum()))
    return [(kind, one) for kind, one in zip(
        [kind for kind, _ in made], rounded(np.array([shares for _, shares in made])), strict=True
    )]  # fmt: skip


def _pool(natural: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw mixes around the natural one, tempered, with concentrations from 0.3 to 5 per source.

    RegMix draws so (Liu et al. 2024, appendix), from one temperature.
    """
    k = len(natural)
    power = np.array(_TEMPERATURES)[rng.integers(len(_TEMPERATURES), size=n)]
    centre = natural[None] ** power[:, None]
    centre = 0.8 * centre / centre.sum(axis=1, keepdims=True) + 0.2 / k
    strength = np.exp(rng.uniform(np.log(0.3), np.log(5.0), n))[:, None] * k
    drawn = rng.standard_gamma(np.maximum(centre * strength, 1e-3)) + 1e-12
    return drawn / drawn.sum(axis=1, keepdims=True)


def rounded(shares: Float64[np.ndarray, "M K"]) -> Float64[np.ndarray, "M K"]:
    """Round to 4 digits so that rows still sum to 1; shares under 0.1 % become 0."""
    kept = np.where(shares < _SMALLEST_SHARE, 0.0, shares)
    out = np.round(kept / kept.sum(axis=1, keepdims=True), DIGITS)
    largest = out.argmax(axis=1)
    out[np.arange(len(out)), largest] += np.round(1 - out.sum(axis=1), DIGITS)
    return np.round(out, DIGITS)


def _pick(pool: np.ndarray, seen: np.ndarray, n: int, how: Choice) -> list[int]:
    """Choose ``n`` of the pool, one after the other, given those that are in already."""
    if n <= 0:
        return []
    return _maximin(pool, seen, n) if how == "maximin" else _d_optimal(pool, seen, n)


def _maximin(pool: np.ndarray, seen: np.ndarray, n: int) -> list[int]:
    """Take the mix that is farthest from all before (Johnson et al. 1990), in root shares."""
    x = np.sqrt(pool)
    nearest = np.full(len(x), np.inf)
    for row in np.sqrt(seen):
        nearest = np.minimum(nearest, np.linalg.norm(x - row, axis=1))
    picked: list[int] = []
    for _ in range(min(n, len(x))):
        at = int(np.argmax(nearest))
        picked.append(at)
        nearest = np.minimum(nearest, np.linalg.norm(x - x[at], axis=1))
        nearest[at] = -np.inf
    return picked


def _d_optimal(pool: np.ndarray, seen: np.ndarray, n: int) -> list[int]:
    """Take the mix that adds most to the determinant of the information of [r, sqrt r]."""

    def features(shares: Float64[np.ndarray, "M K"]) -> np.ndarray:
        return np.concatenate([shares, np.sqrt(shares)], axis=1)

    x, before = features(pool), features(seen)
    inverse = np.linalg.inv(before.T @ before + 1e-3 * np.eye(x.shape[1]))
    picked: list[int] = []
    left = np.ones(len(x), dtype=bool)
    for _ in range(min(n, len(x))):
        gain = np.where(left, np.einsum("mi,ij,mj->m", x, inverse, x, optimize=True), -np.inf)
        at = int(np.argmax(gain))
        picked.append(at)
        left[at] = False
        v = inverse @ x[at]
        inverse -= np.outer(v, v) / (1 + x[at] @ v)
    return picked
