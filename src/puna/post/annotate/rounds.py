"""The decisions of the rounds, free of any storage: the desk and the simulation both take these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from puna.post.annotate.intervals import Interval, sample_size, upper_bound

UNKNOWN_ACCURACY = 0.8
"""Supposed of annotators whose votes were not measured yet (ours)."""

Status = Literal["new", "trusted", "doubtful", "spam"]


class Gate(NamedTuple):
    """What the votes on an item say together."""

    label: int
    chance: float
    agreed: bool


class Lot(NamedTuple):
    """What the audit of a batch says about it."""

    n_audited: int
    n_defects: int
    bound: float
    accepted: bool


def unknown_confusion(n_labels: int) -> np.ndarray:
    """Return what is supposed of an annotator who was not measured yet."""
    wrong = (1 - UNKNOWN_ACCURACY) / (n_labels - 1)
    return np.full((n_labels, n_labels), wrong) + np.eye(n_labels) * (UNKNOWN_ACCURACY - wrong)


def posterior_of(
    votes: Sequence[int], confusions: Sequence[np.ndarray | None], n_labels: int,
    priors: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Return the chance of each label given votes and the voters' confusion matrices.

    Args:
        votes: Index of the label of each vote.
        confusions: ``[true, given]`` of each voter, None for one who was not measured.
        n_labels: Number of labels.
        priors: Shares of the labels; alike when not given.
    """
    logs = np.log(np.full(n_labels, 1 / n_labels) if priors is None else np.maximum(priors, 1e-9))
    for vote, confusion in zip(votes, confusions, strict=True):
        known = unknown_confusion(n_labels) if confusion is None else confusion
        logs = logs + np.log(np.maximum(known[:, vote], 1e-9))
    chances = np.exp(logs - logs.max())
    return chances / chances.sum()


def gate(
    votes: Sequence[int], confusions: Sequence[np.ndarray | None], n_labels: int, agree: float,
    alone_is_enough: bool = False,
) -> Gate:  # fmt: skip
    """Tell whether the votes on an item agree.

    Args:
        votes: Index of the label of each vote.
        confusions: Of each voter; None for one who was not measured.
        n_labels: Number of labels.
        agree: Chance of the likeliest label from which on they do.
        alone_is_enough: A single vote agrees with itself.
    """
    chances = posterior_of(votes, confusions, n_labels)
    label = int(chances.argmax())
    chance = float(chances[label])
    return Gate(label, chance, chance >= agree or (alone_is_enough and len(votes) == 1))


def status_of(found: Interval, n_votes: int, min_votes: int, trust: float, spam: float) -> Status:
    """Judge an annotator by the interval of the informedness.

    Args:
        found: Informedness and its bounds.
        n_votes: Votes it rests on; with fewer than ``min_votes`` nothing is said.
        min_votes: See there.
        trust: A lower bound below is doubtful.
        spam: An upper bound below says that the votes tell nothing.
    """
    if n_votes < min_votes:
        return "new"
    if found.high < spam:
        return "spam"
    return "doubtful" if found.low < trust else "trusted"


def audit_size(n_items: int, limit: float, confidence: float, n_defects: int) -> int:
    """Return how many items of a batch to audit: all of a small one."""
    return min(n_items, sample_size(limit, confidence, n_defects))


def judge_lot(
    n_items: int, n_audited: int, n_defects: int, limit: float, confidence: float
) -> Lot:  # fmt: skip
    """Accept a batch if the upper bound of its defect rate is below the limit.

    Args:
        n_items: Of the batch; when all were audited the rate is known and needs no bound.
        n_audited: Items looked at.
        n_defects: Defects among them.
        limit: Upper bound of the rate must be below.
        confidence: Of the bound (Clopper and Pearson, 1934).
    """
    whole = n_audited >= n_items > 0
    bound = n_defects / n_items if whole else upper_bound(n_defects, n_audited, confidence)
    return Lot(n_audited, n_defects, bound, bound < limit)
