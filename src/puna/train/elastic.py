"""Numbers of ranks that a training can go on with; imports no torch.

Batch, learning rate and random numbers are functions of the step, and data order does not depend on
the ranks, so fewer data-parallel ranks compute the same run up to rounding. Ranks that share
tensors, contexts, layers or hold copies stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from puna.core.errors import PunaError
from puna.model.config import LlamaConfig
from puna.train.config import TrainingConfig
from puna.train.parallel.layout import check_layout
from puna.train.spec import JobSpec


def ranks_per_place(cfg: TrainingConfig) -> int:
    """Return how many ranks go with a node that is lost: on one machine each rank has its place."""
    return cfg.nproc // cfg.launch.nodes if cfg.launch.nodes > 1 else 1


def allowed_ranks(cfg: TrainingConfig, model: LlamaConfig) -> list[int]:
    """Return the numbers of ranks that the training can have, most first; at least the full one."""
    found, least = [cfg.nproc], cfg.restart.min_nproc
    if least is None:
        return found
    p, per_place = cfg.parallel, ranks_per_place(cfg)
    inner = p.tp * p.cp * p.pp
    batches = {n_rows for n_rows, _ in cfg.batch_shapes}
    for n_ranks in range(cfg.nproc - per_place, least - 1, -per_place):
        if n_ranks % (inner * p.replicate) or any(n % (n_ranks // inner) for n in batches):
            continue
        if shrunk(cfg, model, n_ranks) is not None:
            found.append(n_ranks)
    return found


def check_elastic(cfg: TrainingConfig, model: LlamaConfig) -> None:
    """Refuse a least number of ranks that never helps.

    Raises:
        PunaError: No number of ranks below the full one works.
    """
    least = cfg.restart.min_nproc
    if least is None or least == cfg.nproc or len(allowed_ranks(cfg, model)) > 1:
        return
    raise PunaError(
        f"restart.min_nproc = {least}: no number of ranks from {least} to {cfg.nproc - 1} works "
        f"with global_batch = {cfg.global_batch}, launch.nodes = {cfg.launch.nodes} and parallel",
        "lower min_nproc, choose a global_batch with more divisors, or remove min_nproc",
    )


def shrunk(cfg: TrainingConfig, model: LlamaConfig, n_ranks: int) -> TrainingConfig | None:
    """Return the training on so many ranks; None when they cannot share it."""
    values = {name: getattr(cfg, name) for name in TrainingConfig.model_fields}
    values["nproc"] = n_ranks
    values["launch"] = cfg.launch.model_copy(
        update={"nodes": max(1, n_ranks // ranks_per_place(cfg)) if cfg.launch.nodes > 1 else 1,
                "spares": 0},
    )  # fmt: skip
    values["restart"] = cfg.restart.model_copy(update={"min_nproc": None})
    if cfg.fault is not None and cfg.fault.rank >= n_ranks:
        values["fault"] = None
    # All rows at once would be more per rank than it was planned to hold.
    for micro_batch in (cfg.micro_batch or cfg.rank_batch, cfg.micro_batch):
        try:
            found = TrainingConfig.model_validate({**values, "micro_batch": micro_batch})
            check_layout(found, model)
        except (ValueError, PunaError):
            continue
        return found
    return None


def spec_of(spec: JobSpec, n_ranks: int) -> JobSpec:
    """Return the job on so many ranks.

    Raises:
        ValueError: They cannot share it.
    """
    training = shrunk(spec.training, spec.model, n_ranks)
    if training is None:
        raise ValueError(f"{n_ranks} ranks cannot share the training")
    return replace(spec, training=training)
