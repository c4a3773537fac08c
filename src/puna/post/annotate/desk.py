"""The desk of annotators: what to do next, drafts, submitting, taking back.

States of an item: ``open`` (wants responses), ``review``, ``returned`` (to an author, with a
reason), ``adjudication``, ``accepted``, ``frozen``. Of a response: ``claimed``, ``submitted``,
``returned``, ``skipped``, ``released``. All of it also stands in the events.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from puna.core.errors import PunaError
from puna.post.annotate import checks, rounds
from puna.post.annotate.content import labels_of, read_answer, text_of, vote_of
from puna.post.annotate.settings import Rules
from puna.post.annotate.store import Store, Transaction, sha_of, to_json
from puna.post.annotate.users import User

_CLAIMABLE = "state = 'open' AND gold IS NULL AND n_claimed < overlap"
_NOT_MINE = "NOT EXISTS (SELECT 1 FROM responses r WHERE r.item = items.id AND r.user = ?)"


@dataclass(frozen=True)
class Task:
    """An item in the hands of an annotator.

    Attributes:
        response: Number of the response that it will become.
        item: Number of the item.
        kind: See :data:`~puna.post.annotate.settings.KINDS`.
        content: Messages, texts to rank, draft.
        draft: What was saved last, None when nothing was.
        round: 1 for a new item, more for one that came back.
        note: Why it came back.
    """

    response: int
    item: int
    kind: str
    content: dict[str, Any]
    draft: dict[str, Any] | None
    round: int
    note: str


@dataclass(frozen=True)
class Submitted:
    """What became of a submission; with hard findings it is still its author's."""

    accepted: bool
    findings: list[checks.Finding]


class Desk:
    """An open desk: its store, its rules and its checks."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rules = Rules.model_validate_json(store.meta("rules") or "{}")
        self.checker = checks.Checker(self.rules.checks)

    @classmethod
    def open(cls, path: Path) -> Desk:
        """Open a desk file.

        Raises:
            PunaError: See :class:`~puna.post.annotate.store.Store`.
        """
        return cls(Store(path))

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def next_task(self, user: User) -> Task | None:
        """Return what a user works on: what came back, what was begun, or a new item.

        Returns:
            None when nothing is left for this user, or the user gets no more items.
        """
        row = self.store.one(
            "SELECT id FROM responses WHERE user = ? AND state IN ('returned', 'claimed')"
            " ORDER BY state = 'claimed', id LIMIT 1", user.id,
        )  # fmt: skip
        found = self._claim(user) if row is None else int(row["id"])
        return None if found is None else self.task(user, found)

    def _claim(self, user: User) -> int | None:
        with self.store.write() as tx:
            if tx.one("SELECT 1 FROM reliability WHERE user = ? AND status = 'spam'", user.id):
                return None
            row = tx.one("SELECT cursor, n_claims FROM users WHERE id = ?", user.id)
            assert row is not None
            item = self._choose(tx, user, row["cursor"], row["n_claims"])
            if item is None:
                return None
            response = tx.run(
                "INSERT INTO responses (item, user, state, round, claimed_s)"
                " VALUES (?, ?, 'claimed', ?, ?)",
                item["id"], user.id, item["round"], tx.now_s,
            ).lastrowid  # fmt: skip
            tx.run("UPDATE items SET n_claimed = n_claimed + 1 WHERE id = ?", item["id"])
            is_next = item["gold"] is None and not item["priority"]
            tx.run("UPDATE users SET n_claims = n_claims + 1, cursor = ? WHERE id = ?",
                   item["id"] if is_next else row["cursor"], user.id)  # fmt: skip
            tx.event("claimed", user.id, item["id"], response=response)
            return response

    def _choose(self, tx: Transaction, user: User, cursor: int, n_claims: int) -> Any:
        """Return a new item: perhaps gold, else an urgent one, else the next behind the cursor.

        The cursor keeps a user from walking again and again past all that they have done.
        """
        what = "SELECT id, round, gold, priority FROM items WHERE "
        draw = xxhash.xxh3_64_intdigest(f"{user.pseudonym}:{n_claims}".encode()) / 2**64
        if draw < self.rules.gold_rate:
            # In another order for everyone, so that nobody can tell gold by asking around.
            gold = tx.one(
                f"{what} gold IS NOT NULL AND {_NOT_MINE}"
                " ORDER BY (id * 2654435761 + ?) % 1000003 LIMIT 1",
                user.id, user.id * 7919,
            )  # fmt: skip
            if gold is not None:
                return gold
        order = f"AND {_NOT_MINE} ORDER BY id LIMIT 1"
        return (
            tx.one(f"{what} {_CLAIMABLE} AND priority > 0 {order}", user.id)
            or tx.one(f"{what} {_CLAIMABLE} AND id > ? {order}", cursor, user.id)
            or tx.one(f"{what} {_CLAIMABLE} AND id <= ? {order}", cursor, user.id)
        )

    def task(self, user: User, response: int) -> Task:
        """Return a response in work.

        Raises:
            PunaError: It is not this user's, or not in work.
        """
        row = self._own(user, response)
        draft = self.store.one(
            "SELECT content FROM drafts WHERE response = ? ORDER BY id DESC LIMIT 1", response
        )
        text = draft["content"] if draft is not None else row["content"]
        return Task(
            response, row["item"], row["kind"], json.loads(row["item_content"]),
            None if text is None else json.loads(text), row["round"], row["note"],
        )  # fmt: skip

    def _own(self, user: User, response: int, *states: str) -> Any:
        row = self.store.one(
            "SELECT r.*, i.kind, i.content AS item_content, i.gold FROM responses r"
            " JOIN items i ON i.id = r.item WHERE r.id = ? AND r.user = ?", response, user.id,
        )  # fmt: skip
        if row is None or row["state"] not in (states or ("claimed", "returned")):
            raise PunaError(f"response {response} is not in your hands", "go to the queue")
        return row

    def save_draft(self, user: User, response: int, content: dict[str, Any]) -> None:
        """Keep what is written so far; the last 50 drafts of a response can be brought back."""
        text = to_json(content)
        if len(text) > 8 * self.rules.checks.max_chars + 10_000:
            raise PunaError(f"the draft has {len(text)} characters", "shorten it")
        with self.store.write() as tx:
            self._own(user, response)
            last = tx.one(
                "SELECT content FROM drafts WHERE response = ? ORDER BY id DESC LIMIT 1", response
            )
            if last is not None and last["content"] == text:
                return
            tx.run("INSERT INTO drafts (response, at_s, content) VALUES (?, ?, ?)", response,
                   tx.now_s, text)  # fmt: skip
            tx.run(
                "DELETE FROM drafts WHERE response = ? AND id NOT IN (SELECT id FROM drafts WHERE"
                " response = ? ORDER BY id DESC LIMIT 50)", response, response,
            )  # fmt: skip

    def undo_draft(self, user: User, response: int) -> Task:
        """Drop the last draft and return to the one before."""
        with self.store.write() as tx:
            self._own(user, response)
            tx.run("DELETE FROM drafts WHERE id = (SELECT max(id) FROM drafts WHERE response = ?)",
                   response)  # fmt: skip
        return self.task(user, response)

    def skip(self, user: User, response: int, note: str = "") -> None:
        """Give an item back; it goes to somebody else."""
        with self.store.write() as tx:
            row = self._own(user, response, "claimed")
            tx.run("UPDATE responses SET state = 'skipped', note = ? WHERE id = ?", note, response)
            tx.run("UPDATE items SET n_claimed = n_claimed - 1 WHERE id = ?", row["item"])
            tx.event("skipped", user.id, row["item"], response=response, note=note)

    def release_stale(self) -> int:
        """Free the items that were claimed long ago and never begun; return how many."""
        with self.store.write() as tx:
            before_s = tx.now_s - self.rules.claim_s
            rows = tx.run(
                "SELECT r.id, r.item FROM responses r WHERE r.state = 'claimed' AND r.claimed_s < ?"
                " AND NOT EXISTS (SELECT 1 FROM drafts d WHERE d.response = r.id AND d.at_s >= ?)",
                before_s, before_s,
            ).fetchall()  # fmt: skip
            for row in rows:
                tx.run("UPDATE responses SET state = 'released' WHERE id = ?", row["id"])
                tx.run("UPDATE items SET n_claimed = n_claimed - 1 WHERE id = ?", row["item"])
                tx.event("released", None, row["item"], response=row["id"])
        return len(rows)

    def submit(self, user: User, response: int, raw: dict[str, Any]) -> Submitted:
        """Hand in an answer: it is checked, and with enough of them the votes are compared.

        Raises:
            PunaError: The answer lacks what its kind needs, or is not in this user's hands.
        """
        row = self._own(user, response)
        answer = read_answer(row["kind"], raw, self.rules)
        text = text_of(row["kind"], answer)
        messages = json.loads(row["item_content"])["messages"]
        findings = [] if text is None else self.checker.check(text, messages)
        content = to_json(answer)
        with self.store.write() as tx:
            row = self._own(user, response)
            findings += self._against_others(tx, row["item"], text)
            codes = [[one.code, one.detail] for one in findings]
            if any(one.is_hard for one in findings):
                tx.run("INSERT INTO drafts (response, at_s, content) VALUES (?, ?, ?)", response,
                       tx.now_s, content)  # fmt: skip
                tx.event("checks.failed", user.id, row["item"], response=response, findings=codes)
                return Submitted(False, findings)
            self._store_answer(tx, user, row, answer, content, text, codes)
        return Submitted(True, findings)

    def _against_others(
        self, tx: Transaction, item: int, text: str | None
    ) -> list[checks.Finding]:  # fmt: skip
        found: list[checks.Finding] = []
        if not text:
            return found
        sha = sha_of(checks.normal_text(text))
        twin = tx.one("SELECT 1 FROM responses WHERE text_sha = ? AND item != ?", sha, item)
        if self.rules.checks.duplicates and twin is not None:
            found.append(checks.Finding("duplicate", True, "the same text answers another item"))
        opening = checks.opening_of(text)
        row = None if opening is None else tx.one(
            "SELECT n, (SELECT n FROM openings WHERE words = '') AS total FROM openings"
            " WHERE words = ?", opening,
        )  # fmt: skip
        if row is not None and (row["total"] or 0) >= checks.OPENINGS_FROM:
            share = row["n"] / row["total"]
            if share > self.rules.checks.max_opening_share:
                found.append(checks.Finding("opening", False, f"{opening} ({share:.0%})"))
        return found

    def _store_answer(
        self, tx: Transaction, user: User, row: Any, answer: dict[str, Any], content: str,
        text: str | None, codes: list[list[str]],
    ) -> None:  # fmt: skip
        text_sha = sha_of(checks.normal_text(text)) if text else None
        tx.run(
            "UPDATE responses SET state = 'submitted', content = ?, sha = ?, text_sha = ?,"
            " vote = ?, flags = ?, submitted_s = ? WHERE id = ?", content, sha_of(content),
            text_sha, vote_of(row["kind"], answer), to_json(codes), tx.now_s, row["id"],
        )  # fmt: skip
        for words in ("", checks.opening_of(text)) if text else ():
            if words is not None:
                tx.run("INSERT INTO openings VALUES (?, 1) ON CONFLICT DO UPDATE SET n = n + 1",
                       words)  # fmt: skip
        tx.event("submitted", user.id, row["item"], response=row["id"], sha=sha_of(content),
                 round=row["round"], flags=codes)  # fmt: skip
        tx.run("UPDATE items SET n_submitted = n_submitted + ? WHERE id = ?",
               int(row["state"] == "claimed"), row["item"])  # fmt: skip
        item = tx.one("SELECT * FROM items WHERE id = ?", row["item"])
        assert item is not None
        if item["gold"] is not None:
            return
        if item["state"] == "returned":
            move(tx, item, "review", user.id)
        elif item["state"] == "open" and item["n_submitted"] >= item["overlap"]:
            self.compare(tx, item)

    def compare(self, tx: Transaction, item: Any) -> None:
        """Let an item through the agreement gate, give it another annotator, or a judge."""
        rules, labels = self.rules, labels_of(item["kind"], self.rules)
        rows = tx.run(
            "SELECT r.id, r.vote, q.confusion, q.status FROM responses r"
            " LEFT JOIN reliability q ON q.user = r.user AND q.kind = ?"
            " WHERE r.item = ? AND r.state = 'submitted' ORDER BY r.id", item["kind"], item["id"],
        ).fetchall()  # fmt: skip
        voted = [row for row in rows if row["vote"] in labels]
        if not voted:  # written, and nothing is marked: there is nothing to compare
            move(tx, item, "review", None)
            return
        known = [None if one["confusion"] is None else np.array(json.loads(one["confusion"]))
                 for one in voted]  # fmt: skip
        alone = rules.overlap == 1 and all(one["status"] != "doubtful" for one in voted)
        found = rounds.gate(
            [labels.index(one["vote"]) for one in voted], known, len(labels), rules.agree, alone
        )
        tx.run("UPDATE items SET posterior = ? WHERE id = ?", found.chance, item["id"])
        if not found.agreed and item["overlap"] < rules.max_overlap:
            raise_overlap(tx, item, "votes differ")
        elif not found.agreed:
            move(tx, item, "adjudication", None, reason="votes differ")
        elif item["kind"] == "write" or _drawn(item["key"], rules.review_share):
            move(tx, item, "review", None)
        else:
            label = labels[found.label]
            best = next(one for one in voted if one["vote"] == label)
            accept(tx, item, int(best["id"]), None)

    def withdraw(self, user: User) -> int | None:
        """Take back the last submission, as long as nobody else has gone on from it.

        Returns:
            The response, which is in the user's hands again; None when it is too late.
        """
        with self.store.write() as tx:
            row = tx.one(
                "SELECT r.id, r.item, r.round FROM responses r WHERE r.user = ? AND"
                " r.state = 'submitted' ORDER BY r.submitted_s DESC LIMIT 1", user.id,
            )  # fmt: skip
            if row is None:
                return None
            item = tx.one("SELECT * FROM items WHERE id = ?", row["item"])
            assert item is not None
            free = item["state"] == "open" or (
                item["state"] == "review" and item["lease_s"] < tx.now_s
            )
            judged = tx.one("SELECT 1 FROM reviews WHERE item = ? AND round >= ?", item["id"],
                            item["round"])  # fmt: skip
            if not free or judged:
                return None
            back = "returned" if item["round"] > 1 else "claimed"
            tx.run("UPDATE responses SET state = ?, text_sha = NULL WHERE id = ?", back, row["id"])
            if back == "claimed":
                tx.run("UPDATE items SET n_submitted = n_submitted - 1 WHERE id = ?", item["id"])
            tx.event("withdrawn", user.id, item["id"], response=row["id"])
            if item["gold"] is None and item["state"] == "review":
                move(tx, item, "returned" if back == "returned" else "open", user.id)
        return int(row["id"])


def move(
    tx: Transaction, item: Any, state: str, actor: int | None, *, next_round: bool = False,
    **payload: Any,
) -> None:  # fmt: skip
    """Bring an item into another state, and tell it in an event."""
    number = item["round"] + int(next_round)
    tx.run("UPDATE items SET state = ?, round = ?, lease_user = NULL, lease_s = 0 WHERE id = ?",
           state, number, item["id"])  # fmt: skip
    tx.event("moved", actor, item["id"], to=state, round=number, **payload)


def raise_overlap(tx: Transaction, item: Any, reason: str) -> None:
    """Let one more annotator work on an item, soon."""
    tx.run("UPDATE items SET overlap = overlap + 1, priority = 1 WHERE id = ?", item["id"])
    tx.event("overlap.raised", None, item["id"], reason=reason, overlap=item["overlap"] + 1)


def accept(
    tx: Transaction, item: Any, response: int | None, actor: int | None,
    answer: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Make an answer the item's own.

    Args:
        tx: The transaction.
        item: The item.
        response: The response that is taken; None for an answer of the judge's own.
        actor: Who decided; None for the gate.
        answer: The judge's own answer.
    """
    if answer is None:
        row = tx.one("SELECT content FROM responses WHERE id = ? AND item = ?", response,
                     item["id"])  # fmt: skip
        assert row is not None
        answer = json.loads(row["content"])
    text = to_json({"answer": answer, "response": response})
    tx.run("UPDATE items SET answer = ? WHERE id = ?", text, item["id"])
    move(tx, item, "accepted", actor, answer=sha_of(text))


def _drawn(key: str, share: float) -> bool:
    return xxhash.xxh3_64_intdigest(f"review:{key}".encode()) / 2**64 < share
