"""Documents beside a threshold: which they are, and their texts with the offending part marked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from puna.data.kernels.buffers import texts_from
from puna.data.report.folders import DataStage, Place, row_groups
from puna.data.report.marks import find_offending
from puna.data.report.measured import Check, Signal
from puna.data.report.sample import Lowest, Sample, located, ranks_of
from puna.data.safety.config import KINDS, NATIONAL_IDS
from puna.data.safety.pii import find_pii, redact

EXCERPT_CHARS = 400
_LOOKED_AT_CHARS = 200_000
_LEAD_CHARS = 60
_BLANK_LINES = re.compile(r"\n[ \t]*\n[ \t\n]*\n")
_VERDICT = ["id", "source", "reason", "value", "threshold", "detail"]
_REPLACEMENTS = {kind: f"<{kind.upper()}>" for kind in KINDS}


class Rejected:
    """Everything that a stage rejected, by reason: counts, values, and the nearest to a threshold.

    Args:
        stage: The stage.
        k: Documents to keep per reason.
        seed: Orders the documents of reasons without a value.
        n_values: Most values to keep per reason, of the documents of the lowest rank.
    """

    def __init__(self, stage: DataStage, k: int, seed: int, n_values: int) -> None:
        nearest: dict[str, Lowest] = {}
        values: dict[str, Lowest] = {}
        for shard, first, table in stage.tables("rejected", _VERDICT):
            distance = np.abs(table["value"].to_numpy() - table["threshold"].to_numpy())
            distance[np.isnan(distance)] = np.inf  # null in one of them
            rows = located(table, "rejected", shard.index, first)
            rows = rows.append_column("rank", pa.array(ranks_of(table["id"], seed)))
            rows = rows.append_column("distance", pa.array(distance))
            reasons = np.asarray(table["reason"].to_pylist(), object)
            for reason in set(reasons.tolist()):
                part = rows.take(pa.array(np.flatnonzero(reasons == reason)))
                nearest.setdefault(reason, Lowest(k, ("distance", "rank", "id"))).add(part)
                narrow = part.select(["rank", "id", "value", "threshold"])
                values.setdefault(reason, Lowest(n_values, ("rank", "id"))).add(narrow)
        self.nearest = {reason: one.table() for reason, one in sorted(nearest.items())}
        self.values = {reason: one.table() for reason, one in sorted(values.items())}

    def cases(self, reason: str) -> list[dict[str, Any]]:
        """Return the documents nearest to the threshold of a reason, the nearest first."""
        table = self.nearest.get(reason)
        return [] if table is None else [_case(row) for row in table.to_pylist()]


def kept_beside(signal: Signal, check: Check, sample: Sample, k: int) -> list[dict[str, Any]]:
    """Return the kept documents of a sample whose value is nearest to a threshold.

    Equally near ones come in the order of rank. Documents on the failing side that the check does
    not look at (a script without spaces, an excepted source) are not among them.
    """
    passes = signal.values >= check.threshold
    if check.fails == "above":
        passes = signal.values <= check.threshold
    rows = np.flatnonzero(sample.kept & ~check.failed & passes)
    distance = np.abs(signal.values[rows] - check.threshold[rows])
    rows = rows[np.argsort(distance, kind="stable")][:k]
    found = sample.rows.select(["id", "source", "place", "shard", "row"])
    cases = []
    for row, one in zip(rows.tolist(), found.take(pa.array(rows)).to_pylist(), strict=True):
        value, threshold = float(signal.values[row]), float(check.threshold[row])
        cases.append(_case({**one, "value": value, "threshold": threshold, "detail": None}))
    return cases


def _case(row: dict[str, Any]) -> dict[str, Any]:
    names = ("id", "source", "value", "threshold", "detail", "place", "shard", "row")
    return {name: row[name] for name in names}


def complete(stage: DataStage, run_dir: Path, cases: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Add path, excerpt and command to cases, and take their place in the files away.

    Personal data and keys in an excerpt are replaced, whatever the run does about them: pages are
    passed on more easily than corpora.

    Args:
        stage: The stage that the cases are from.
        run_dir: The run.
        cases: Each with the reason that it illustrates.
    """
    wanted: dict[tuple[Place, int], set[int]] = {}
    for _, case in cases:
        wanted.setdefault((case["place"], case["shard"]), set()).add(case["row"])
    found: dict[tuple[Place, int, int], dict[str, Any]] = {}
    for (place, index), rows in sorted(wanted.items()):
        shard = stage.shards[place][index]
        for _, first, table in row_groups(shard, ["id", "path", "text"], rows):
            here = sorted(row for row in rows if first <= row < first + table.num_rows)
            taken = table.take(pa.array([row - first for row in here])).to_pylist()
            found |= {(place, index, row): one for row, one in zip(here, taken, strict=True)}
    for reason, case in cases:
        document = found[case.pop("place"), case.pop("shard"), case.pop("row")]
        case["path"] = document["path"]
        case["excerpt"] = excerpt(document["text"], reason, case["detail"])
        command = ["puna", "data", "why", case["id"], "--run", str(run_dir)]
        case["command"] = shlex.join(command)


def excerpt(text: str, reason: str, detail: str | None) -> list[dict[str, Any]]:
    """Cut about 400 characters out of a text: its beginning, or where the offending part is.

    Returns:
        Pieces ``{"text", "mark"}`` in order; marked is what the reason is about.
    """
    head = text[:_LOOKED_AT_CHARS]
    spans = find_offending(reason, head, detail)
    start = 0
    if spans and spans[0][0] > EXCERPT_CHARS - _LEAD_CHARS:
        start = max(spans[0][0] - _LEAD_CHARS, 0)
    end = min(start + EXCERPT_CHARS, len(head))
    pieces: list[dict[str, Any]] = [{"text": "… ", "mark": False}] if start else []
    at = start
    for span in spans:
        low, high = max(span[0], at), min(span[1], end)
        if low >= high:
            continue
        pieces += _piece(head[at:low], is_marked=False) + _piece(head[low:high], is_marked=True)
        at = high
    pieces += _piece(head[at:end], is_marked=False)
    if end < len(text):
        pieces.append({"text": " …", "mark": False})
    return _without_personal_data(pieces)


def _piece(text: str, *, is_marked: bool) -> list[dict[str, Any]]:
    return [{"text": text, "mark": is_marked}] if text else []


def _without_personal_data(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace personal data; what spans a border of pieces makes them one without a mark."""
    texts = texts_from(["".join(piece["text"] for piece in pieces)])
    found = find_pii(texts, [frozenset(NATIONAL_IDS)])
    if found:
        bounds = np.cumsum([len(piece["text"].encode()) for piece in pieces]).tolist()
        if any(low < bound < high for low, high, _ in found[0] for bound in bounds):
            pieces = [{"text": "".join(piece["text"] for piece in pieces), "mark": False}]
        pieces = [{**piece, "text": _redacted(piece["text"])} for piece in pieces]
    return [{**piece, "text": visible(_BLANK_LINES.sub("\n\n", piece["text"]))} for piece in pieces]


def _redacted(text: str) -> str:
    texts = texts_from([text])
    data, _ = redact(texts, find_pii(texts, [frozenset(NATIONAL_IDS)]), _REPLACEMENTS)
    return data.decode()


def visible(text: str) -> str:
    """Show control characters as their pictures, and what turns the direction of text as U+FFFD."""
    return text.translate(_VISIBLE)


def _pictures() -> dict[int, int]:
    shown = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    turning: Iterable[int] = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0x7F, 0xA0))
    return {**shown, **dict.fromkeys(turning, 0xFFFD)}


_VISIBLE = _pictures()
