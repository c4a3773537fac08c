"""Acceptance sampling: a batch whose defect rate an audit does not bound goes round again."""

from __future__ import annotations

import json
import random
from typing import Any

import xxhash

from puna.core.errors import PunaError
from puna.post.annotate import rounds
from puna.post.annotate.desk import Desk, move
from puna.post.annotate.judge import Case, case_of
from puna.post.annotate.store import Transaction
from puna.post.annotate.users import User

_UNDONE = ("open", "review", "returned", "adjudication")


def draw_audits(desk: Desk) -> list[str]:
    """Draw the samples of the batches whose items are all accepted; return their names."""
    drawn = []
    with desk.store.write() as tx:
        for row in tx.run("SELECT * FROM batches WHERE state = 'open'").fetchall():
            marks = ",".join("?" * len(_UNDONE))
            if tx.one(
                "SELECT 1 FROM items WHERE batch = ? AND gold IS NULL AND state IN "  # noqa: S608
                f"({marks}) LIMIT 1", row["name"], *_UNDONE,
            ):  # fmt: skip
                continue
            items = [
                one["id"]
                for one in tx.run(
                    "SELECT id FROM items WHERE batch = ? AND gold IS NULL AND state = 'accepted'"
                    " ORDER BY id", row["name"],
                )
            ]  # fmt: skip
            if not items:
                continue
            rules = desk.rules
            n = rounds.audit_size(
                len(items), rules.defect_limit, rules.confidence, rules.audit_defects
            )
            # The key makes the sample one that nobody can foresee.
            seed = xxhash.xxh3_64_intdigest(
                desk.store.key + f"{row['name']}:{row['round']}".encode()
            )
            chosen = sorted(random.Random(seed).sample(items, n))
            for item in chosen:
                tx.run("INSERT INTO audits (batch, round, item) VALUES (?, ?, ?)", row["name"],
                       row["round"], item)  # fmt: skip
            tx.run("UPDATE batches SET state = 'audit' WHERE name = ?", row["name"])
            tx.event("audit.drawn", None, batch=row["name"], round=row["round"], n=n,
                     n_items=len(items))  # fmt: skip
            drawn.append(str(row["name"]))
    return drawn


def next_audit(desk: Desk, user: User) -> tuple[int, Case, dict[str, Any]] | None:
    """Return the number of an audit, its item and the item's answer, for somebody new to the item.

    Raises:
        PunaError: The user is no reviewer.
    """
    if not user.may("reviewer"):
        raise PunaError(f"{user.name} is {user.role}, reviewer is needed", "ask an admin")
    row = desk.store.one(
        "SELECT a.id, a.item, i.answer FROM audits a JOIN items i ON i.id = a.item"
        " WHERE a.is_defect IS NULL AND NOT EXISTS (SELECT 1 FROM responses r WHERE"
        " r.item = a.item AND r.user = ? AND r.content IS NOT NULL) AND NOT EXISTS"
        " (SELECT 1 FROM reviews v WHERE v.item = a.item AND v.reviewer = ?)"
        " ORDER BY (a.id * 7919 + ?) % 10007 LIMIT 1", user.id, user.id, user.id * 31,
    )  # fmt: skip
    if row is None:
        return None
    return int(row["id"]), case_of(desk, row["item"]), json.loads(row["answer"])["answer"]


def record_audit(
    desk: Desk, user: User, audit: int, is_defect: bool, reason: str | None = None
) -> rounds.Lot | None:
    """Note what an auditor found; the last one of a batch decides about it.

    Returns:
        The verdict about the batch once all its sample was looked at.

    Raises:
        PunaError: The user is no reviewer or worked on the item, the audit is not open, or a defect
            has no reason.
    """
    if not user.may("reviewer"):
        raise PunaError(f"{user.name} is {user.role}, reviewer is needed", "ask an admin")
    if is_defect and reason not in desk.rules.reasons:
        raise PunaError(f"reason {reason!r} is unknown", f"one of {', '.join(desk.rules.reasons)}")
    with desk.store.write() as tx:
        row = tx.one("SELECT * FROM audits WHERE id = ? AND is_defect IS NULL", audit)
        if row is None:
            raise PunaError(f"audit {audit} is not open", "go to the next one")
        if tx.one(
            "SELECT 1 FROM responses WHERE item = ? AND user = ? AND content IS NOT NULL"
            " UNION ALL SELECT 1 FROM reviews WHERE item = ? AND reviewer = ?",
            row["item"], user.id, row["item"], user.id,
        ):  # fmt: skip
            raise PunaError(f"you worked on item {row['item']}", "leave it to another auditor")
        tx.run("UPDATE audits SET auditor = ?, is_defect = ?, reason = ? WHERE id = ?", user.id,
               int(is_defect), reason, audit)  # fmt: skip
        tx.event("audited", user.id, row["item"], audit=audit, batch=row["batch"],
                 round=row["round"], defect=is_defect, reason=reason)  # fmt: skip
        if tx.one("SELECT 1 FROM audits WHERE batch = ? AND is_defect IS NULL", row["batch"]):
            return None
        return _decide(desk, tx, str(row["batch"]), int(row["round"]))


def _decide(desk: Desk, tx: Transaction, batch: str, number: int) -> rounds.Lot:
    counts = tx.one("SELECT count(*) AS n, sum(is_defect) AS bad FROM audits WHERE batch = ?"
                    " AND round = ?", batch, number)  # fmt: skip
    items = tx.run("SELECT * FROM items WHERE batch = ? AND gold IS NULL AND state = 'accepted'",
                   batch).fetchall()  # fmt: skip
    assert counts is not None
    rules = desk.rules
    lot = rounds.judge_lot(
        len(items), counts["n"], counts["bad"], rules.defect_limit, rules.confidence
    )
    bad = {
        row["item"]: row["reason"]
        for row in tx.run("SELECT item, reason FROM audits WHERE batch = ? AND round = ? AND"
                          " is_defect = 1", batch, number)
    }  # fmt: skip
    # What was found wrong is mended in any case; the rest goes round again if there is too much.
    for item in items:
        if item["id"] in bad or not lot.accepted:
            move(tx, item, "review", None, next_round=True, reason=bad.get(item["id"], "batch"))
    state = "open" if not lot.accepted else "accepted"
    tx.run("UPDATE batches SET state = ?, round = round + ? WHERE name = ?", state,
           int(not lot.accepted), batch)  # fmt: skip
    tx.event("batch.judged", None, batch=batch, round=number, n=lot.n_audited,
             defects=lot.n_defects, bound=round(lot.bound, 6), accepted=lot.accepted)  # fmt: skip
    return lot
