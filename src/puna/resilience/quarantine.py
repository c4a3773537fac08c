"""Nodes that are not trusted: a durable file with their faults (strikes) and where they stand.

Two faults within a day put a node into quarantine, wrong answers where the right ones are known do
so at once. A node in quarantine is tested (burn-in) and comes back or stays out. Several runs may
share the file: every change is made under a lock, on what the file then holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from puna.core.errors import PunaError
from puna.core.fsio import write_json

QUARANTINE_FILE = "quarantine.json"


@dataclass(frozen=True)
class Strike:
    """A fault that a node is blamed for."""

    node: str
    fault: str
    step: int
    t_wall_s: float
    is_certain: bool = False
    """The node itself is to blame for certain: it gave wrong answers."""


@dataclass(frozen=True)
class Standing:
    """Where a node stands."""

    state: Literal["good", "quarantined", "rejected"] = "good"
    times: int = 0
    """How often it was put into quarantine."""
    why: str = ""
    t_wall_s: float = 0.0

    @property
    def is_out(self) -> bool:
        """Whether it is not used where it can be done without."""
        return self.state != "good"


@dataclass(frozen=True)
class Record:
    """What the file holds."""

    strikes: tuple[Strike, ...] = ()
    standings: dict[str, Standing] = field(default_factory=dict)

    def standing(self, node: str) -> Standing:
        """Where a node stands; a node that nothing is known of is good."""
        return self.standings.get(node, Standing())

    def strikes_of(self, node: str) -> list[Strike]:
        """Faults of a node, oldest first."""
        return [strike for strike in self.strikes if strike.node == node]


class Quarantine:
    """The file and its rules.

    Args:
        path: Of the file; its folder is made when something is written.
        n_strikes: So many within the window put a node into quarantine.
        window_s: Seconds after which a strike is forgotten.
        now: Wall clock, in seconds.
    """

    def __init__(
        self,
        path: Path,
        n_strikes: int = 2,
        window_s: float = 86400.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path, self._n_strikes, self._window_s, self._now = path, n_strikes, window_s, now

    def read(self) -> Record:
        """Return what is known.

        Raises:
            PunaError: The file is not one of these.
        """
        return read_record(self.path)

    def strike(self, node: str, fault: str, step: int, *, is_certain: bool = False) -> bool:
        """Write a fault down.

        Args:
            node: Name of the node.
            fault: What happened, in a few words.
            step: Step at which.
            is_certain: Quarantine at once.

        Returns:
            Whether this puts the node into quarantine.
        """
        with self._changing() as box:
            record, now_s = box[0], self._now()
            strike = Strike(node, fault, step, now_s, is_certain)
            kept = [one for one in record.strikes if now_s - one.t_wall_s <= self._window_s]
            n_own = 1 + sum(one.node == node for one in kept)
            before = record.standing(node)
            is_new = not before.is_out and (is_certain or n_own >= self._n_strikes)
            standings = dict(record.standings)
            if is_new:
                why = f"{fault} at step {step}" + ("" if is_certain else f", fault {n_own}")
                standings[node] = Standing("quarantined", before.times + 1, why, now_s)
            box[0] = Record((*kept, strike), standings)
        return is_new

    def passed(self, node: str) -> None:
        """A node has passed its burn-in; one more strike within the window, and it is out again."""
        self._stand(node, "good", "passed its burn-in")

    def failed(self, node: str, tests: list[str]) -> None:
        """A node has failed its burn-in and stays out until somebody removes its entry."""
        self._stand(node, "rejected", f"failed: {', '.join(tests)}")

    def _stand(self, node: str, state: Literal["good", "rejected"], why: str) -> None:
        with self._changing() as box:
            before = box[0].standing(node)
            now = replace(before, state=state, why=why, t_wall_s=self._now())
            box[0] = Record(box[0].strikes, {**box[0].standings, node: now})

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Record]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file's closing
            box = [read_record(self.path)]
            yield box
            write_json(self.path, asdict(box[0]))


def read_record(path: Path) -> Record:
    """Read the file; a missing one knows nothing.

    Raises:
        PunaError: It is not one of these.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Record(
            tuple(Strike(**one) for one in values["strikes"]),
            {name: Standing(**one) for name, one in values["standings"].items()},
        )
    except FileNotFoundError:
        return Record()
    except (ValueError, TypeError, KeyError) as error:
        raise PunaError(
            f"{path} does not say which nodes are in quarantine ({error})", "remove the file"
        ) from error
