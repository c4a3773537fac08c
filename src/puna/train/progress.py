"""The progress of a training, read from the ledger: it goes on over restarts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from puna.core.ledger import Ledger, LedgerTail
from puna.core.progress import Bar, progress, say
from puna.core.units import format_rate
from puna.resilience.history import read_history
from puna.resilience.straggler import slow_in_words
from puna.train.predict_config import deviation_in_words
from puna.train.spec import JobSpec


class TrainProgress:
    """A progress bar over the tokens of a job, with loss and speed.

    Args:
        name: Shown at the start of the line.
        spec: The job.
        events: Its ledger.
    """

    def __init__(self, name: str, spec: JobSpec, events: Ledger) -> None:
        self._job = spec.job
        self._tokens_before = spec.training.tokens_before
        self._steps_done = read_history(events.path, spec.job).steps_done
        self._tail = LedgerTail(events.path)
        self._manager: AbstractContextManager[Bar] = progress(
            name,
            total=self._tokens_before(spec.training.n_steps),
            unit="tokens",
            initial=self._tokens_before(self._steps_done),
        )
        self._bar: Bar | None = None

    def __enter__(self) -> TrainProgress:
        self._bar = self._manager.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.__exit__(kind, error, trace)

    def update(self) -> None:
        """Read what the ledger has got since the last call."""
        for event in self._tail.read():
            if event.get("job") != self._job:
                continue
            _tell(event)
            if event["kind"] != "train.step":
                continue
            n_new = event["step"] + 1 - self._steps_done
            if n_new > 0 and self._bar is not None:
                before = self._tokens_before(self._steps_done)
                self._steps_done += n_new
                note = (
                    f"loss {event['loss']:.3f}, {format_rate(event['tokens_per_s'], 'tok')}, "
                    f"MFU {event['mfu']:.0%}"
                )
                self._bar.advance(self._tokens_before(self._steps_done) - before, note)


def _tell(event: dict[str, Any]) -> None:
    if event["kind"] == "train.log_failed":
        say(
            ("warning: ", "yellow"),
            f"{event['target']} gets no more numbers, the training goes on: {event['why']}",
        )
    elif event["kind"] == "health.warning":
        say(("warning: ", "yellow"), f"node {event['node']}: {event['message']}")
    elif event["kind"] == "straggler.detected":
        say(("  slow", "yellow"), f": {slow_in_words(event)}")
    elif event["kind"] in ("train.deviation", "train.deviation_over"):
        say(("  pace", "yellow"), f": {deviation_in_words(event)}")
    elif event["kind"] == "preflight.done":
        for disk in event["disks"].values():
            if "warning" in disk:
                say(("warning: ", "yellow"), disk["warning"])
    elif event["kind"] == "train.anomaly":
        what = f"{event['seen']}; {event['action'].replace('_', ' ')}: {event['result']}"
        say(("  anomaly", "yellow"), f": step {event['step']}: {what}")
