"""Which nodes a training uses: healthy ones first, spares for lost ones, fewer where it must.

A *place* is a node, or on one machine the place of a rank (its GPU). Node 0 leads, so it is always
in use. What nodes are blamed for is in :mod:`puna.resilience.quarantine`. Imports no torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from puna.core.errors import PunaError
from puna.core.ledger import Ledger, LedgerTail, read_events
from puna.core.progress import say
from puna.resilience.burn_in import BurnIn
from puna.resilience.heartbeat import read_heartbeats
from puna.resilience.quarantine import QUARANTINE_FILE, Quarantine, Record
from puna.resilience.supervisor import Fault
from puna.train.elastic import allowed_ranks, ranks_per_place
from puna.train.nodes import BurnInOrder, Leader, node_name
from puna.train.spec import JobSpec

CREW = "attempt.crew"
"""Event: the places that an attempt has."""
_BLAMED = ("killed", "hang", "preflight")
"""Faults whose rank's node is to blame; of a test of the machine itself for certain."""
_LOOK_S = 0.5


@dataclass(frozen=True)
class Place:
    """A node, or the place of a rank on the only one.

    Attributes:
        number: Of the node, or of the place.
        name: By which it is known in the quarantine.
    """

    number: int
    name: str


@dataclass(frozen=True)
class Crew:
    """The places of an attempt; node 0 first."""

    places: tuple[Place, ...]
    n_ranks: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the places."""
        return tuple(place.number for place in self.places)


class Fleet:
    """Chooses the places of each attempt and keeps account of them.

    Args:
        spec: The job.
        leader: Of the nodes; None on one machine.
        run: Folder of the run.
    """

    def __init__(self, spec: JobSpec, leader: Leader | None, run: Path) -> None:
        cfg = spec.training
        self._spec, self._leader, self._launch = spec, leader, cfg.launch
        self._events = Ledger(spec.ledger, job=spec.job, **spec.common)
        self._rules = rules = cfg.restart.quarantine
        folder = Path(rules.folder).expanduser() if rules.folder else run
        self._quarantine = Quarantine(
            folder / QUARANTINE_FILE, rules.strikes, 3600.0 * rules.window_h
        )
        self._allowed = allowed_ranks(cfg, spec.model)
        self._per_place = ranks_per_place(cfg)
        self._tests: dict[str, BurnIn] = {}
        self._crew: Crew | None = None
        self._checkpoints: LedgerTail | None = None
        self._looked_s = 0.0
        self._used_anyway: set[str] = set()
        self._blamed: set[str] = set()
        self._furthest = 0

    @property
    def n_ranks(self) -> int:
        """Ranks of the attempt that runs, or of a first one."""
        return self._crew.n_ranks if self._crew is not None else self._spec.training.nproc

    def choose(self, attempt: int) -> Crew:
        """Choose the places of an attempt; tell when the number of ranks changes.

        Raises:
            PunaError: Too few nodes have signed on.
        """
        record, before = self._quarantine.read(), self._crew
        lost: list[Place] = []
        if self._leader is not None and self._can_choose:
            self._gather(self._leader, record, is_first=before is None)
            here = {place.number for place in self._here()}
            lost = [one for one in before.places if one.number not in here] if before else []
        crew = self._best(record)
        self._tell(attempt, before, crew, record, lost)
        self._crew, self._checkpoints = crew, None
        return crew

    def preview(self) -> Crew:
        """Return the places that the next attempt has if nothing changes."""
        return self._best(self._quarantine.read()) if self._leader is None else Crew((), 0)

    def blame(self, fault: Fault, attempt: int) -> bool:
        """Write down whose fault it was.

        Returns:
            Whether a node went into quarantine for it and the next attempt goes without it: the
            same failure then may not come again.
        """
        crew = self._crew
        if fault.what == "user" or crew is None:
            return False
        self._furthest = max(self._furthest, fault.step)
        where = self._places_of_ranks(attempt, crew)
        blamed = dict.fromkeys(self._corrupting(attempt), "silent corruption (persistent)")
        if not blamed and fault.what in _BLAMED and fault.rank is not None:
            blamed = {fault.rank: fault.what}
        went: set[str] = set()
        for rank, what in blamed.items():
            place = where.get(rank)
            if place is not None:
                self._blamed.add(place.name)
                if self._strike(place, what, fault.step, is_certain=what not in ("killed", "hang")):
                    went.add(place.name)
        return self._can_choose and any(
            place.name in went and not self._leads(place) for place in crew.places
        )

    def wants_restart(self) -> str | None:
        """Look after nodes that are not in use.

        Returns:
            Why the attempt should end now, right after a checkpoint: with another one the training
            has more ranks. None to go on.
        """
        if self._crew is None or time.monotonic() - self._looked_s < _LOOK_S:
            return None
        self._looked_s = time.monotonic()
        record = self._burn_in(self._quarantine.read())
        if not self._spec.training.restart.grow or self._crew.n_ranks == self._allowed[0]:
            return None
        n_ranks = self._best(record).n_ranks
        if n_ranks <= self._crew.n_ranks:
            self._checkpoints = None
            return None
        if self._checkpoints is None:
            self._checkpoints = LedgerTail(self._spec.ledger)
        steps = [
            event["step"] for event in self._checkpoints.read()
            if event.get("kind") == "train.checkpoint" and event.get("job") == self._spec.job
        ]  # fmt: skip
        if steps and max(steps) < self._spec.training.n_steps:
            return f"{self._crew.n_ranks} ranks become {n_ranks} after the checkpoint"
        return None

    def close(self) -> None:
        """End tests that run."""
        for test in self._tests.values():
            test.stop()
        self._tests.clear()

    @property
    def _can_choose(self) -> bool:
        return len(self._allowed) > 1 or self._launch.spares > 0

    def _all(self) -> list[Place]:
        """Places that there may be, with what they are called."""
        if self._leader is None:
            name = node_name()
            return [Place(i, f"{name}/{i}") for i in range(self._spec.training.nproc)]
        found: dict[str, Place] = {}
        for number in range(self._launch.nodes + self._launch.spares):
            state = self._leader.state(number)[0] if number else None
            name = node_name() if number == 0 else (state.name if state else "") or f"node-{number}"
            # Nodes may share a name; then it says which of them is meant.
            name = f"{name}#{number}" if name in found else name
            found[name] = Place(number, name)
        return list(found.values())

    def _here(self) -> list[Place]:
        """Places that can be used now."""
        if self._leader is None or not self._can_choose:
            return self._all()[: self._spec.training.nproc // self._per_place]
        timeout_s = self._launch.node_timeout_s
        return [
            place for place in self._all()
            if place.number == 0 or self._leader.answers(place.number, timeout_s)
        ]  # fmt: skip

    def _gather(self, leader: Leader, record: Record, *, is_first: bool) -> None:
        """Wait for nodes: at first for all that are wanted, later for those that may yet answer."""
        leader.call("stop", nodes=self._launch.nodes + self._launch.spares)
        wanted, fewest = (n // self._per_place for n in (self._allowed[0], self._allowed[-1]))
        begin_s, timeout_s = time.monotonic(), self._launch.node_timeout_s
        while True:
            here = self._here()
            waited_s = time.monotonic() - begin_s
            if self._n_good(here, record) >= wanted:
                return
            # At first all may yet sign on; later those that live, but have not answered yet.
            may_come = (is_first and len(here) < self._launch.nodes) or (
                waited_s <= timeout_s
                and (is_first or any(self._may_answer(leader, one) for one in self._all()[1:]))
            )
            if len(here) >= fewest and (not may_come or waited_s > self._launch.wait_s):
                return
            if waited_s > self._launch.wait_s:
                raise PunaError(
                    f"{len(here)} of {fewest} nodes have signed on within "
                    f"{self._launch.wait_s:.0f} s",
                    "start the same command on the others, lower restart.min_nproc, or raise "
                    "launch.wait_s",
                )
            time.sleep(0.05)

    def _may_answer(self, leader: Leader, place: Place) -> bool:
        timeout_s = self._launch.node_timeout_s
        state, silent_s = leader.state(place.number)
        lives = state is not None and silent_s <= timeout_s
        return lives and not leader.answers(place.number, timeout_s)

    def _n_good(self, here: list[Place], record: Record) -> int:
        """Count the places that are trusted, and the one that leads whether it is or not."""
        return sum(not record.standing(one.name).is_out or self._leads(one) for one in here)

    def _best(self, record: Record) -> Crew:
        """Choose among the places that are here: good ones, in the order of their numbers."""
        here, in_use = self._here(), self._crew.numbers if self._crew else ()

        def rank(place: Place) -> tuple[bool, int, bool, int]:
            worst = ("good", "quarantined", "rejected").index(record.standing(place.name).state)
            return not self._leads(place), worst, place.number not in in_use, place.number

        chosen = sorted(here, key=rank)
        n_good = self._n_good(here, record)
        sizes = [n // self._per_place for n in self._allowed]
        fitting = [n for n in sizes if n <= n_good]
        # It cannot do without those in quarantine: as few of them as it can.
        n_places = fitting[0] if fitting else sizes[-1]
        places = sorted(chosen[:n_places], key=lambda place: place.number)
        return Crew(tuple(places), n_places * self._per_place)

    def _tell(
        self, attempt: int, before: Crew | None, crew: Crew, record: Record, lost: list[Place]
    ) -> None:
        for place in lost:
            if place.name not in self._blamed:
                self._strike(place, "lost", self._furthest)
        self._blamed.clear()
        for place in crew.places:
            standing = record.standing(place.name)
            if standing.is_out and place.name not in self._used_anyway:
                self._used_anyway.add(place.name)
                self._events.emit("node.used_anyway", node=place.name, why=standing.why)
                say(("  warning", "yellow"), f": {place.name} is in quarantine ({standing.why}), "
                    "and the run cannot do without it")  # fmt: skip
            elif not standing.is_out:
                self._used_anyway.discard(place.name)
        was = before.n_ranks if before is not None else self._last_world()
        if was != crew.n_ranks:
            why = self._why(before, crew, record, lost)
            self._events.emit(
                "world.changed", durable=True, attempt=attempt, why=why,
                **{"from": was, "to": crew.n_ranks},
            )  # fmt: skip
            say(("  ranks", "bold"), f": {was} -> {crew.n_ranks}: {why}")
        self._events.emit(
            CREW, attempt=attempt, world=crew.n_ranks,
            unit="node" if self._leader is not None else "place",
            node_timeout_s=self._launch.node_timeout_s, quarantine=str(self._quarantine.path),
            places=[{"number": place.number, "name": place.name} for place in crew.places],
        )  # fmt: skip

    def _why(self, before: Crew | None, crew: Crew, record: Record, lost: list[Place]) -> str:
        """Say why the number of ranks changes."""
        reasons = [
            f"{place.name} {'is lost' if place in lost else 'is in quarantine'}"
            for place in (before.places if before is not None else self._all())
            if place not in crew.places and (place in lost or record.standing(place.name).is_out)
        ]
        if reasons:
            return "; ".join(reasons)
        back = [one.name for one in crew.places if before is not None and one not in before.places]
        return f"{', '.join(back)} can be used again" if back else "other nodes have signed on"

    def _leads(self, place: Place) -> bool:
        return self._leader is not None and place.number == 0

    def _last_world(self) -> int:
        """Ranks of the last attempt, of a call that was killed."""
        n_ranks = self._spec.training.nproc
        if self._spec.ledger is not None:
            for event in read_events(self._spec.ledger, CREW):
                if event.get("job") == self._spec.job:
                    n_ranks = event["world"]
        return n_ranks

    def _places_of_ranks(self, attempt: int, crew: Crew) -> dict[int, Place]:
        if self._leader is None:
            return dict(enumerate(crew.places))
        by_number = {place.number: place for place in crew.places}
        beats = read_heartbeats(self._spec.attempt_dir(attempt))
        return {beat.rank: by_number[beat.node] for beat in beats if beat.node in by_number}

    def _corrupting(self, attempt: int) -> list[int]:
        """Ranks that gave wrong answers again when asked again, in an attempt."""
        if self._spec.ledger is None:
            return []
        found: list[int] = []
        for event in read_events(self._spec.ledger, "attempt.start", "sdc.detected"):
            if event.get("job") != self._spec.job:
                continue
            if event["kind"] == "attempt.start":
                found = []
            elif event["cause"] == "persistent":
                found += event["ranks"]
        return sorted(set(found))

    def _strike(self, place: Place, fault: str, step: int, *, is_certain: bool = False) -> bool:
        is_out = self._quarantine.strike(place.name, fault, step, is_certain=is_certain)
        self._events.emit("node.strike", durable=True, node=place.name, fault=fault, step=step)
        if is_out:
            why = self._quarantine.read().standing(place.name).why
            self._events.emit("node.quarantined", durable=True, node=place.name, why=why)
            say(("  quarantine", "yellow"), f": {place.name}: {why}")
        return is_out

    def _burn_in(self, record: Record) -> Record:
        """Test nodes in quarantine that are not in use; tell what came out."""
        in_use = self._crew.numbers if self._crew is not None else ()
        waiting = [
            place for place in self._here()
            if place.number not in in_use and record.standing(place.name).state == "quarantined"
        ]  # fmt: skip
        orders: dict[int, BurnInOrder] = {}
        changed = False
        for place in waiting:
            times = record.standing(place.name).times
            orders[place.number] = BurnInOrder(times, times * self._rules.burn_in_s)
            failed = self._test(place, orders[place.number])
            if failed is None:
                continue
            changed = True
            if failed:
                self._quarantine.failed(place.name, failed)
                self._events.emit("node.rejected", durable=True, node=place.name, failed=failed)
                say(("  rejected", "red"), f": {place.name} failed {', '.join(failed)}")
            else:
                self._quarantine.passed(place.name)
                self._events.emit("node.returned", durable=True, node=place.name)
                say(("  returned", "green"), f": {place.name} has passed its tests")
        if self._leader is not None and (orders or changed):
            self._leader.order_tests(orders)
        return self._quarantine.read() if changed else record

    def _test(self, place: Place, order: BurnInOrder) -> list[str] | None:
        if self._leader is not None:
            state, _ = self._leader.state(place.number)
            is_done = state is not None and state.tested == order.number
            return list(state.failed) if state is not None and is_done else None
        if place.name not in self._tests:
            device = self._spec.training.device
            self._tests[place.name] = BurnIn(
                order.seconds, "cpu" if device == "cpu" else f"auto:{place.number}"
            )
        failed = self._tests[place.name].failed()
        if failed is not None:
            self._tests.pop(place.name).stop()
        return failed
