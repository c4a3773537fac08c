"""The training loop, from top to bottom.

Nothing here depends on which attempt it is or on how many ranks there are: the batch, the learning
rate and the random numbers of a step are functions of the step alone, and the rest of the state
(weights, optimiser) is in the checkpoint. So a run that was killed ends like one that was not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from puna.core.ledger import Ledger
from puna.model.accounting import FLOPS_CONVENTION, account
from puna.resilience.faults import FaultInjector, PlannedFault
from puna.resilience.heartbeat import HeartbeatWriter
from puna.train.export import export_model
from puna.train.feed import BatchFeed
from puna.train.log_config import LogConfig
from puna.train.metrics import StepCost, StepMeter, peak_flops
from puna.train.optim import set_lr
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.world import World
from puna.train.precision import Precision
from puna.train.schedule import lr_factor
from puna.train.spec import JobSpec
from puna.train.state import restore_state
from puna.train.watch.heldout import HeldOutEvaluation
from puna.train.watch.injury import Injury
from puna.train.watch.numbers import NumberWatch
from puna.train.watch.profile import StepProfile
from puna.train.watch.sdc import SdcWatch
from puna.train.watch.writers import Writers


def train(
    spec: JobSpec, attempt: int, world: World, heart: HeartbeatWriter, events: Ledger
) -> None:
    """Train from the newest checkpoint (or from the start) to the end, and write the model.

    Args:
        spec: The job.
        attempt: Number of this attempt, from 0.
        world: The ranks.
        heart: Heartbeat of this rank.
        events: Ledger, bound to the job.

    Raises:
        PunaError: The loss stays no number, a checkpoint cannot be saved, or the data or the
            weights to start from are bad.
        RollBackError: The run is to go on from an earlier state.
    """
    cfg = spec.training
    source = spec.source.open()
    if source.n_rows != cfg.global_batch:
        raise ValueError(f"the source has {source.n_rows} rows, not {cfg.global_batch}")
    state = restore_state(spec, attempt, world, events)
    model, optimizer, precision = state.model, state.optimizer, state.precision
    first_step, tiers = state.first_step, state.tiers

    clock = model.clock
    clock.on_enter, clock.on_leave = heart.place.enter, heart.place.back_in
    watch = _watch(spec, attempt, first_step, model, precision, heart, events)
    meter, evaluation = watch.meter, watch.evaluation
    _tell_start(spec, attempt, world, precision, meter, events)
    injury = Injury(model, state.tensors, _fault_injector(spec, world, events))
    sdc = SdcWatch(spec, model, state.tensors, events, first_step, injury.forward_backward)
    numbers = NumberWatch(spec, model, sdc, tiers, events, first_step)

    with (
        BatchFeed(source, world, first_step, cfg.n_steps, cfg.prefetch, events) as feed,
        watch.writers,
        watch.profile as profile,
    ):
        for step in range(first_step, cfg.n_steps):
            heart.beat("step", step)
            meter.begin()
            profile.before_step()
            torch.manual_seed(_mix_seed(cfg.seed, step, world.rank))
            lr = cfg.optim.lr * lr_factor(cfg.schedule, step, cfg.n_steps)
            with clock.part("data"):
                batch = feed.get(step)
            found = numbers.compute(step, batch)
            with clock.part("optimizer"):
                if found.is_update:
                    set_lr(optimizer, lr)
                    optimizer.step()
                    state.average.update(step)
                optimizer.zero_grad(set_to_none=True)
                sdc.after_update(step)
            if found.is_update:
                meter.end(
                    step, model.report, seq_len=batch.tokens_BT.shape[1],
                    n_tokens=cfg.tokens_before(step + 1) - cfg.tokens_before(step),
                    loss=found.loss, lr=lr, grad_norm=found.grad_norm,
                )  # fmt: skip
            heart.worked(clock.take_compute())
            if profile.after_step():
                heart.beat("done", step + 1)
                return
            done, final = step + 1, step + 1 == cfg.n_steps
            if evaluation.is_due(done, final=final):
                meter.flush()
                with clock.part("eval"):
                    evaluation.run(done)
            if tiers.is_due(done, final=final):
                meter.flush()
                heart.beat("save", done)
                with clock.part("checkpoint"):
                    tiers.after_step(done, precision.name, final=final)
    heart.beat("save", cfg.n_steps)
    export_model(spec, state.store, world)
    state.store.finish_uploads(lambda: heart.beat("save", cfg.n_steps))
    heart.beat("done", cfg.n_steps)


@dataclass(frozen=True)
class _Watch:
    """What a training is watched by."""

    meter: StepMeter
    writers: Writers
    evaluation: HeldOutEvaluation
    profile: StepProfile


def _watch(
    spec: JobSpec,
    attempt: int,
    first_step: int,
    model: ParallelModel,
    precision: Precision,
    heart: HeartbeatWriter,
    events: Ledger,
) -> _Watch:
    cfg, world = spec.training, model.world
    cost = StepCost(
        account(spec.model), world.sum([model.n_again])[0] * world.layout.pp / world.size,
        peak_flops(spec.state_dir, world, precision.dtype),
    )  # fmt: skip
    log = cfg.log if world.rank == 0 else LogConfig()
    settings = cfg.model_dump(mode="json")
    writers = Writers(log, spec.out, spec.job, settings, first_step, events)
    on_step = _on_step(spec, attempt, world, precision, writers, events)
    return _Watch(
        StepMeter(
            events, world, model.clock, attempt=attempt, log_every=cfg.log_every, cost=cost,
            on_event=on_step,
        ),
        writers,
        HeldOutEvaluation(
            spec.heldout, model, cfg.seq_len, world, events, attempt=attempt,
            beat=lambda: heart.beat("eval", heart.step),
            on_event=partial(writers.put, prefix="eval"),
        ),
        StepProfile(spec.profile, model, world, cost),
    )  # fmt: skip


def _on_step(
    spec: JobSpec, attempt: int, world: World, precision: Precision, writers: Writers,
    events: Ledger,
) -> Callable[[int, dict[str, Any]], None]:  # fmt: skip
    """Return who is told of each ``train.step`` event, on rank 0."""
    if spec.training.predict is None or world.rank != 0:
        return writers.put
    from puna.train.watch.prediction import PredictionWatch, predict_training

    found = predict_training(spec.training, spec.model, world.size, precision.name)
    prediction = PredictionWatch(found, spec.training, events, attempt)

    def tell(step: int, values: dict[str, Any]) -> None:
        writers.put(step, values)
        prediction.see(step, values)

    return tell


def _fault_injector(spec: JobSpec, world: World, events: Ledger) -> FaultInjector:
    fault = spec.training.fault
    planned = PlannedFault(fault.rank, fault.step, fault.what) if fault and fault.enabled else None
    return FaultInjector(planned, world.rank, spec.job, events)


def _mix_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's random numbers: no generator state has to be saved."""
    return ((seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63


def _tell_start(
    spec: JobSpec,
    attempt: int,
    world: World,
    precision: Precision,
    meter: StepMeter,
    events: Ledger,
) -> None:
    if world.rank == 0:
        events.emit(
            "train.start", attempt=attempt, n_params=account(spec.model).n_params,
            world=world.size, n_threads=world.n_threads, device=str(world.device),
            dtype=precision.name, dtype_reason=precision.reason, steps=spec.training.n_steps,
            tokens_per_step=spec.training.tokens_per_step,
            flops_per_token=meter.cost.model.flops_per_token(spec.training.seq_len),
            flops_convention=FLOPS_CONVENTION, peak_flops_measured=meter.cost.peak_flops,
        )  # fmt: skip
