"""From many votes to one label, and to what each annotator's votes are worth.

Majority voting, the confusion matrices of Dawid and Skene (1979), and a model of annotators who
now and then do not look, as in MACE (Hovy et al., 2013).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puna.post.annotate.intervals import Interval

_TINY = 1e-300


@dataclass(frozen=True)
class Votes:
    """Labels given, one entry per vote; an annotator may vote on an item more than once.

    Attributes:
        item: Index of the item.
        annotator: Index of the annotator.
        label: Index of the label.
        n_items: Number of items, those without votes included.
        n_annotators: Number of annotators.
        n_labels: Number of labels.
    """

    item: np.ndarray
    annotator: np.ndarray
    label: np.ndarray
    n_items: int
    n_annotators: int
    n_labels: int

    def shares(self) -> np.ndarray:
        """Share of each label among the votes of an item; uniform without any."""
        counts = np.zeros((self.n_items, self.n_labels))
        np.add.at(counts, (self.item, self.label), 1)
        total = counts.sum(1, keepdims=True)
        return np.where(total > 0, counts / np.maximum(total, 1), 1 / self.n_labels)


@dataclass(frozen=True)
class DawidSkene:
    """What the EM found.

    Attributes:
        posterior: ``[n_items, n_labels]`` chance of each label.
        priors: Share of each label.
        confusion: ``[n_annotators, true, given]`` rows that sum to one (zero without votes).
        expected: As ``confusion``, in expected numbers of votes.
        log_likelihood: Of all votes.
        n_iterations: Until it changed no more.
    """

    posterior: np.ndarray
    priors: np.ndarray
    confusion: np.ndarray
    expected: np.ndarray
    log_likelihood: float
    n_iterations: int

    @property
    def labels(self) -> np.ndarray:
        """The likeliest label of each item."""
        return self.posterior.argmax(1)


def dawid_skene(
    votes: Votes,
    tolerance: float = 1e-7,
    most_iterations: int = 500,
    smoothing: float = 0.0,
    known: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> DawidSkene:
    """Estimate labels and confusion matrices by EM (Dawid and Skene, 1979), from vote shares.

    Args:
        votes: The votes.
        tolerance: Ends when the log-likelihood changes by less.
        most_iterations: Ends in any case.
        smoothing: Votes added to each row of a confusion matrix, half of them right and the rest
            spread evenly; 0 is the paper's estimate, more keeps annotators with few votes sane.
        known: Label of items whose label is known (gold), -1 for the others.
        weights: Weight of each item (how often it was resampled); 1 when not given.
        start: Posteriors to begin with instead of the vote shares.
    """
    n_labels, n_annotators = votes.n_labels, votes.n_annotators
    posterior = votes.shares() if start is None else start.copy()
    weight = np.ones(votes.n_items) if weights is None else weights.astype(float)
    added = smoothing * (np.eye(n_labels) / 2 + (1 - np.eye(n_labels)) / 2 / (n_labels - 1))
    slots = votes.annotator * n_labels + votes.label
    seen = np.unique(votes.item)
    before, likelihood, n_iterations = -np.inf, -np.inf, 0
    expected = confusion = np.zeros((n_annotators, n_labels, n_labels))
    priors = np.full(n_labels, 1 / n_labels)
    for step in range(1, most_iterations + 1):
        n_iterations = step
        if known is not None:
            posterior[known >= 0] = np.eye(n_labels)[known[known >= 0]]
        weighted = posterior * weight[:, None]
        priors = weighted[seen].sum(0) / max(weighted[seen].sum(), _TINY)
        columns = [
            np.bincount(slots, weighted[votes.item, true], n_annotators * n_labels)
            for true in range(n_labels)
        ]
        expected = np.stack(columns, 1).reshape(n_annotators, n_labels, n_labels).swapaxes(1, 2)
        smoothed = expected + added
        confusion = smoothed / np.maximum(smoothed.sum(2, keepdims=True), _TINY)
        logs = _log_joint(votes, priors, confusion)
        top = logs.max(1, keepdims=True)
        sums = np.exp(logs - top).sum(1, keepdims=True)
        posterior = np.exp(logs - top) / sums
        likelihood = float(((np.log(sums) + top)[:, 0] * weight)[seen].sum())
        if abs(likelihood - before) < tolerance:
            break
        before = likelihood
    if known is not None:
        posterior[known >= 0] = np.eye(n_labels)[known[known >= 0]]
    return DawidSkene(posterior, priors, confusion, expected, likelihood, n_iterations)


def _log_joint(votes: Votes, priors: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    logs = np.log(np.maximum(confusion, _TINY))[votes.annotator, :, votes.label]
    columns = [np.bincount(votes.item, logs[:, j], votes.n_items) for j in range(votes.n_labels)]
    return np.stack(columns, 1) + np.log(np.maximum(priors, _TINY))


def informedness(confusion: np.ndarray) -> np.ndarray:
    """Return how much votes say of the label: 1 always right, 0 the same whatever the label is.

    The mean over the labels of the chance to be right, corrected for guessing; below zero the votes
    mislead.

    Args:
        confusion: ``[..., true, given]``.
    """
    n_labels = confusion.shape[-1]
    right = np.diagonal(confusion, axis1=-2, axis2=-1).mean(-1)
    return (right - 1 / n_labels) / (1 - 1 / n_labels)


def informedness_intervals(
    found: DawidSkene, n_draws: int = 2000, confidence: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Return the informedness of each annotator with an interval from its expected votes.

    Rows of a confusion matrix are drawn from their Dirichlet posterior under a uniform prior.
    """
    rng = np.random.default_rng(seed)
    tail = (1 - confidence) / 2
    intervals = []
    for expected in found.expected:
        draws = rng.standard_gamma(expected + 1 / len(expected), (n_draws, *expected.shape))
        values = informedness(draws / draws.sum(2, keepdims=True))
        low, high = np.quantile(values, [tail, 1 - tail])
        intervals.append(Interval(float(values.mean()), float(low), float(high)))
    return intervals


def accuracy_intervals(
    votes: Votes, found: DawidSkene, n_resamples: int = 200, confidence: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Return each annotator's share of right votes, with bounds over resampled items."""
    rng = np.random.default_rng(seed)
    tail = (1 - confidence) / 2

    def right(model: DawidSkene, weights: np.ndarray) -> np.ndarray:
        good = model.posterior[votes.item, votes.label] * weights[votes.item]
        sums = np.bincount(votes.annotator, good, votes.n_annotators)
        given = np.bincount(votes.annotator, weights[votes.item], votes.n_annotators)
        return np.divide(sums, given, out=np.full(len(sums), np.nan), where=given > 0)

    draws = []
    for _ in range(n_resamples):
        weights = np.bincount(rng.integers(0, votes.n_items, votes.n_items),
                              minlength=votes.n_items)  # fmt: skip
        model = dawid_skene(
            votes, tolerance=1e-3, most_iterations=20, weights=weights, start=found.posterior
        )
        draws.append(right(model, weights))
    low, high = np.nanquantile(np.array(draws), [tail, 1 - tail], axis=0)
    values = right(found, np.ones(votes.n_items))
    return [Interval(*map(float, one)) for one in zip(values, low, high, strict=True)]


@dataclass(frozen=True)
class Mace:
    """What the spam model found.

    Attributes:
        posterior: ``[n_items, n_labels]`` chance of each label.
        competence: Share of an annotator's votes for which the item was looked at.
        guesses: ``[n_annotators, n_labels]`` what is voted when it was not.
        n_iterations: Until it changed no more.
    """

    posterior: np.ndarray
    competence: np.ndarray
    guesses: np.ndarray
    n_iterations: int


def mace(
    votes: Votes, tolerance: float = 1e-6, most_iterations: int = 500, smoothing: float = 0.5
) -> Mace:
    """Estimate who votes without looking: the generative model of MACE (Hovy et al., 2013), by EM.

    A vote is the item's label with the annotator's competence, otherwise one of the guesses.

    Args:
        votes: The votes.
        tolerance: Ends when no competence changes by more.
        most_iterations: Ends in any case.
        smoothing: Pseudo-counts of each outcome.
    """
    n_labels, n_annotators = votes.n_labels, votes.n_annotators
    posterior = votes.shares()
    competence = np.full(n_annotators, 0.5)
    guesses = np.full((n_annotators, n_labels), 1 / n_labels)
    n_votes = np.bincount(votes.annotator, minlength=n_annotators)
    n_iterations = 0
    for step in range(1, most_iterations + 1):
        n_iterations = step
        guessed = (1 - competence[:, None]) * guesses
        by_guess = guessed[votes.annotator, votes.label]
        by_skill = competence[votes.annotator]
        # Only where the vote is the label can it come from having looked.
        right = posterior[votes.item, votes.label]
        spam = 1 - right * by_skill / (by_skill + by_guess)
        n_spam = np.bincount(votes.annotator, spam, n_annotators)
        now = (n_votes - n_spam + smoothing) / (n_votes + 2 * smoothing)
        slots = votes.annotator * n_labels + votes.label
        guesses = np.bincount(slots, spam, n_annotators * n_labels).reshape(n_annotators, n_labels)
        guesses = (guesses + smoothing) / (guesses + smoothing).sum(1, keepdims=True)
        change, competence = float(np.abs(now - competence).max()), now
        eye = np.eye(n_labels)
        confusion = (
            competence[:, None, None] * eye
            + (1 - competence)[:, None, None] * (guesses[:, None, :])
        )
        logs = _log_joint(votes, np.full(n_labels, 1 / n_labels), confusion)
        posterior = np.exp(logs - logs.max(1, keepdims=True))
        posterior /= posterior.sum(1, keepdims=True)
        if change < tolerance:
            break
    return Mace(posterior, competence, guesses, n_iterations)
