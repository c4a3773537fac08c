"""How far each annotator can be relied on, from all votes and from gold, and what follows."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from puna.post.annotate import aggregate, rounds
from puna.post.annotate.content import labels_of, vote_of
from puna.post.annotate.desk import Desk, move, raise_overlap
from puna.post.annotate.intervals import Interval
from puna.post.annotate.store import to_json

SMOOTHING = 4.0
"""Votes added to each row of a confusion matrix (ours): few votes prove nothing."""


@dataclass(frozen=True)
class Measured:
    """What is known of one annotator on one kind of items.

    Attributes:
        user: Number of the user.
        kind: Kind of the items.
        status: See :func:`~puna.post.annotate.rounds.status_of`.
        n_votes: Votes given.
        informedness: With its bounds.
        n_gold: Gold items answered.
        n_right: Of them right.
    """

    user: int
    kind: str
    status: rounds.Status
    n_votes: int
    informedness: Interval
    n_gold: int
    n_right: int


def refresh(desk: Desk) -> list[Measured]:
    """Estimate the reliability of all annotators anew and act on it.

    Doubtful annotators' items that nobody has judged yet get one more annotator each; spammers get
    no more items (their votes weigh next to nothing by their confusion matrices).
    """
    found = [one for kind in ("label", "rank", "write") for one in _measure(desk, kind)]
    for one in found:
        if one.status in ("doubtful", "spam"):
            _more_overlap(desk, one)
    return found


def _measure(desk: Desk, kind: str) -> list[Measured]:
    labels = labels_of(kind, desk.rules)
    rows = desk.store.all(
        "SELECT r.item, r.user, r.vote, i.gold FROM responses r JOIN items i ON i.id = r.item"
        " WHERE i.kind = ? AND r.vote IS NOT NULL AND r.state = 'submitted'", kind,
    )  # fmt: skip
    rows = [row for row in rows if row["vote"] in labels]
    if not rows:
        return []
    items = {item: at for at, item in enumerate(dict.fromkeys(row["item"] for row in rows))}
    users = {user: at for at, user in enumerate(dict.fromkeys(row["user"] for row in rows))}
    known = np.full(len(items), -1)
    n_gold, n_right = np.zeros((2, len(users)), int)
    for row in rows:
        if row["gold"] is not None:
            gold = vote_of(kind, json.loads(row["gold"]))
            known[items[row["item"]]] = labels.index(gold) if gold in labels else -1
            n_gold[users[row["user"]]] += 1
            n_right[users[row["user"]]] += row["vote"] == gold
    votes = aggregate.Votes(
        np.array([items[row["item"]] for row in rows]),
        np.array([users[row["user"]] for row in rows]),
        np.array([labels.index(row["vote"]) for row in rows]),
        len(items), len(users), len(labels),
    )  # fmt: skip
    model = aggregate.dawid_skene(votes, tolerance=1e-4, smoothing=SMOOTHING, known=known)
    intervals = aggregate.informedness_intervals(model)
    n_votes = np.bincount(votes.annotator, minlength=len(users))
    found = []
    rules = desk.rules
    with desk.store.write() as tx:
        for user, at in users.items():
            n = int(n_votes[at])
            status = rounds.status_of(intervals[at], n, rules.min_votes, rules.trust, rules.spam)
            one = Measured(user, kind, status, n, intervals[at], int(n_gold[at]), int(n_right[at]))
            before = tx.one("SELECT status FROM reliability WHERE user = ? AND kind = ?", user,
                            kind)  # fmt: skip
            tx.run("INSERT OR REPLACE INTO reliability VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", user,
                   kind, status, n, *intervals[at], one.n_gold, one.n_right,
                   to_json(model.confusion[at].round(6).tolist()))  # fmt: skip
            if before is None or before["status"] != status:
                tx.event("reliability", None, user=user, about=kind, status=status, n_votes=n,
                         low=round(intervals[at].low, 4),
                         high=round(intervals[at].high, 4))  # fmt: skip
            found.append(one)
    return found


def _more_overlap(desk: Desk, one: Measured) -> None:
    with desk.store.write() as tx:
        rows = tx.run(
            "SELECT i.* FROM items i JOIN responses r ON r.item = i.id WHERE r.user = ? AND"
            " r.state = 'submitted' AND i.kind = ? AND i.gold IS NULL AND i.overlap < ? AND"
            " i.priority = 0 AND (i.state = 'open' OR (i.state = 'review' AND i.round = 1 AND"
            " i.lease_s < ?))",
            one.user, one.kind, desk.rules.max_overlap, tx.now_s,
        ).fetchall()  # fmt: skip
        for row in rows:
            raise_overlap(tx, row, "a doubtful annotator")
            if row["state"] == "review":
                move(tx, row, "open", None, reason="a doubtful annotator")
