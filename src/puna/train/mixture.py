"""The schedule of sources that ``puna mix schedule`` writes, and what a training consumed of it.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from puna.tokens.loader import PackedLoader
    from puna.train.config import PretrainConfig

SCHEMA = 1
_WRITE = "write it with `puna mix schedule`"


def read_schedule(path: Path) -> dict[str, Any]:
    """Read a schedule: ``{"schema": 1, "phases": [{"name", "n_tokens", "shares"}, ...]}``.

    Raises:
        PunaError: The file is missing or is no schedule; names the phase and the value.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise PunaError(f"{path}: no such file", _WRITE) from error
    except ValueError as error:
        raise PunaError(f"{path}: no valid JSON: {error}", "correct that line") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not found.get("phases"):
        raise PunaError(f"{path}: is no schedule of this version", _WRITE)
    for number, phase in enumerate(found["phases"], 1):
        where = f"{path}: phase {number}"
        try:
            n_tokens, shares = float(phase["n_tokens"]), dict(phase["shares"])
            total = sum(float(share) for share in shares.values())
        except (KeyError, TypeError, ValueError) as error:
            raise PunaError(f"{where} needs n_tokens and shares: {error!r}", _WRITE) from error
        if not n_tokens > 0:
            raise PunaError(f"{where}: n_tokens is {n_tokens:g}", "use a number above 0")
        if abs(total - 1) > 0.01 or min(shares.values()) < 0:
            raise PunaError(f"{where}: shares sum to {total:.4g}", "make them sum to 1")
    return found


def with_schedule(cfg: PretrainConfig, sources: Iterable[str]) -> PretrainConfig:
    """Return the configuration with the weights and phases of its schedule, if it names one.

    Args:
        cfg: Configuration.
        sources: Sources of the shards; those that the schedule does not name are left out.

    Raises:
        PunaError: The schedule is for another number of tokens, or names an unknown source.
    """
    from puna.train.config import PhaseConfig

    if not cfg.mix:
        return cfg
    path = Path(cfg.mix).expanduser()
    phases, known = read_schedule(path)["phases"], sorted(sources)
    planned = sum(float(phase["n_tokens"]) for phase in phases)
    n_tokens = cfg.tokens_before(cfg.n_steps)
    if abs(planned - n_tokens) > cfg.tokens_per_step:
        raise PunaError(
            f"{path}: is for {planned:.6g} tokens, the run has {n_tokens}",
            f"set tokens = {round(planned)}, or write a schedule for the run",
        )
    for phase in phases:
        unknown = sorted(set(phase["shares"]) - set(known))
        if unknown:
            raise PunaError(
                f"{path}: source {unknown[0]!r} is not among the shards",
                f"they have {', '.join(known)}",
            )
    made, before = [], 0.0
    for phase in phases:
        weights = {name: float(phase["shares"].get(name, 0.0)) for name in known}
        made.append((round(before), weights))
        before += float(phase["n_tokens"])
    later = [PhaseConfig(start_tokens=max(at, 1), weights=weights) for at, weights in made[1:]]
    return cfg.model_copy(update={"weights": made[0][1], "phases": later})


def consumed(loader: PackedLoader, borders: Sequence[int]) -> dict[str, Any]:
    """Compare the tokens of each source with its shares, over a training that is done.

    Args:
        loader: Made the batches.
        borders: First step of each phase, and the number of steps.

    Returns:
        ``phases``: per source the share, the tokens that it means and those of the rows that were
        trained on; ``most_off_tokens``: the largest difference between the two.
    """
    phases, most = [], 0.0
    for first, end in pairwise(borders):
        before, after = loader.rows_per_source(first), loader.rows_per_source(end)
        planned = loader.planned_rows(end)
        planned_before = loader.planned_rows(first)
        sources = {}
        for name, n_rows in after.items():
            tokens = (n_rows - before[name]) * loader.seq_len
            wanted = (planned[name] - planned_before[name]) * loader.seq_len
            most = max(most, abs(tokens - wanted))
            total = sum(after.values()) - sum(before.values())
            sources[name] = {
                "share": wanted / (total * loader.seq_len), "planned_tokens": wanted,
                "tokens": tokens,
            }  # fmt: skip
        phases.append({"first_step": first, "end_step": end, "sources": sources})
    return {"phases": phases, "most_off_tokens": most}
