"""Checks of a training for silent data corruption: what the loop calls.

The checks themselves know no trainer (:mod:`puna.resilience.sdc`); here they get its tensors, its
ranks and a way to compute a micro-batch again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from puna.core.errors import PunaError
from puna.core.ledger import Ledger, read_events
from puna.resilience.sdc.abft import RotatingCheck
from puna.resilience.sdc.digest import digest_tensor, fold
from puna.resilience.sdc.guard import ARBITRATED, DETECTED, StateGuard, unsettled
from puna.resilience.sdc.known import run_known
from puna.resilience.sdc.peers import Alone, GroupPeers, Peers
from puna.resilience.sdc.replay import ReplayCheck
from puna.resilience.sdc.verdict import FaultyRankError, SilentCorruptionError
from puna.tokens.loader import PackedLoader
from puna.train.batch import TensorBatch
from puna.train.parallel.layout import REPLICATE
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.shards import local
from puna.train.parallel.stage import Stage
from puna.train.parallel.world import World
from puna.train.spec import JobSpec

_MAX_REDONE = 2


class SdcWatch:
    """The checks that a training asks for; with none it only passes calls on.

    Args:
        spec: The job.
        model: The model.
        tensors: Live state, parameters and optimiser.
        events: Ledger.
        first_step: The next step.
        compute: Computes the gradients of a step's batch; returns the loss.

    Raises:
        PunaError: Documents may be left out, so that batches cannot be made again.
        FaultyRankError: A rank fails a test with a known answer.
    """

    def __init__(
        self,
        spec: JobSpec,
        model: ParallelModel,
        tensors: Mapping[str, Tensor],
        events: Ledger,
        first_step: int,
        compute: Callable[[int, TensorBatch], float],
    ) -> None:
        cfg = spec.training.sdc
        self._compute_gradients = compute
        self._model, self._world, self._spec, self._events = model, model.world, spec, events
        self._guard: StateGuard | None = None
        self._replay: ReplayCheck | None = None
        self._products: RotatingCheck | None = None
        self._source: Any = None
        if not cfg.is_on:
            return
        self._peers = _peers(model.world)
        self._test_ranks(first_step)
        if cfg.state:
            has_replica = model.world.layout.replicate > 1
            self._guard = StateGuard(
                {name: local(x) for name, x in tensors.items()}, self._peers, events,
                at_rest=cfg.at_rest == "always" or (cfg.at_rest == "auto" and not has_replica),
                gradients=self._gradients if has_replica and cfg.at_rest == "always" else None,
                pending=_pending(events, spec.job), self_test=self._self_test,
            )  # fmt: skip
            self._guard.after_update(first_step - 1)
        if cfg.replay_every:
            self._open_replay(cfg.replay_every)
        if cfg.products and model.world.layout.tp == 1:
            layers = {
                name: module
                for stage in model.stages.values()
                for name, module in stage.named_modules()
                if isinstance(module, nn.Linear) and name != "output"  # its loss never calls it
            }
            self._products = RotatingCheck(layers, offset=model.world.rank)

    def forward_backward(self, step: int, batch: TensorBatch) -> float:
        """Compute the gradients of a step, again when they turn out to be wrong; return the loss.

        Raises:
            SilentCorruptionError: Damaged state has no good replica, or the step stays wrong.
            FaultyRankError: A rank is wrong each time.
        """
        suspects: list[int] = []
        for _ in range(_MAX_REDONE + 1):
            loss, is_wrong = self._once(step, batch, suspects)
            if not is_wrong:
                return loss
            for parameter in self._model.parameters():
                parameter.grad = None
            if self._source is not None:  # the batch in memory may be what is damaged
                batch = self._batch(step, self._world.data_rank)
        raise SilentCorruptionError(f"step {step} stays wrong, however often it is computed")

    def _once(self, step: int, batch: TensorBatch, suspects: list[int]) -> tuple[float, bool]:
        if self._products is not None:
            self._products.arm(step)
        is_compared = self._replay is not None and self._replay.is_due(step)
        record = GradientRecord(self._model.stages.values()) if is_compared else None
        loss = self._compute_gradients(step, batch)
        # First of all: damaged parameters look like a rank that computes wrongly.
        is_wrong = self._guard is not None and self._guard.before_update(step, always=is_compared)
        if self._products is not None:
            is_wrong |= self._look_at_products(step, suspects)
        if self._replay is not None and record is not None:
            own = record.take()
            is_wrong = is_wrong or self._replay.check(step, own, self._world.size)
        return loss, is_wrong

    def after_update(self, step: int) -> None:
        """Compare the state among replicas.

        Raises:
            SilentCorruptionError: Replicas differ and nobody knows who is right.
            FaultyRankError: A rank cannot be healed.
        """
        if self._guard is not None:
            self._guard.after_update(step)

    def _look_at_products(self, step: int, suspects: list[int]) -> bool:
        """Tell whether a product was wrong on some rank; a rank that is so twice is faulty."""
        found = self._products.take() if self._products else []
        rows = self._peers.gather([len(found)])
        bad = [rank for rank, (n,) in enumerate(rows) if n]
        if not bad and not suspects:
            return False
        again = sorted(set(bad) & set(suspects))
        if bad and not suspects:
            suspects.extend(bad)
            layers = sorted({one for row in self._peers.gather_any([f.layer for f in found])
                             for one in row})  # fmt: skip
            self._tell(step, "product", "undecided", bad, tensors=layers, action="computed again")
            return True
        cause = "persistent" if again else "transient"
        self._tell(step, "product", cause, again or suspects, action="stop" if again else "none")
        suspects.clear()
        if again:
            raise FaultyRankError(f"rank {', '.join(map(str, again))} multiplies wrongly each time")
        return bool(bad)

    def _open_replay(self, k: int) -> None:
        self._source = self._spec.source.open()
        if isinstance(self._source, PackedLoader) and self._source.on_damage == "skip":
            raise PunaError(
                f"sdc.replay_every={k} makes batches again, and damaged documents are left out of "
                "them at a time of their own",
                "set sdc.replay_every = 0, or on_damage to stop",
            )
        cfg = self._spec.training
        n_micro = cfg.rank_batch // (cfg.micro_batch or cfg.rank_batch)
        self._replay = ReplayCheck(
            max(1, k // n_micro), self._peers, self._compute, self._events,
            self_test=self._self_test,
        )  # fmt: skip

    def _compute(self, step: int, rank: int) -> int:
        """Compute the first micro-batch of a rank; tp, cp and pp are 1, so ranks are data ranks."""
        record = GradientRecord(self._model.stages.values(), drop=True)
        self._model.replay(self._batch(step, rank))
        return record.take()

    def _batch(self, step: int, rank: int) -> TensorBatch:
        batch = self._source.batch(step, rank, self._world.layout.data)
        return TensorBatch.of(batch, self._world.device)

    def _gradients(self) -> dict[str, Tensor]:
        return {
            name: local(parameter.grad)
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None
        }

    def _self_test(self) -> list[str]:
        return run_known(self._world.device)

    def _test_ranks(self, step: int) -> None:
        failed: list[list[str]] = self._peers.gather_any(self._self_test())
        bad = [rank for rank, names in enumerate(failed) if names]
        if bad:
            names = sorted({name for rank in bad for name in failed[rank]})
            self._tell(step, "self test", "persistent", bad, failed_tests=names, action="stop")
            raise FaultyRankError(
                f"rank {', '.join(map(str, bad))} fails tests with known answers: "
                f"{', '.join(names)}"
            )

    def _tell(self, step: int, where: str, cause: str, ranks: list[int], **more: Any) -> None:
        if self._world.rank == 0:
            self._events.emit(
                DETECTED, durable=True, step=step, where=where, cause=cause, ranks=list(ranks),
                **more,
            )  # fmt: skip


class GradientRecord:
    """Digests the gradient of the first micro-batch that is computed, of each parameter.

    It listens to the tensors that take part in the computation: under FSDP those are the gathered
    parameters, whose gradient is this rank's own, before any sum over ranks.

    Args:
        stages: Of this rank.
        drop: Forget each gradient when it is digested.
    """

    def __init__(self, stages: Any, *, drop: bool = False) -> None:
        self._digests: dict[str, int] = {}
        self._drop = drop
        self._known: set[str] = set()
        self._handles: list[Any] = []
        for stage in stages:
            for name, unit in _units(stage):
                self._handles.append(unit.register_forward_pre_hook(self._listen(name)))

    def take(self) -> int:
        """Stop listening; return one digest of all gradients."""
        for handle in self._handles:
            handle.remove()
        names = sorted(self._digests)
        if not names:
            raise ValueError("no gradient was seen")
        return fold([self._digests[name] for name in names])

    def _listen(self, unit_name: str) -> Callable[..., None]:
        def attach(unit: nn.Module, inputs: Any) -> None:
            for name, parameter in _own_parameters(unit):
                full = f"{unit_name}{name}"
                if full not in self._known and parameter.requires_grad:
                    self._known.add(full)
                    hook = self._digest(full)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

        return attach

    def _digest(self, name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if name not in self._digests:
                self._digests[name] = digest_tensor(local(parameter.grad))
            if self._drop:
                parameter.grad = None

        return look


def _units(stage: Stage) -> list[tuple[str, nn.Module]]:
    """Modules before whose forward pass their parameters are gathered: blocks, and the rest."""
    return [("", stage), *((f"layers.{key}.", block) for key, block in stage.layers.items())]


def _own_parameters(unit: nn.Module) -> list[tuple[str, nn.Parameter]]:
    inner = "layers." if isinstance(unit, Stage) else None
    return [
        (name, parameter)
        for name, parameter in unit.named_parameters()
        if inner is None or not name.startswith(inner)
    ]


def _peers(world: World) -> Peers:
    if world.mesh is None:
        return Alone()
    layout = world.layout
    sets: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world.size):
        place = layout.coordinates(rank)
        key = tuple(number for dim, number in place.items() if dim != REPLICATE)
        sets.setdefault(key, []).append(rank)
    group = world.group(REPLICATE) if layout.replicate > 1 else None
    return GroupPeers(world.device, list(sets.values()), group)


def _pending(events: Ledger, job: str) -> dict[int, dict[int, int]]:
    if events.path is None:
        return {}
    found = read_events(events.path, DETECTED, ARBITRATED)
    return unsettled([event for event in found if event.get("job") == job])
