"""The numbers of a desk: progress, throughput, agreement and defects by round, people, batches."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from puna.post.annotate import rounds
from puna.post.annotate.agreement import Level, alpha_interval
from puna.post.annotate.content import labels_of
from puna.post.annotate.desk import Desk
from puna.post.annotate.intervals import Interval, clopper_pearson
from puna.post.annotate.settings import KINDS

MOST_ITEMS = 5000
"""Agreement is measured on the newest items, so many at most."""
_RESAMPLES = 200


def collect(desk: Desk) -> dict[str, Any]:
    """Return everything that the dashboard and the report show, as JSON values."""
    return {
        "items": _states(desk),
        "throughput": _throughput(desk),
        "agreement": [one for kind in KINDS for one in _agreement(desk, kind)],
        "rounds": _rounds(desk),
        "people": _people(desk),
        "batches": _batches(desk),
        "versions": [dict(row) for row in desk.store.all("SELECT * FROM versions ORDER BY made_s")],
    }


def _states(desk: Desk) -> dict[str, int]:
    rows = desk.store.all(
        "SELECT state, count(*) AS n FROM items WHERE gold IS NULL GROUP BY state"
    )
    found = {row["state"]: row["n"] for row in rows}
    order = ("open", "review", "returned", "adjudication", "accepted", "frozen")
    gold = desk.store.one("SELECT count(*) AS n FROM items WHERE gold IS NOT NULL")
    return {**{name: found.get(name, 0) for name in order}, "gold": gold["n"] if gold else 0}


def _throughput(desk: Desk) -> list[dict[str, Any]]:
    rows = desk.store.all(
        "SELECT date(submitted_s, 'unixepoch') AS day, count(*) AS n,"
        " count(DISTINCT user) AS people FROM responses"
        " WHERE submitted_s IS NOT NULL AND state = 'submitted'"
        " GROUP BY day ORDER BY day DESC LIMIT 14"
    )
    return [dict(row) for row in reversed(rows)]


def _agreement(desk: Desk, kind: str) -> list[dict[str, Any]]:
    """Krippendorff's alpha of the newest items with two votes or more, per round of the item."""
    labels = labels_of(kind, desk.rules)
    rows = desk.store.all(
        "SELECT r.item, r.user, r.vote, r.content, i.round FROM responses r"
        " JOIN items i ON i.id = r.item WHERE i.kind = ? AND i.gold IS NULL AND"
        " r.vote IS NOT NULL AND r.state = 'submitted' AND i.n_submitted > 1"
        " ORDER BY r.item DESC LIMIT ?", kind, MOST_ITEMS * 3,
    )  # fmt: skip
    rows = [row for row in rows if row["vote"] in labels]
    users = {user: at for at, user in enumerate(sorted({row["user"] for row in rows}))}
    found = []
    for number in sorted({row["round"] for row in rows}):
        chosen = [row for row in rows if row["round"] == number]
        items = {item: at for at, item in enumerate(dict.fromkeys(r["item"] for r in chosen))}
        ratings = np.full((len(items), len(users)), np.nan)
        for row in chosen:
            value: float = labels.index(row["vote"])
            if kind == "rank":
                value = json.loads(row["content"])["preference"]
            ratings[items[row["item"]], users[row["user"]]] = value
        level: Level = "ordinal" if kind == "rank" else "nominal"
        alpha = alpha_interval(ratings, level, _RESAMPLES)
        found.append({"kind": kind, "round": number, "n_items": len(items), "level": level,
                      **_told(alpha)})  # fmt: skip
    return found


def _told(interval: Interval) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else round(value, 4)
            for name, value in interval._asdict().items()}  # fmt: skip


def _rounds(desk: Desk) -> list[dict[str, Any]]:
    """What reviewers returned, and what audits found wrong, by round."""
    reviews = desk.store.all(
        "SELECT round, count(*) AS n, sum(verdict != 'accept') AS bad FROM reviews"
        " WHERE kind = 'review' GROUP BY round"
    )
    audits = desk.store.all(
        "SELECT round, count(*) AS n, sum(is_defect) AS bad FROM audits"
        " WHERE is_defect IS NOT NULL GROUP BY round"
    )
    return [
        {"round": row["round"], "by": by, "n": row["n"], "n_defects": row["bad"],
         **_told(clopper_pearson(row["bad"], row["n"]))}
        for by, rows in (("review", reviews), ("audit", audits))
        for row in rows
    ]  # fmt: skip


def _people(desk: Desk) -> list[dict[str, Any]]:
    rows = desk.store.all(
        "SELECT u.pseudonym, u.role, u.active,"
        " (SELECT count(*) FROM responses r WHERE r.user = u.id AND r.state = 'submitted')"
        " AS n_submitted,"
        " (SELECT count(*) FROM events e WHERE e.kind = 'checks.failed' AND e.actor = u.id)"
        " AS n_refused,"
        " (SELECT count(*) FROM reviews v JOIN responses r ON r.id = v.response"
        "  WHERE r.user = u.id AND v.verdict = 'return') AS n_returned,"
        " (SELECT count(*) FROM reviews v WHERE v.reviewer = u.id) AS n_judged,"
        " q.kind, q.status, q.value, q.low, q.high, q.n_gold, q.n_right"
        " FROM users u LEFT JOIN reliability q ON q.user = u.id ORDER BY u.id"
    )
    return [dict(row) for row in rows]


def _batches(desk: Desk) -> list[dict[str, Any]]:
    rows = desk.store.all(
        "SELECT b.name, b.state, b.round,"
        " (SELECT count(*) FROM items i WHERE i.batch = b.name AND i.gold IS NULL) AS n_items,"
        " (SELECT count(*) FROM items i WHERE i.batch = b.name AND i.gold IS NULL AND"
        "  i.state IN ('accepted', 'frozen')) AS n_accepted FROM batches b ORDER BY b.name"
    )
    found = []
    for row in rows:
        last = desk.store.one(
            "SELECT round, count(*) AS n, count(is_defect) AS done, sum(is_defect) AS bad"
            " FROM audits WHERE batch = ? GROUP BY round ORDER BY round DESC LIMIT 1", row["name"],
        )  # fmt: skip
        audit = None
        if last is not None:
            whole = last["done"] == last["n"]
            rules = desk.rules
            lot = rounds.judge_lot(
                row["n_items"], last["done"], last["bad"] or 0, rules.defect_limit, rules.confidence
            )
            audit = {"round": last["round"], "n": last["n"], "done": last["done"],
                     "n_defects": last["bad"] or 0,
                     "bound": round(lot.bound, 4) if whole else None}  # fmt: skip
        found.append({**dict(row), "audit": audit})
    return found
