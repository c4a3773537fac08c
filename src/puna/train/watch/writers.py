"""Numbers of a training to TensorBoard, Weights & Biases and MLflow.

A thread hands them over, so that a slow server slows no step. What goes wrong there is told once,
in the ledger, and ends that writer alone: no training stops because of a chart.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from puna.core.ledger import Ledger
from puna.train.log_config import LogConfig, Target

LOG_DIR = "log"
"""Folder, inside the output, of what the writers keep."""
_MOST_WAITING = 1000
_PATIENCE_S = 20.0
_PREFIX = "train"


class Writer(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step; an error ends this writer."""
        ...

    def close(self) -> None:
        """Hand over what is left."""
        ...


class TensorBoardWriter:
    """Event files; needs the package tensorboard and no TensorFlow.

    Args:
        folder: Where they go.
        first_step: Of this attempt: what an earlier one wrote from there on is hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._file = EventFileWriter(str(folder))
        proto: Any = event_pb2  # its classes are made when it is imported
        start = proto.SessionLog(status=proto.SessionLog.START)
        self._file.add_event(proto.Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one event."""
        from tensorboard.compat.proto import event_pb2

        event: Any = event_pb2.Event(wall_time=time.time(), step=step)  # type: ignore[attr-defined]
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._file.add_event(event)

    def close(self) -> None:
        """Write out and close the file."""
        self._file.close()


class WandbWriter:
    """A run of Weights & Biases; a restarted training goes on in the same run."""

    def __init__(self, config: LogConfig, folder: Path, job: str, settings: Any) -> None:
        import wandb  # type: ignore[import-not-found]

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project, id=job, name=config.name or job, resume="allow",
            dir=str(folder), mode="offline" if config.offline else None, config=settings,
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row; the step is a value of its own, since a restart repeats some."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowWriter:
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI or in files."""

    def __init__(self, config: LogConfig, folder: Path, job: str, settings: Any) -> None:
        from mlflow.tracking import MlflowClient  # type: ignore[import-not-found]

        uri = "" if config.offline else os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            folder.mkdir(parents=True, exist_ok=True)
            uri = folder.resolve().as_uri()
            # MLflow 3.7 and later refuse files unless they are asked for.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(config.project)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(config.project)
        )
        known = self._client.search_runs([experiment], f"tags.puna_job = '{job}'", max_results=1)
        if known:
            self._run = known[0].info.run_id
        else:
            tags = {"puna_job": job, "puna_settings": json.dumps(settings)[:5000]}
            made = self._client.create_run(experiment, tags=tags, run_name=config.name or job)
            self._run = made.info.run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log one batch of metrics."""
        from mlflow.entities import Metric  # type: ignore[import-not-found]

        now_ms = int(time.time() * 1000)
        self._client.log_batch(
            self._run, [Metric(name, value, now_ms, step) for name, value in values.items()]
        )

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


def open_writer(
    target: Target, config: LogConfig, folder: Path, job: str, settings: Any, first_step: int
) -> Writer:
    """Open one writer; its package is imported here."""
    if target == "tensorboard":
        return TensorBoardWriter(folder / target, first_step)
    make = WandbWriter if target == "wandb" else MlflowWriter
    return make(config, folder / target, job, settings)


class Writers:
    """All writers of a training; used on rank 0 only.

    Args:
        config: Which.
        out: The job's folder.
        job: Id of the job.
        settings: JSON values of the training, shown with the run.
        first_step: First step of this attempt.
        events: Ledger; receives ``train.log_failed`` when a writer ends early.
    """

    def __init__(
        self, config: LogConfig, out: Path, job: str, settings: Any, first_step: int, events: Ledger
    ) -> None:
        self._events = events
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_MOST_WAITING)
        self._is_full = False
        self._thread: threading.Thread | None = None
        if config.to:
            openers: dict[str, Callable[[], Writer]] = {
                target: partial(
                    open_writer, target, config, out / LOG_DIR, job, settings, first_step
                )
                for target in config.to
            }
            self._thread = threading.Thread(
                target=self._work, args=(openers,), daemon=True, name="puna-log"
            )
            self._thread.start()

    def __enter__(self) -> Writers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Hand over what is left; wait for a server only so long."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=_PATIENCE_S)
            self._thread.join(_PATIENCE_S)

    def put(self, step: int, values: Mapping[str, Any], prefix: str = _PREFIX) -> None:
        """Hand over the numbers of an event, nested ones as ``prefix/a/b``."""
        if self._thread is None or not self._thread.is_alive():
            return
        try:
            self._waiting.put_nowait((step, dict(_flat(prefix, values))))
        except queue.Full:
            if not self._is_full:
                self._is_full = True
                self._tell("all", f"{_MOST_WAITING} steps wait for it; from here on some are lost")

    def _work(self, openers: dict[str, Callable[[], Writer]]) -> None:
        open_now: dict[str, Writer] = {}
        for name, make in openers.items():
            with self._told(name, open_now):
                open_now[name] = make()
        while open_now and (item := self._waiting.get()) is not None:
            for name, writer in list(open_now.items()):
                with self._told(name, open_now):
                    writer.write(*item)
        for name, writer in list(open_now.items()):
            with self._told(name, open_now):
                writer.close()

    @contextlib.contextmanager
    def _told(self, name: str, open_now: dict[str, Writer]) -> Iterator[None]:
        """Let no error out: tell it and drop the writer."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 (whatever a chart's package raises)
            open_now.pop(name, None)
            self._tell(name, f"{type(error).__name__}: {error}"[:500])

    def _tell(self, name: str, why: str) -> None:
        with contextlib.suppress(OSError):
            self._events.emit("train.log_failed", target=name, why=why)


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield numbers with their names, nested ones joined by slashes."""
    for name, value in values.items():
        where = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            yield from _flat(where, value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield where, float(value)
