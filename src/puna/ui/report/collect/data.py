"""The way of the documents: the flow of every data stage, summed up and with its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puna.core.artifact import Artifact
from puna.data.reasons import meaning_of

LABELS = {
    "data.ingest": "read",
    "data.filter": "filtered",
    "data.dedup": "deduplicated",
    "data.split": "split",
    "data.compose": "composed",
}
"""What a document is after a stage; another stage is called by the last part of its name."""
UNEXPLAINED = "(no reason recorded)"
_COUNTS = ("in_docs", "in_bytes", "kept_docs", "kept_bytes")


def data_section(
    artifacts: Sequence[Artifact], tokens: dict[str, Any] | None, max_reasons: int
) -> dict[str, Any] | None:
    """Sum up the flow of documents through the stages that tell one.

    Args:
        artifacts: Finished artifacts in the order in which they were made.
        tokens: The section on tokens, for the size of a token in bytes.
        max_reasons: Reasons named per stage.

    Returns:
        ``{"sources": [...], "steps": [...]}``; None when no stage has a flow.
    """
    flows = [(item.stage, item.metrics["flow"]) for item in artifacts if item.metrics.get("flow")]
    if not flows:
        return None
    bytes_per_token = _bytes_per_token(tokens)
    sources = sorted(
        {source for _, flow in flows for source in flow},
        key=lambda source: (-flows[-1][1].get(source, {}).get("kept_bytes", 0), source),
    )
    steps = [_step(stage, flow, bytes_per_token, max_reasons) for stage, flow in flows]
    for before, step in zip([{"label": "raw"}, *steps], steps, strict=False):
        step["previous_label"] = before["label"]
    for source, row in steps[-1]["by_source"].items():
        encoded = (tokens or {"sources": {}})["sources"].get(source)
        row["encoded_tokens"] = encoded["n_tokens"] if encoded is not None else None
    return {"sources": sources, "steps": steps}


def _step(
    stage: str, flow: dict[str, Any], bytes_per_token: dict[str, float], max_reasons: int
) -> dict[str, Any]:
    by_source: dict[str, dict[str, Any]] = {}
    for source, row in flow.items():
        rejected = _explained(row)
        by_source[source] = {
            **{key: row[key] for key in _COUNTS},
            "rejected_docs": sum(one["docs"] for one in rejected.values()),
            "rejected_bytes": sum(one["bytes"] for one in rejected.values()),
            "kept_tokens_estimate": _tokens(row["kept_bytes"], bytes_per_token.get(source)),
        }
    total = {key: sum(row[key] for row in by_source.values())
             for key in (*_COUNTS, "rejected_docs", "rejected_bytes")}  # fmt: skip
    estimates = [row["kept_tokens_estimate"] for row in by_source.values()]
    known = [n for n in estimates if n is not None]
    reasons = _reasons(flow, total["in_docs"])
    return {
        "stage": stage,
        "label": LABELS.get(stage, stage.rpartition(".")[2]),
        **total,
        "kept_tokens_estimate": sum(known) if len(known) == len(estimates) else None,
        "by_source": by_source,
        "reasons": reasons[:max_reasons],
        "n_reasons": len(reasons),
        "other_reasons_docs": sum(reason["docs"] for reason in reasons[max_reasons:]),
    }


def _explained(row: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The rejected documents of a source by reason; what nobody explains has a reason, too."""
    rejected = dict(row["rejected"])
    missing = row["in_docs"] - row["kept_docs"] - sum(one["docs"] for one in rejected.values())
    if missing > 0:
        rejected[UNEXPLAINED] = {"docs": missing, "bytes": 0}
    return rejected


def _reasons(flow: dict[str, Any], in_docs: int) -> list[dict[str, Any]]:
    """Reasons of all sources together, the most frequent first."""
    docs: dict[str, int] = {}
    n_bytes: dict[str, int] = {}
    for row in flow.values():
        for reason, one in _explained(row).items():
            docs[reason] = docs.get(reason, 0) + one["docs"]
            n_bytes[reason] = n_bytes.get(reason, 0) + one["bytes"]
    return [
        {
            "reason": reason,
            "meaning": meaning_of(reason),
            "docs": docs[reason],
            "bytes": n_bytes[reason],
            "share": docs[reason] / in_docs if in_docs else 0.0,
        }
        for reason in sorted(docs, key=lambda reason: (-docs[reason], reason))
        if docs[reason] or n_bytes[reason]
    ]


def _bytes_per_token(tokens: dict[str, Any] | None) -> dict[str, float]:
    if tokens is None:
        return {}
    return {
        source: row["bytes_per_token"]
        for source, row in tokens["sources"].items()
        if row["bytes_per_token"]
    }


def _tokens(n_bytes: int, bytes_per_token: float | None) -> int | None:
    if n_bytes == 0:
        return 0
    return round(n_bytes / bytes_per_token) if bytes_per_token else None
