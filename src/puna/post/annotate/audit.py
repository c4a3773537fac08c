"""Tells whether anything of a desk was changed behind its back."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from typing import NamedTuple

from puna.core.errors import PunaError
from puna.post.annotate.store import GENESIS, Store, event_hash, seal_of, sha_of


class Problem(NamedTuple):
    """Something that does not fit.

    Attributes:
        where: Event, item, response or version.
        what: In words.
    """

    where: str
    what: str


class Head(NamedTuple):
    """The last event: its number and its hash, worth writing down elsewhere."""

    seq: int
    hash: str


def head_of(store: Store) -> Head:
    """Return the end of the chain."""
    row = store.one("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1")
    return Head(0, GENESIS) if row is None else Head(row["seq"], row["hash"])


def read_anchor(text: str) -> Head:
    """Read ``NUMBER:HASH``, as an earlier audit printed it.

    Raises:
        PunaError: It is not of this form.
    """
    number, _, link = text.partition(":")
    if not number.isdigit() or len(link) != 64:
        raise PunaError(f"anchor {text[:80]!r} is not NUMBER:HASH", "copy it from an earlier audit")
    return Head(int(number), link)


def audit(store: Store, anchors: tuple[Head, ...] = ()) -> list[Problem]:
    """Check the chain of events, its end, and that the tables are what the events say.

    Changed, inserted, removed and reordered events break the chain. An end that was cut off, or a
    chain that was made anew as a whole, does not fit the seal (made with the key beside the
    file), nor an anchor written down earlier.

    Args:
        store: The desk's file.
        anchors: Ends of the chain that were written down.
    """
    wanted = {one.seq: one.hash for one in anchors}
    problems: list[Problem] = []
    folded = _Fold()
    previous, expected, last = GENESIS, 1, Head(0, GENESIS)
    for row in store.stream("SELECT * FROM events ORDER BY seq"):
        seq = row["seq"]
        if seq != expected:
            problems.append(Problem(f"event {expected}", f"is missing; event {seq} follows"))
        if row["previous"] != previous:
            problems.append(Problem(f"event {seq}", "does not follow from the event before"))
        link = event_hash(seq, row["at_s"], row["actor"], row["kind"], row["item"],
                          row["payload"], row["previous"])  # fmt: skip
        if link != row["hash"]:
            problems.append(Problem(f"event {seq}", "was changed"))
        if wanted.pop(seq, link) != row["hash"]:
            problems.append(Problem(f"event {seq}", "is not the one that was written down"))
        folded.add(row["kind"], row["item"], row["payload"])
        previous, expected, last = row["hash"], seq + 1, Head(seq, row["hash"])
    seal = store.meta("seal") or ""
    if not hmac.compare_digest(seal, seal_of(store.key, *last)):
        problems.append(
            Problem(f"event {last.seq}", "is not the end that was sealed: events are missing")
        )
    problems += [Problem(f"event {seq}", "was written down and is missing") for seq in wanted]
    return [*problems, *folded.compare(store)]


class _Fold:
    """The state of the tables as the events tell it."""

    def __init__(self) -> None:
        self.items: dict[int, str] = {}
        self.gold: dict[int, str | None] = {}
        self.states: dict[int, str] = {}
        self.responses: dict[int, str] = {}
        self.answers: dict[int, str] = {}
        self.versions: dict[str, str] = {}
        self.roles: dict[int, str] = {}
        self.n_judged = self.n_audited = 0

    def add(self, kind: str, item: int | None, payload: str) -> None:
        try:
            told = json.loads(payload)
            if kind == "imported" and item is not None:
                self.items[item], self.states[item] = told["sha"], "open"
                self.gold[item] = told["gold"]
            elif kind == "moved" and item is not None:
                self.states[item] = told["to"]
                if "answer" in told:
                    self.answers[item] = told["answer"]
            elif kind == "submitted":
                self.responses[told["response"]] = told["sha"]
            elif kind == "version.frozen":
                self.versions[told["name"]] = told["sha"]
            elif kind in ("user.added", "user.changed"):
                self.roles[told["user"]] = told["role"]
            self.n_judged += kind == "judged"
            self.n_audited += kind == "audited"
        except (ValueError, KeyError, TypeError):
            return  # a changed event, which the chain has told already

    def compare(self, store: Store) -> Iterator[Problem]:
        seen = 0
        for row in store.stream("SELECT id, content, state, answer, gold FROM items"):
            seen += 1
            where = f"item {row['id']}"
            if self.items.get(row["id"]) != sha_of(row["content"]):
                yield Problem(where, "has other content than was imported")
            if self.gold.get(row["id"]) != (row["gold"] and sha_of(row["gold"])):
                yield Problem(where, "has another gold answer than was imported")
            if self.states.get(row["id"]) != row["state"]:
                yield Problem(where, f"is {row['state']}, its events say otherwise")
            if row["answer"] and self.answers.get(row["id"]) != sha_of(row["answer"]):
                yield Problem(where, "has another answer than was accepted")
        if seen != len(self.items):
            yield Problem("items", f"{seen} are there, {len(self.items)} were imported")
        yield from self._compare_work(store)

    def _compare_work(self, store: Store) -> Iterator[Problem]:
        seen = 0
        for row in store.stream("SELECT id, content FROM responses WHERE content IS NOT NULL"):
            seen += 1
            if self.responses.get(row["id"]) != sha_of(row["content"]):
                yield Problem(f"response {row['id']}", "is not what was submitted")
        if seen != len(self.responses):
            yield Problem("responses", f"{seen} are there, {len(self.responses)} were submitted")
        for name, sha in self.versions.items():
            digest = hashlib.sha256()
            rows = "SELECT example FROM version_items WHERE version = ? ORDER BY id"
            for row in store.stream(rows, name):
                digest.update(row["example"].encode() + b"\n")
            if digest.hexdigest() != sha:
                yield Problem(f"version {name}", "is not what was frozen")
        for row in store.stream("SELECT id, name, role FROM users"):
            if self.roles.get(row["id"]) != row["role"]:
                yield Problem(f"user {row['name']}", f"is {row['role']} without an event")
        for table, n, column in (
            ("reviews", self.n_judged, "id"), ("audits", self.n_audited, "is_defect"),
        ):  # fmt: skip
            row = store.one(f"SELECT count({column}) AS n FROM {table}")  # noqa: S608
            if row is not None and row["n"] != n:
                yield Problem(table, f"{row['n']} are there, {n} events tell of one")
