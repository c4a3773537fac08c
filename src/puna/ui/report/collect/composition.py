"""The composition: what ``data.compose`` was asked for, and what a pass of training reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puna.core.artifact import Artifact

TRAIN = "train"
MAX_GROUPS = 20
"""Groups shown; the smaller ones are summed up in one row (ours)."""
_COUNTS = ("in_docs", "in_tokens", "docs", "tokens")


def composition_section(inputs: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """Put before and after sampling beside each other, per group of the training side.

    Args:
        inputs: Finished artifacts; ``compose`` is looked at.

    Returns:
        ``{"by", "is_counted", "budget_tokens", "groups", "total", "rules", "unreached"}``. A group
        has documents and tokens before (``in_docs``, ``in_tokens``) and after (``docs``,
        ``tokens``: copies counted), their shares of all tokens (``in_share``, ``share``) and
        ``epochs``, how often a pass reads its tokens on average. None without a composition.
    """
    artifact = inputs.get("compose")
    if artifact is None:
        return None
    metrics = artifact.metrics
    groups: dict[str, dict[str, Any]] = {}
    for row in metrics["groups"]:
        if row["split"] == TRAIN:
            name = ", ".join(row["values"].values())
            mine = groups.setdefault(name, {"name": name, **dict.fromkeys(_COUNTS, 0)})
            for key in _COUNTS:
                mine[key] += row[key]
    shown = sorted(groups.values(), key=_largest_first)
    rest = shown[MAX_GROUPS:]
    total = _sum("all", shown)
    shown = shown[:MAX_GROUPS]
    if rest:
        shown.append(_sum(f"{len(rest)} more", rest))
    for row in (*shown, total):
        row["in_share"] = _ratio(row["in_tokens"], total["in_tokens"])
        row["share"] = _ratio(row["tokens"], total["tokens"])
        row["epochs"] = _ratio(row["tokens"], row["in_tokens"])
    return {
        "by": metrics["by"],
        "is_counted": metrics["token_counts"] == "tokenizer",
        "budget_tokens": metrics["budget_tokens"],
        "groups": shown,
        "total": total,
        "rules": [
            row for row in metrics["parts"]
            if row["asked_share"] is not None or row["asked_factor"] is not None
        ],
        "unreached": metrics["unreached"],
    }  # fmt: skip


def _largest_first(row: dict[str, Any]) -> tuple[int, int, str]:
    return -row["tokens"], -row["in_tokens"], row["name"]


def _sum(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, **{key: sum(row[key] for row in rows) for key in _COUNTS}}


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
