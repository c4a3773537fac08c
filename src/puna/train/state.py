"""The state of a training: built as the configuration says, loaded from where it is newest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from puna.core.ledger import Ledger
from puna.train.average import WeightAverage
from puna.train.checkpoint.durable import DurableStore
from puna.train.checkpoint.store import CheckpointStore
from puna.train.checkpoint.tiers import CheckpointTiers
from puna.train.initial import starting_tensors
from puna.train.optim import make_optimizer, restore_copies, state_tensors
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.world import World
from puna.train.precision import Precision, decide_precision
from puna.train.spec import CHECKPOINTS_DIR, JobSpec


@dataclass(frozen=True)
class TrainState:
    """Everything that steps change, and where it is kept.

    Attributes:
        model: This rank's part.
        optimizer: Of its parameters.
        average: Of the weights.
        tensors: All live tensors, by name.
        precision: Of the matrix products.
        store: Checkpoints on disk.
        tiers: All places for checkpoints.
        first_step: Step to go on with.
    """

    model: ParallelModel
    optimizer: Optimizer
    average: WeightAverage
    tensors: Mapping[str, Tensor]
    precision: Precision
    store: CheckpointStore
    tiers: CheckpointTiers
    first_step: int


def restore_state(spec: JobSpec, attempt: int, world: World, events: Ledger) -> TrainState:
    """Build the state and load the newest one, or begin as the job says.

    Args:
        spec: The job.
        attempt: Number of this attempt, from 0.
        world: The ranks.
        events: Ledger, bound to the job.

    Raises:
        PunaError: The weights to start from are bad, or checkpoints are another job's.
    """
    cfg = spec.training
    store = CheckpointStore(
        spec.out / CHECKPOINTS_DIR, world, identity=spec.identity(), keep=cfg.checkpoint.keep,
        must_save=cfg.checkpoint.on_failure == "stop", events=events,
        group=world.background_group() if cfg.checkpoint.in_background else None,
        durable=_durable(spec, events),
    )  # fmt: skip
    precision = decide_precision(cfg.precision, world.device, store.earlier_dtype())
    micro_batch = cfg.micro_batch or cfg.rank_batch
    model = ParallelModel(
        spec.model, cfg.seq_len, micro_batch, cfg.rank_batch // micro_batch, world, cfg.parallel,
        precision, z_loss=cfg.z_loss, memory=cfg.memory, float8=cfg.float8,
        attention=cfg.attention,
    )  # fmt: skip
    optimizer = make_optimizer(cfg.optim, model, world, precision.dtype)
    average = WeightAverage(cfg.average, model, cfg.n_steps)
    tensors = {**state_tensors(model, optimizer), **average.tensors}
    tiers = CheckpointTiers(
        cfg.checkpoint, store, spec.memory_dir, spec.identity(), tensors, world, events, attempt
    )
    restored = tiers.restore()
    if restored is None:
        if spec.weights is None:
            model.fill_random(cfg.seed)
        else:
            model.fill(starting_tensors(spec))
        for value in (v for values in optimizer.state.values() for v in values.values()):
            value.zero_()
        average.reset()
    restore_copies(model, optimizer)
    first_step = restored.step if restored else 0
    if world.rank == 0 and (restored or attempt > 0):
        events.emit(
            "train.restore", attempt=attempt, step=first_step, whole=restored is not None,
            tier=restored.tier if restored else None,
        )  # fmt: skip
    return TrainState(model, optimizer, average, tensors, precision, store, tiers, first_step)


def _durable(spec: JobSpec, events: Ledger) -> DurableStore | None:
    cfg = spec.training.checkpoint
    if not cfg.store:
        return None
    return DurableStore(
        cfg.store, cfg.store_options, identity=spec.identity(), keep=cfg.store_keep, events=events
    )
