"""What a training does when its loss or its gradient cannot be right.

All ranks see the same loss and the same norm, so all decide alike and nothing is exchanged. A step
that is computed again has the same batch and the same state: where a fault of the hardware made the
number, the second result is right, and the run ends as if nothing had been. A number that comes
again is the fault of the data or of the state: its update is left out, or the run goes back to a
state before it and round the data (PaLM, Chowdhery et al. 2022, section 5.1).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.fsio import write_json
from puna.core.ledger import Ledger, read_events
from puna.resilience.anomaly import Anomaly, NumberCheck
from puna.resilience.protocols import RollBackError
from puna.train.batch import TensorBatch
from puna.train.checkpoint.tiers import CheckpointTiers
from puna.train.parallel.model import ParallelModel
from puna.train.spec import JobSpec
from puna.train.watch.sdc import SdcWatch

SKIPS_FILE = "skips.json"
"""Steps to leave out, in the folder of the job's state."""
_SEEN = {
    "not_finite": "the loss is {loss} and the gradient's norm {norm}",
    "loss_spike": "the loss is {loss}, {limit} at most was expected",
    "grad_spike": "the gradient's norm is {norm}, {limit} at most was expected",
}


@dataclass(frozen=True)
class StepNumbers:
    """What a step came to.

    Attributes:
        loss: Of the global batch; NaN where it was not computed.
        grad_norm: Before clipping; likewise.
        is_update: Whether the gradients are to be used.
    """

    loss: float
    grad_norm: float
    is_update: bool = True


@dataclass
class _Past:
    """What earlier attempts decided.

    Attributes:
        windows: First step and the step after the last of data to leave out.
        roll_backs: Steps at which the run was rolled back.
    """

    windows: list[tuple[int, int]] = field(default_factory=list)
    roll_backs: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> _Past:
        if not path.exists():
            return cls()
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls([(first, stop) for first, stop in values["windows"]], values["roll_backs"])


class NumberWatch:
    """Computes the gradients of steps, and again or not at all where the numbers say so.

    Args:
        spec: The job.
        model: The model.
        sdc: Checks for silent corruption, which compute the gradients.
        tiers: Checkpoints, of which the newest are given up in a roll-back.
        events: Ledger.
        first_step: The next step.
    """

    def __init__(
        self,
        spec: JobSpec,
        model: ParallelModel,
        sdc: SdcWatch,
        tiers: CheckpointTiers,
        events: Ledger,
        first_step: int,
    ) -> None:
        self._config, self._clip_norm = spec.training.numbers, spec.training.clip_norm
        self._model, self._world, self._sdc = model, model.world, sdc
        self._tiers, self._events = tiers, events
        self._first_step, self._n_skipped = first_step, 0
        self._path = spec.state_dir / SKIPS_FILE
        cfg = self._config
        self._check = NumberCheck(cfg.window, cfg.sigmas, cfg.loss_factor, cfg.grad_factor)
        is_first = self._world.rank == 0
        self._past: _Past = self._world.from_first(_Past.read(self._path) if is_first else None)
        earlier = _earlier(events, spec.job, first_step, cfg.window) if is_first else None
        self._check.add(self._world.from_first(earlier))

    def compute(self, step: int, batch: TensorBatch) -> StepNumbers:
        """Compute the gradients of a step, clipped.

        Raises:
            RollBackError: The run is to go on from an earlier state.
            PunaError: The numbers stay wrong and the recipe's last word is to stop.
        """
        if any(first <= step < stop for first, stop in self._past.windows):
            self._tell("train.skip", step, why="it is in a window of data that is left out")
            return StepNumbers(math.nan, math.nan, is_update=False)
        numbers = self._once(step, batch)
        found = self._check.find(numbers.loss, numbers.grad_norm)
        if found is not None:
            numbers = self._handle(step, batch, numbers, found)
        self._check.add([(numbers.loss, numbers.grad_norm)])
        self._n_skipped = 0 if numbers.is_update else self._n_skipped + 1
        return numbers

    def _once(self, step: int, batch: TensorBatch) -> StepNumbers:
        loss = self._sdc.forward_backward(step, batch)
        with self._model.clock.part("optimizer"):
            return StepNumbers(loss, self._model.clip_gradients(self._clip_norm))

    def _handle(
        self, step: int, batch: TensorBatch, numbers: StepNumbers, found: Anomaly
    ) -> StepNumbers:
        seen = _seen(numbers, found)
        for action in getattr(self._config, found.kind):
            if action == "replay":
                for parameter in self._model.parameters():
                    parameter.grad = None
                numbers = self._once(step, batch)
                again = self._check.find(numbers.loss, numbers.grad_norm)
                result = "transient: computed again it is right" if again is None else "came again"
                self._tell_anomaly(step, found, seen, action, result)
                if again is None:
                    return numbers
            elif action == "skip" and self._n_skipped < self._config.max_skips:
                self._tell_anomaly(step, found, seen, action, "its update is left out")
                self._tell("train.skip", step, why=seen)
                return StepNumbers(numbers.loss, numbers.grad_norm, is_update=False)
            elif action == "roll_back":
                self._roll_back(step, found, seen)
            elif action == "report":
                self._tell_anomaly(step, found, seen, action, "goes on")
                return numbers
            elif action == "stop":
                break
        self._tell_anomaly(step, found, seen, "stop", "the run ends")
        raise PunaError(
            f"step {step}: {seen}",
            "lower optim.lr, lengthen schedule.warmup or lower clip_norm; the checkpoints before "
            f"this step are good (what was tried: numbers.{found.kind})",
        )

    def _roll_back(self, step: int, found: Anomaly, seen: str) -> None:
        """Give up what is newer than the step and leave this attempt; return if it cannot help."""
        past, n_steps = self._past, self._config.skip_steps
        if len(past.roll_backs) >= self._config.max_roll_backs:
            return
        # Of an incident that was rolled back before, that state was bad as well.
        is_known = bool(past.roll_backs) and step <= past.roll_backs[-1] + n_steps
        newest = self._first_step - 1 if is_known else step
        if not self._tiers.give_up_after(newest):
            return
        past.windows.append((step, step + n_steps))
        past.roll_backs.append(step)
        if self._world.rank == 0:
            write_json(self._path, asdict(past))
        self._tell_anomaly(
            step, found, seen, "roll_back",
            f"goes on from a state of step {newest} or before, without the updates of steps {step} "
            f"to {step + n_steps - 1}",
        )  # fmt: skip
        raise RollBackError(f"{seen}; going back to step {newest} or before")

    def _tell_anomaly(self, step: int, found: Anomaly, seen: str, action: str, result: str) -> None:
        self._tell(
            "train.anomaly", step, durable=True, detector=found.kind, seen=seen, action=action,
            result=result,
        )  # fmt: skip

    def _tell(self, kind: str, step: int, *, durable: bool = False, **values: Any) -> None:
        if self._world.rank == 0:
            self._events.emit(kind, durable=durable, step=step, **values)


def _seen(numbers: StepNumbers, found: Anomaly) -> str:
    return _SEEN[found.kind].format(
        loss=f"{numbers.loss:.4g}", norm=f"{numbers.grad_norm:.4g}", limit=f"{found.limit:.4g}"
    )


def _earlier(events: Ledger, job: str, first_step: int, n: int) -> list[tuple[float, float]]:
    """Return loss and norm of the last steps before one, by the ledger."""
    if events.path is None or first_step == 0:
        return []
    known = {
        event["step"]: (event["loss"], event["grad_norm"])
        for event in read_events(events.path, "train.step")
        if event.get("job") == job and event["step"] < first_step
    }
    return [known[step] for step in sorted(known)[-n:]]
