"""What is done about a fault: one table, read by people and by the code.

A rule names what notices a fault and what is tried, in order: each action is taken when the one
before did not help. The supervisor takes from it how often a failure may come again at one step;
a training takes from it what follows a number that cannot be right (there the recipe may say
otherwise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Action = Literal[
    "replay", "skip", "roll_back", "report", "heal", "mend", "restart", "quarantine", "keep", "stop"
]
"""``replay``: compute the step again. ``skip``: leave its update out. ``roll_back``: go on from an
earlier checkpoint, after bad numbers without the updates of some steps. ``report``: go on and say.
``heal``: take the state of a good replica. ``mend``: take the damaged shard from another place.
``restart``: end all processes and start them from the newest state. ``quarantine``: do without the
node. ``keep``: go on with the last good one. ``stop``: end the run with a message."""

Confidence = Literal["certain", "likely", "a guess"]
"""Whether what the detector saw can have another, harmless cause."""


@dataclass(frozen=True)
class Rule:
    """What is done about one kind of fault.

    Attributes:
        detector: Name of the fault in the ledger.
        sees: What is noticed, by whom.
        confidence: How sure it is that something is wrong.
        actions: What is tried, in order.
        most_times: How often the same failure may come at the same step before the run is stopped;
            None where it does not end an attempt.
        key: Where a recipe changes it; empty where it cannot.
    """

    detector: str
    sees: str
    confidence: Confidence
    actions: tuple[Action, ...]
    most_times: int | None = None
    key: str = ""


RULES = (
    Rule("killed", "a rank's process is gone without a word (supervisor)", "certain",
         ("restart", "quarantine", "stop"), 2, "restart.max_restarts"),
    Rule("hang", "no step for longer than steps take, or a stopped process (supervisor)", "likely",
         ("restart", "quarantine", "stop"), 1, "restart.hang_timeout_s, hang_floor_s"),
    Rule("crash", "a rank ended with an unexpected error", "certain", ("restart", "stop"), 1),
    Rule("exit", "the processes ended with an exit code and no reason", "certain",
         ("restart", "stop"), 1),
    Rule("preflight", "a test before the first step fails", "certain",
         ("restart", "quarantine", "stop"), 1),
    Rule("user", "bad input, a full disk, bad data: the same again after a restart", "certain",
         ("stop",), 0),
    Rule("not_finite", "the loss or the gradient's norm is no number", "certain",
         ("replay", "skip", "roll_back", "stop"), key="numbers.not_finite"),
    Rule("loss_spike", "the loss is far above those of the steps before", "a guess",
         ("replay", "report"), key="numbers.loss_spike"),
    Rule("grad_spike", "the gradient's norm is far above those of the steps before", "a guess",
         ("replay", "report"), key="numbers.grad_spike"),
    Rule("roll_back", "a training asks for an earlier state", "certain", ("restart", "stop"), 3,
         "numbers.max_roll_backs"),
    Rule("sdc state", "digests of a state differ among replicas, or from an update to the next",
         "certain", ("heal", "restart", "stop"), key="sdc.state"),
    Rule("sdc replay", "another rank computes another gradient of the same rows", "certain",
         ("replay", "quarantine", "stop"), key="sdc.replay_every"),
    Rule("sdc product", "the sums of a matrix product do not fit", "certain",
         ("replay", "quarantine", "stop"), key="sdc.products"),
    Rule("checkpoint", "a shard does not fit its hash", "certain", ("mend", "roll_back"),
         key="checkpoint"),
    Rule("save", "a checkpoint cannot be written", "certain", ("keep", "report"),
         key="checkpoint.on_failure"),
    Rule("data", "a token shard does not fit its hash", "certain", ("stop",), key="on_damage"),
    Rule("straggler", "a rank computes longer than the others for many steps", "likely",
         ("report",)),
    Rule("health", "memory or disk of a node run out, its clock jumps, it is slowed down, or "
         "memory, network or GPUs count errors", "likely", ("report",)),
)  # fmt: skip
"""The table; ``puna resilience policy`` prints it."""

_BY_NAME = {rule.detector: rule for rule in RULES}


def most_times(what: str) -> int:
    """Return how often one failure may come at one step before a restart is called hopeless.

    An error that comes again at its step has its cause there. A kill says nothing of why: two in a
    row may be two bad nodes; the third at one step is most likely the memory that the step needs.
    """
    rule = _BY_NAME.get(what)
    return 1 if rule is None or rule.most_times is None else rule.most_times


def actions_of(detector: str) -> Sequence[Action]:
    """Return what the table does about a detector's finding, in order."""
    return _BY_NAME[detector].actions
