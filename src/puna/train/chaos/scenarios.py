"""The faults of the suite: what is done, what must be noticed and how soon, how it must end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from puna.resilience.processes import parent_of
from puna.train.chaos.subject import EVERY, Subject
from puna.train.checkpoint.manifest import MANIFEST_FILE
from puna.train.spec import CHECKPOINTS_DIR, STATE_DIR, JobSpec
from puna.train.spec import JOB_FILE as SPEC_FILE

_LATE = 2 * EVERY + 2
"""A step before which two checkpoints are committed."""


@dataclass(frozen=True)
class Scenario:
    """One fault, or several.

    Attributes:
        name: Short, for the command line.
        fault: What happens.
        expected: What must follow.
        inject: Does it, and comes back when it is done.
        detect_s: The supervisor must notice within so many seconds; None where it dies itself.
        tier: Where the state must come from (``memory``, ``disk``); None where either is right.
        ends: ``same``: like the run without a fault. ``stopped``: with one message, after two
            attempts.
        bad_step: Step whose data are broken.
        is_replicated: Whether every rank has the whole state, so that what one has can be healed.
        training: What the training's configuration has beside, such as a fault inside a step.
    """

    name: str
    fault: str
    expected: str
    inject: Callable[[Subject], None]
    detect_s: float | None = 1.0
    tier: str | None = None
    ends: Literal["same", "stopped"] = "same"
    bad_step: int = -1
    is_replicated: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)


def _kill_rank(subject: Subject) -> None:
    subject.hurt(subject.random.choice(subject.at_step(_LATE)).pid)


def _kill_all_ranks(subject: Subject) -> None:
    for beat in subject.at_step(_LATE):
        subject.hurt(beat.pid)


def _kill_agent(subject: Subject) -> None:
    subject.hurt(parent_of(subject.at_step(_LATE)[0].pid))


def _kill_supervisor(subject: Subject) -> None:
    subject.at_step(_LATE)
    subject.end()
    subject.start()


def _preempt(subject: Subject) -> None:
    subject.at_step(_LATE)
    subject.end(signal.SIGTERM)
    subject.start()


def _freeze_rank(subject: Subject) -> None:
    beat = subject.random.choice(subject.at_step(_LATE))
    subject.hurt(beat.pid, signal.SIGSTOP)


def _kill_while_restarting(subject: Subject) -> None:
    _kill_rank(subject)
    subject.hurt(subject.random.choice(subject.next_attempt(1, "start")).pid)


def _kill_twice(subject: Subject) -> None:
    _kill_rank(subject)
    subject.hurt(subject.random.choice(subject.next_attempt(1, "step")).pid)


def _kill_while_saving(subject: Subject) -> None:
    subject.at_step(EVERY)
    folder = subject.out / CHECKPOINTS_DIR
    subject.until(lambda: list(folder.glob(".*.partial")))
    for beat in subject.beats():
        subject.hurt(beat.pid)


def _lose_machine(subject: Subject) -> None:
    subject.at_step(_LATE)
    subject.go_down()
    subject.start()


def _damage(change: Callable[[Path], None]) -> Callable[[Subject], None]:
    """Lose the machine, damage the newest checkpoint, start again."""

    def inject(subject: Subject) -> None:
        subject.at_step(_LATE)
        subject.until(lambda: subject.newest_checkpoint().name.endswith(f"{2 * EVERY:08d}"))
        subject.go_down()
        change(subject.newest_checkpoint())
        subject.start()

    return inject


def _flip_bit(path: Path) -> None:
    with path.open("r+b") as file:
        at = path.stat().st_size * 3 // 4
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def _shards(checkpoint: Path) -> list[Path]:
    """Return the files of tensors, the largest first."""
    return sorted(checkpoint.glob("*.safetensors"), key=lambda p: (-p.stat().st_size, p.name))


def _truncate(checkpoint: Path) -> None:
    path = _shards(checkpoint)[0]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _zero_page(checkpoint: Path) -> None:
    path = _shards(checkpoint)[0]
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


def _swap(checkpoint: Path) -> None:
    first, second = _shards(checkpoint)[:2]
    aside = first.with_suffix(".aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def _flip_snapshots(subject: Subject) -> None:
    subject.at_step(_LATE)
    subject.end()
    memory = JobSpec.read(subject.out / STATE_DIR / SPEC_FILE).memory_dir
    assert memory is not None
    for path in memory.rglob("*"):
        if path.is_file():
            _flip_bit(path)
    subject.start()


def _nothing(subject: Subject) -> None:
    """Leave it alone: its data are bad, or it hurts itself."""


def _inside(what: str) -> dict[str, Any]:
    """Configure a fault inside a step, and a comparison with few steps."""
    return {
        "fault": {"rank": 0, "step": _LATE, "what": what}, "numbers": {"window": EVERY},
    }  # fmt: skip


def layout_of(is_replicated: bool, n_ranks: int) -> dict[str, Any]:
    """Return the part of a training's configuration that says who has which part of the state."""
    return {"parallel": {"replicate": n_ranks}} if is_replicated else {}


def _corrupted(what: str) -> dict[str, Any]:
    """Configure silent corruption inside a step, and the checks that find it."""
    checks = {"state": True, "at_rest": "always", "replay_every": 1, "products": True}
    return {"fault": {"rank": 1, "step": _LATE, "what": what}, "sdc": checks}


SAME = "the same loss, gradient norm and weights, bit by bit"
_OLDER = f"the damage is found; an older checkpoint; {SAME}"
SCENARIOS = (
    Scenario("kill-rank", "kill -9 of a rank", f"restart from memory; {SAME}", _kill_rank,
             tier="memory"),
    Scenario("kill-all-ranks", "kill -9 of all ranks", f"restart from memory; {SAME}",
             _kill_all_ranks, tier="memory"),
    Scenario("kill-agent", "kill -9 of the node's agent", f"no orphan; restart; {SAME}",
             _kill_agent, tier="memory"),
    Scenario("kill-supervisor", "kill -9 of the coordinator, called again",
             f"no orphan; goes on from memory; {SAME}", _kill_supervisor, None, "memory"),
    Scenario("preempt", "SIGTERM to the whole run, called again", f"goes on from memory; {SAME}",
             _preempt, None, "memory"),
    Scenario("freeze-rank", "SIGSTOP of a rank", f"noticed as a hang; restart; {SAME}",
             _freeze_rank, 3.0, "memory"),
    Scenario("kill-restarting", "kill -9 of a rank, and of one that is starting again",
             f"two restarts; {SAME}", _kill_while_restarting),
    Scenario("kill-twice", "kill -9 of a rank, and of one as soon as it steps again",
             f"two restarts; {SAME}", _kill_twice),
    Scenario("kill-saving", "kill -9 of all ranks while a checkpoint is written",
             f"the unfinished one is no checkpoint; {SAME}", _kill_while_saving),
    Scenario("lose-machine", "all processes and all memory gone, called again",
             f"goes on from disk; {SAME}", _lose_machine, None, "disk"),
    Scenario("flip-bit", "one bit of the newest checkpoint flipped, memory gone",
             _OLDER,
             _damage(lambda folder: _flip_bit(_shards(folder)[0])), None, "disk"),
    Scenario("zero-page", "4 KiB of the newest checkpoint zeroed, memory gone",
             _OLDER, _damage(_zero_page), None, "disk"),
    Scenario("truncate", "a file of the newest checkpoint cut in half, memory gone",
             _OLDER, _damage(_truncate), None, "disk"),
    Scenario("swap-shards", "two files of the newest checkpoint exchanged, memory gone",
             _OLDER, _damage(_swap), None, "disk"),
    Scenario("torn-checkpoint", "the manifest of the newest checkpoint lost, memory gone",
             f"it is no checkpoint; an older one; {SAME}",
             _damage(lambda folder: (folder / MANIFEST_FILE).unlink()), None, "disk"),
    Scenario("flip-snapshots", "a bit flipped in every snapshot in memory",
             f"no snapshot is believed; disk; {SAME}", _flip_snapshots, None, "disk"),
    Scenario("bad-data", "the data of a step always raise an error",
             "two attempts, then one message and exit code 2", _nothing, ends="stopped",
             bad_step=_LATE, detect_s=None),
    Scenario("nan", "a gradient of one rank is no number, once",
             f"the step is computed again; {SAME}", _nothing, training=_inside("nan")),
    Scenario("spike", "the gradients of one rank are a million times too large, once",
             f"the step is computed again; {SAME}", _nothing, training=_inside("spike")),
    *(
        Scenario(f"flip-{site}", f"one bit flipped in {where} of one rank",
                 f"found in the same step and mended; {SAME}", _nothing, is_replicated=True,
                 training=_corrupted(f"flip-{site}"))
        for site, where in (
            ("weight", "the weights"), ("optimizer", "the optimiser's state"),
            ("gradient", "the summed gradients"), ("activation", "what a layer gives"),
            ("data", "the batch"),
        )
    ),
    Scenario("stuck", "a layer of one rank gives wrong values from a step on",
             f"the rank is named; restart; {SAME}", _nothing, is_replicated=True,
             training=_corrupted("stuck")),
    Scenario("cut", "the connections of one rank end", f"restart from memory; {SAME}", _nothing,
             tier="memory", training=_inside("cut")),
    Scenario("memory", "a rank asks for more memory than there is",
             f"restart from memory; {SAME}", _nothing, tier="memory",
             training=_inside("memory")),
    Scenario("full-disk", "a checkpoint cannot be written",
             f"it is told, the run goes on with the one before; {SAME}", _nothing,
             training=_inside("full-disk")),
    Scenario("slow", "a rank computes longer from a step on, by twice what its steps took",
             f"it is named; {SAME}", _nothing, detect_s=20.0, training=_inside("slow")),
)  # fmt: skip
