"""Tells when steps take longer than the planner predicts: a straggler, a fabric, a slow machine.

The median over some steps is compared with the prediction, so that one slow step says nothing. A
deviation is told when it begins and when it ends, not at every step.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.model.config import LlamaConfig
from puna.plan.estimate import Estimate, estimate
from puna.plan.hardware import find_gpu
from puna.plan.runs import job_of_training
from puna.train.config import TrainingConfig

_COMMUNICATION = ("tensor", "context", "pipeline", "data")


def predict_training(
    cfg: TrainingConfig, model: LlamaConfig, n_ranks: int, dtype: str
) -> Estimate | None:
    """Price a training; None without ``[train.*.predict]``.

    Args:
        cfg: The training.
        model: Its shape.
        n_ranks: Ranks that it runs on, which may be fewer than it began with.
        dtype: Of its products, ``float32`` or ``bfloat16``.

    Raises:
        PunaError: The hardware or the layout is not known to the planner.
    """
    if cfg.predict is None:
        return None
    gpu = find_gpu(cfg.predict.hardware)
    config = {**cfg.model_dump(mode="json"), "nproc": n_ranks}
    return estimate(job_of_training(config, model, gpu, dtype))


def check_prediction(cfg: TrainingConfig, model: LlamaConfig) -> None:
    """Find a bad ``[train.*.predict]`` before any process is started.

    Raises:
        PunaError: See :func:`predict_training`.
    """
    dtype = {"fp32": "float32"}.get(cfg.precision, "bfloat16")
    try:
        predict_training(cfg, model, cfg.nproc, dtype)
    except PunaError as error:
        raise PunaError(
            f"predict.hardware = {cfg.predict and cfg.predict.hardware!r}: {error.message}",
            error.fix,
        ) from error


class PredictionWatch:
    """Compares steps with the prediction; rank 0 only.

    Args:
        found: The prediction; None watches nothing.
        cfg: The training.
        events: Ledger.
        attempt: Number of the attempt.
    """

    def __init__(
        self, found: Estimate | None, cfg: TrainingConfig, events: Ledger, attempt: int
    ) -> None:  # fmt: skip
        self._found, self._settings, self._events = found, cfg.predict, events
        self._attempt, self._tokens_per_step = attempt, cfg.tokens_per_step
        self._seen: deque[dict[str, float]] = deque()
        self._is_first, self._deviates = True, False
        if found is not None and cfg.predict is not None:
            events.emit(
                "train.predicted", attempt=attempt, step_s=found.step_s.mid,
                low_s=found.step_s.low, high_s=found.step_s.high, hardware=cfg.predict.hardware,
                tolerance=cfg.predict.tolerance,
            )  # fmt: skip

    def see(self, step: int, values: dict[str, Any]) -> None:
        """Take the values of a ``train.step`` event."""
        if self._found is None or self._settings is None:
            return
        n_steps, rest = divmod(values["tokens"], self._tokens_per_step)
        if self._is_first or rest or not n_steps:  # building caches, or a step of a batch ramp
            self._is_first = False
            return
        self._seen.append({**_times(values), "n": n_steps})
        while sum(one["n"] for one in self._seen) - self._seen[0]["n"] >= self._settings.over:
            self._seen.popleft()
        if sum(one["n"] for one in self._seen) < self._settings.over:
            return
        self._compare(step, self._found.step_s.mid, self._settings.tolerance)

    def _compare(self, step: int, predicted_s: float, tolerance: float) -> None:
        actual = {name: median(one[name] for one in self._seen) for name in self._seen[0]}
        ratio = actual["step_s"] / predicted_s
        deviates = abs(ratio - 1) > tolerance
        if deviates == self._deviates:
            return
        self._deviates = deviates
        self._events.emit(
            "train.deviation" if deviates else "train.deviation_over", attempt=self._attempt,
            step=step, predicted_s=predicted_s, actual_s=actual["step_s"], ratio=ratio,
            tolerance=tolerance, suspect=self._suspect(actual, predicted_s) if ratio > 1 else "",
        )  # fmt: skip

    def _suspect(self, actual: dict[str, float], predicted_s: float) -> str:
        """Name the part that most of the excess is in, if one is."""
        assert self._found is not None
        excess_s = actual["step_s"] - predicted_s
        waiting_s = sum(self._found.parts[name].mid for name in _COMMUNICATION)
        if actual["data_s"] > excess_s / 2:
            return "data"
        if actual["communication_s"] - waiting_s > excess_s / 2:
            return "communication"
        return "computation"


def _times(values: dict[str, Any]) -> dict[str, float]:
    return {name: values.get(name, 0.0) for name in ("step_s", "data_s", "communication_s")}
