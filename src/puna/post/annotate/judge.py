"""The desk of reviewers and adjudicators: judging, blind, what others wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from puna.core.errors import PunaError
from puna.post.annotate.content import read_answer
from puna.post.annotate.desk import Desk, accept, move
from puna.post.annotate.settings import Role
from puna.post.annotate.store import Transaction
from puna.post.annotate.users import User

VERDICTS = ("accept", "return", "escalate")
STATE_OF: dict[str, Role] = {"review": "reviewer", "adjudication": "adjudicator"}
"""Waiting state of an item -> role that is needed to judge it."""


@dataclass(frozen=True)
class Case:
    """An item to judge; who wrote its responses is not told.

    Attributes:
        item: Number of the item.
        kind: See :data:`~puna.post.annotate.settings.KINDS`.
        state: ``review`` or ``adjudication``.
        round: Of the item.
        content: Messages, texts to rank, draft.
        responses: ``{id, answer, flags}`` of each, in an order that says nothing.
        history: ``{round, verdict, reason, note}`` of earlier reviews.
    """

    item: int
    kind: str
    state: str
    round: int
    content: dict[str, Any]
    responses: list[dict[str, Any]]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What a judge decides.

    Attributes:
        verdict: See :data:`VERDICTS`.
        response: Which response; None for an own answer of an adjudicator.
        reason: Reason code, for returns.
        note: Words for the author.
        answer: The adjudicator's own answer.
    """

    verdict: str
    response: int | None = None
    reason: str | None = None
    note: str = ""
    answer: dict[str, Any] | None = None


def next_case(desk: Desk, user: User, state: str = "review") -> Case | None:
    """Return an item to judge that the user has not worked on, and keep it for them for a while.

    Raises:
        PunaError: The user's role does not allow it.
    """
    _require(user, state)
    with desk.store.write() as tx:
        not_mine = (
            "NOT EXISTS (SELECT 1 FROM responses r WHERE r.item = items.id AND r.user = ?"
            " AND r.content IS NOT NULL)"
        )
        row = tx.one("SELECT * FROM items WHERE state = ? AND lease_user = ? LIMIT 1", state,
                     user.id) or tx.one(
            "SELECT * FROM items WHERE state = ? AND lease_s < ? AND "  # noqa: S608
            f"{not_mine} ORDER BY priority DESC, id LIMIT 1", state, tx.now_s, user.id,
        )  # fmt: skip
        if row is None:
            return None
        tx.run("UPDATE items SET lease_user = ?, lease_s = ? WHERE id = ?", user.id,
               tx.now_s + desk.rules.lease_s, row["id"])  # fmt: skip
    return case_of(desk, int(row["id"]))


def case_of(desk: Desk, item: int) -> Case:
    """Return what a judge may see of an item.

    Raises:
        PunaError: There is no such item.
    """
    row = desk.store.one("SELECT * FROM items WHERE id = ?", item)
    if row is None:
        raise PunaError(f"there is no item {item}", "go back to the queue")
    responses = desk.store.all(
        "SELECT id, content, flags FROM responses WHERE item = ? AND state = 'submitted'"
        " ORDER BY sha, id", item,
    )  # fmt: skip
    reviews = desk.store.all("SELECT * FROM reviews WHERE item = ? ORDER BY id", item)
    return Case(
        item, row["kind"], row["state"], row["round"], json.loads(row["content"]),
        [
            {"id": one["id"], "answer": json.loads(one["content"]),
             "flags": json.loads(one["flags"])}
            for one in responses
        ],
        [{name: one[name] for name in ("round", "verdict", "reason", "note")} for one in reviews],
    )  # fmt: skip


def judge(desk: Desk, user: User, item: int, given: Verdict) -> None:
    """Decide about an item: accept a response, return it to its author, hand it to a judge.

    Raises:
        PunaError: The role does not allow it, the user wrote a response, the item does not wait
            or somebody else judges it, or the verdict is not complete.
    """
    with desk.store.write() as tx:
        row = tx.one("SELECT * FROM items WHERE id = ?", item)
        if row is None or row["state"] not in STATE_OF:
            raise PunaError(f"item {item} does not wait for a verdict", "go to the next one")
        _require(user, row["state"])
        _refuse_authors(tx, user, item)
        if row["lease_user"] not in (None, user.id) and row["lease_s"] >= tx.now_s:
            raise PunaError(f"item {item} is judged by somebody else", "go to the next one")
        _check(desk, tx, row, given)
        tx.run(
            "INSERT INTO reviews (item, round, reviewer, kind, verdict, reason, note, response,"
            " at_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", item, row["round"], user.id,
            row["state"], given.verdict, given.reason, given.note, given.response, tx.now_s,
        )  # fmt: skip
        tx.event("judged", user.id, item, verdict=given.verdict, reason=given.reason,
                 note=given.note, response=given.response, round=row["round"])  # fmt: skip
        if given.verdict == "accept":
            answer = None
            if given.answer is not None:
                answer = read_answer(row["kind"], given.answer, desk.rules)
            accept(tx, row, given.response, user.id, answer)
        elif given.verdict == "escalate" or row["round"] >= desk.rules.max_rounds:
            move(tx, row, "adjudication", user.id, reason=given.reason)
        else:
            tx.run("UPDATE responses SET state = 'returned', round = ?, note = ?, text_sha = NULL"
                   " WHERE id = ?", row["round"] + 1, _words(given), given.response)  # fmt: skip
            move(tx, row, "returned", user.id, next_round=True, response=given.response,
                 reason=given.reason)  # fmt: skip


def _words(given: Verdict) -> str:
    return f"{given.reason}: {given.note}" if given.note else str(given.reason)


def _require(user: User, state: str) -> None:
    if not user.may(STATE_OF[state]):
        raise PunaError(f"{user.name} is {user.role}, {STATE_OF[state]} is needed", "ask an admin")


def _refuse_authors(tx: Transaction, user: User, item: int) -> None:
    if tx.one("SELECT 1 FROM responses WHERE item = ? AND user = ? AND content IS NOT NULL",
              item, user.id):  # fmt: skip
        raise PunaError(f"item {item} has a response of your own", "leave it to another reviewer")


def _check(desk: Desk, tx: Transaction, row: Any, given: Verdict) -> None:
    if given.verdict not in VERDICTS:
        raise PunaError(f"verdict {given.verdict!r} is unknown", f"one of {', '.join(VERDICTS)}")
    if row["state"] == "adjudication" and given.verdict != "accept":
        raise PunaError("an adjudicator decides", "accept a response or give your own answer")
    if given.answer is not None and row["state"] != "adjudication":
        raise PunaError("only adjudicators give answers of their own", "return it with a reason")
    if given.verdict == "return" and given.reason not in desk.rules.reasons:
        raise PunaError(
            f"reason {given.reason!r} is unknown", f"one of {', '.join(desk.rules.reasons)}"
        )
    needs = given.verdict == "return" or (given.verdict == "accept" and given.answer is None)
    if needs and not tx.one(
        "SELECT 1 FROM responses WHERE id = ? AND item = ? AND state = 'submitted'",
        given.response, row["id"],
    ):  # fmt: skip
        raise PunaError(f"{given.response!r} is no response of item {row['id']}", "choose one")
