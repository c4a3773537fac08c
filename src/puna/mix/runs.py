"""The table of runs: which mix was trained, how large, how long, with which seed, and its losses.

A table is CSV, Parquet or JSON lines with one row per run: ``run`` (or ``index``), ``mix.SOURCE``
the share of each source, ``loss.TARGET`` each loss, and perhaps ``held_out`` (1: no fit sees it),
``seed``, ``n_params``, ``n_tokens``. Several files are joined on ``run``. RegMix's columns
(``train_...``, ``metric/..._val_loss``) are understood as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from puna.core.errors import PunaError

ROUNDING = 0.01
"""Shares that sum to 1 within this are taken for rounded ones."""
MOST_LOST = 0.2
"""Share of runs that may be left out for losses that are no numbers."""
_MIX, _LOSS = ("mix.", "train_"), ("loss.", "metric/")
_KEYS = ("run", "index")
_SETTINGS = ("seed", "n_params", "n_tokens", "held_out")


@dataclass(frozen=True)
class Runs:
    """Runs that can be fitted.

    Attributes:
        names: One name per run.
        sources: Names of the sources, K.
        targets: Names of the targets, T.
        shares_NK: Share of each source; rows sum to 1.
        loss_TN: Losses; no NaN.
        seed_N: Seed of each run.
        n_params_N: Parameters of the model; 0 when not told.
        n_tokens_N: Tokens of the training; 0 when not told.
        held_out_N: Whether no fit may see the run.
        notes: What was mended or left out, in sentences.
    """

    names: list[str]
    sources: list[str]
    targets: list[str]
    shares_NK: Float64[np.ndarray, "N K"]
    loss_TN: Float64[np.ndarray, "T N"]
    seed_N: Int64[np.ndarray, " N"]
    n_params_N: Float64[np.ndarray, " N"]
    n_tokens_N: Float64[np.ndarray, " N"]
    held_out_N: Bool[np.ndarray, " N"]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.names)

    def only(self, kept: np.ndarray) -> Runs:
        """Return some of the runs.

        Args:
            kept: Their numbers, or one truth value per run.
        """
        rows = np.flatnonzero(kept) if kept.dtype == bool else kept
        return dataclasses.replace(
            self, names=[self.names[row] for row in rows], shares_NK=self.shares_NK[rows],
            loss_TN=self.loss_TN[:, rows], seed_N=self.seed_N[rows],
            n_params_N=self.n_params_N[rows], n_tokens_N=self.n_tokens_N[rows],
            held_out_N=self.held_out_N[rows],
        )  # fmt: skip

    def scales(self) -> list[tuple[float, float]]:
        """Return the different pairs of parameters and tokens, smallest first."""
        pairs = zip(self.n_params_N.tolist(), self.n_tokens_N.tolist(), strict=True)
        return sorted(set(pairs))

    def at(self, n_params: float, n_tokens: float) -> Runs:
        """Return the runs of one size and length."""
        return self.only((self.n_params_N == n_params) & (self.n_tokens_N == n_tokens))

    def replicates(self) -> list[np.ndarray]:
        """Return groups of two or more runs that differ only in their seed."""
        groups: dict[Any, list[int]] = {}
        rounded = np.round(self.shares_NK, 6)
        for row in range(len(self)):
            key = (tuple(rounded[row]), self.n_params_N[row], self.n_tokens_N[row])
            groups.setdefault(key, []).append(row)
        return [np.array(rows) for rows in groups.values() if len(rows) > 1]

    def n_mixes(self) -> int:
        """Return how many different mixes there are."""
        return len(np.unique(np.round(self.shares_NK, 6), axis=0))


def read_runs(paths: Sequence[Path]) -> Runs:
    """Read a table of runs, from one file or from several that share the column ``run``.

    Raises:
        PunaError: A file or column is missing, shares are no shares, a run stands twice, or too
            many losses are no numbers.
    """
    if not paths:
        raise PunaError("no table of runs was given", "name at least one file")
    tables = [read_table(path) for path in paths]
    where = ", ".join(path.name for path in paths)
    table, notes = _join(tables, [path.name for path in paths])
    mix = {_plain(name, _MIX): name for name in table if name.startswith(_MIX)}
    loss = {_plain(name, _LOSS): name for name in table if name.startswith(_LOSS)}
    if len(mix) < 2 or not loss:
        what = "two columns mix.SOURCE" if len(mix) < 2 else "a column loss.TARGET"
        raise PunaError(
            f"{where}: needs at least {what}; it has {', '.join(list(table)[:8])}",
            "name the columns mix.SOURCE and loss.TARGET, or give the other file as well",
        )
    names = [str(value) for value in table[_key(table, where)]]
    shares = np.column_stack([_numbers(table[name], where, name, names) for name in mix.values()])
    losses = np.array([_numbers(table[name], where, name, names) for name in loss.values()])
    settings = {
        name: _numbers(table[name], where, name, names) if name in table else np.zeros(len(names))
        for name in _SETTINGS
    }
    runs = Runs(
        names, list(mix), list(loss), shares, losses, settings["seed"].astype(np.int64),
        settings["n_params"], settings["n_tokens"], settings["held_out"] > 0, notes,
    )  # fmt: skip
    return check_runs(runs, where)


def read_columns(path: Path, name: str) -> list[str]:
    """Return one column of a table as text.

    Raises:
        PunaError: The file cannot be read or has no such column.
    """
    table = read_table(path)
    if name not in table:
        raise PunaError(f"{path}: has no column {name!r}", f"it has {', '.join(list(table)[:8])}")
    return [str(value) for value in table[name]]


def check_runs(runs: Runs, where: str) -> Runs:
    """Refuse or mend what is wrong with a table, and say so in its notes.

    Raises:
        PunaError: As of :func:`read_runs`.
    """
    notes = list(runs.notes)
    runs = dataclasses.replace(runs, shares_NK=_checked_shares(runs, where, notes))
    runs = _without_lost(runs, where, notes)
    runs = _without_doubles(runs, notes)
    flat = [t for t, one in zip(runs.targets, runs.loss_TN, strict=True) if np.ptp(one) == 0]
    if flat and len(runs) > 1:
        raise PunaError(
            f"{where}: loss.{flat[0]} is the same in every run, nothing can be learnt from it",
            "leave that column out, or check what wrote it",
        )
    unused = runs.shares_NK.max(axis=0) == 0
    if unused.any():
        gone = [name for name, none in zip(runs.sources, unused, strict=True) if none]
        notes.append(f"no run has a token of {', '.join(gone)}: left out")
        runs = dataclasses.replace(
            runs, sources=[s for s in runs.sources if s not in gone],
            shares_NK=runs.shares_NK[:, ~unused],
        )  # fmt: skip
    return dataclasses.replace(runs, notes=notes)


def _checked_shares(runs: Runs, where: str, notes: list[str]) -> np.ndarray:
    shares = runs.shares_NK
    bad = ~np.isfinite(shares) | (shares < 0)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise PunaError(
            f"{where}: run {runs.names[row]}: share of {runs.sources[column]} is "
            f"{shares[row, column]}",
            "use numbers from 0 to 1",
        )
    total = shares.sum(axis=1)
    off = np.abs(total - 1) > ROUNDING
    if off.any():
        row = int(np.argmax(np.abs(total - 1)))
        raise PunaError(
            f"{where}: run {runs.names[row]}: shares sum to {total[row]:.4g} "
            f"({int(off.sum())} of {len(runs)} runs are off by more than {ROUNDING})",
            "give the share of every source that was trained on; they must sum to 1",
        )
    rounded = np.abs(total - 1) > 1e-9
    if rounded.any():
        notes.append(
            f"shares of {int(rounded.sum())} runs sum to {total.min():.4g} to {total.max():.4g} "
            "(rounding): divided by their sum"
        )
    return shares / total[:, None]


def _without_lost(runs: Runs, where: str, notes: list[str]) -> Runs:
    lost = np.any(~np.isfinite(runs.loss_TN), axis=0)
    if not lost.any():
        return runs
    names = [runs.names[row] for row in np.flatnonzero(lost)]
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    if lost.mean() > MOST_LOST:
        raise PunaError(
            f"{where}: {len(names)} of {len(runs)} runs have a loss that is no finite number "
            f"({shown}); they cannot be left out without bias",
            "train them again, with a lower learning rate if they diverged",
        )
    notes.append(f"runs with a loss that is no finite number are left out: {shown}")
    return runs.only(np.flatnonzero(~lost))


def _without_doubles(runs: Runs, notes: list[str]) -> Runs:
    """Count a run that stands there twice once; runs that differ only in their loss are seeds."""
    gone: list[int] = []
    n_seeds = 0
    for rows in runs.replicates():
        _, first = np.unique(runs.loss_TN[:, rows].T, axis=0, return_index=True)
        gone += [int(rows[i]) for i in range(len(rows)) if i not in first]
        n_seeds += len(first) > 1
    if n_seeds:
        notes.append(f"{n_seeds} mixes were run more than once: they tell the noise of a seed")
    if gone:
        names = ", ".join(runs.names[row] for row in gone[:5])
        notes.append(f"the same mix with the same losses stands there again: left out {names}")
        kept = np.ones(len(runs), dtype=bool)
        kept[gone] = False
        return runs.only(kept)
    return runs


def read_table(path: Path) -> dict[str, list[Any]]:
    """Read a table of CSV, Parquet or JSON lines, by columns.

    Raises:
        PunaError: The file is missing, cannot be read, has no rows, or a column twice.
    """
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    if not path.is_file():
        raise PunaError(f"{path}: no such file", "check the path")
    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        elif path.suffix in (".jsonl", ".json", ".ndjson"):
            table = json.read_json(path)
        else:
            table = csv.read_csv(path)
    except pa.ArrowException as error:
        raise PunaError(f"{path}: {error}", "use CSV, Parquet or JSON lines") from error
    table = table.flatten()
    if not table.num_rows:
        raise PunaError(f"{path}: has no rows", "check what wrote it")
    twice = {name for name in table.column_names if table.column_names.count(name) > 1}
    if twice:
        raise PunaError(f"{path}: column {min(twice)!r} stands there twice", "rename one of them")
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _key(table: dict[str, list[Any]], where: str) -> str:
    for name in _KEYS:
        if name in table:
            return name
    raise PunaError(f"{where}: has no column `run`", "add one with a name for each run")


def _join(
    tables: list[dict[str, list[Any]]], names: list[str]
) -> tuple[dict[str, list[Any]], list[str]]:
    notes: list[str] = []
    if len(tables) == 1 and not any(key in tables[0] for key in _KEYS):
        first = tables[0]
        first["run"] = [str(row) for row in range(len(next(iter(first.values()))))]
    indexed = []
    for table, where in zip(tables, names, strict=True):
        keys = [str(value) for value in table[_key(table, where)]]
        twice = sorted({key for key in keys if keys.count(key) > 1}) if _doubles(keys) else []
        if twice:
            raise PunaError(
                f"{where}: run {twice[0]} stands there twice", "give every run a name of its own"
            )
        indexed.append({key: row for row, key in enumerate(keys)})
    common = [key for key in indexed[0] if all(key in one for one in indexed)]
    everything = {key for one in indexed for key in one}
    if not common:
        raise PunaError(
            f"{' and '.join(names)} have no run in common", "join files of the same runs"
        )
    missing = sorted(everything - set(common))
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        notes.append(f"{len(missing)} runs are not in every file and are left out: {shown}")
    joined: dict[str, list[Any]] = {"run": common}
    for table, rows in zip(tables, indexed, strict=True):
        order = [rows[key] for key in common]
        for name, values in table.items():
            if name not in _KEYS:
                joined[name] = [values[row] for row in order]
    return joined, notes


def _doubles(keys: list[str]) -> bool:
    return len(set(keys)) < len(keys)


def _plain(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix).removesuffix("_val_loss")
    raise ValueError(name)


def _numbers(values: list[Any], where: str, column: str, names: list[str]) -> np.ndarray:
    out = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            out[row] = np.nan if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise PunaError(
                f"{where}: run {names[row]}: {column} is {value!r}", "write a number"
            ) from error
    return out
