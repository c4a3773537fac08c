"""Rounds of quality assurance against majority voting, in a simulation with planted annotators.

    python benchmarks/bench_annotate.py [--worlds 10] [--items 3000]

The simulation takes the decisions of ``puna.post.annotate.rounds`` with annotators whose confusion
matrices are planted: careful ones, careless ones with a bias, and spammers who guess or always say
the same. Everything that somebody looks at costs one: a vote, a gold item, an audited item.
Majority voting spends the same on votes of annotators drawn at random.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import numpy as np

from puna.post.annotate import aggregate, rounds
from puna.post.annotate.intervals import Interval

N_LABELS = 4
KNOWN_CAREFUL = (0.78, 0.95)
"""Accuracy of careful annotators, drawn evenly."""


@dataclass
class World:
    """What is planted: labels of the items, and who annotates how.

    Attributes:
        truth: Label of each item.
        confusions: ``[n_annotators, true, given]``.
        spammers: Indices of those who do not look.
        seed: Of the draws.
        hard: Items on which everyone guesses half of the time; nobody is told which.
    """

    truth: np.ndarray
    confusions: np.ndarray
    spammers: frozenset[int]
    seed: int
    hard: np.ndarray
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed + 1)

    def answer(
        self, annotators: np.ndarray, labels: np.ndarray, hard: np.ndarray,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Return what annotators say of items with these labels."""
        rng = self.rng if rng is None else rng
        edges = np.cumsum(self.confusions[annotators, labels], axis=1)
        said = np.minimum((rng.random(len(annotators))[:, None] > edges).sum(1), N_LABELS - 1)
        guesses = hard & (rng.random(len(said)) < 0.5)
        return np.where(guesses, rng.integers(0, N_LABELS, len(said)), said)


def make_world(
    n_items: int, n_careful: int = 18, n_careless: int = 6, n_spammers: int = 6, seed: int = 0,
    hard_share: float = 0.0,
) -> World:  # fmt: skip
    """Plant a world; classes are as uneven as 40, 30, 20 and 10 %."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(N_LABELS, n_items, p=[0.4, 0.3, 0.2, 0.1])
    confusions = [_noisy(rng, rng.uniform(*KNOWN_CAREFUL)) for _ in range(n_careful)]
    for _ in range(n_careless):  # half right, and drawn to one label when wrong
        matrix = _noisy(rng, rng.uniform(0.5, 0.6))
        favourite = rng.integers(N_LABELS)
        matrix = 0.8 * matrix
        matrix[:, favourite] += 0.2
        confusions.append(matrix)
    for index in range(n_spammers):
        if index % 2:
            row = np.eye(N_LABELS)[rng.integers(N_LABELS)] * 0.94 + 0.015
        else:
            row = rng.dirichlet(np.full(N_LABELS, 8.0))
        confusions.append(np.tile(row, (N_LABELS, 1)))
    order = rng.permutation(len(confusions))
    spammers = frozenset(np.flatnonzero(order >= n_careful + n_careless).tolist())
    hard = rng.random(n_items) < hard_share
    return World(truth, np.array(confusions)[order], spammers, seed, hard)


def _noisy(rng: np.random.Generator, accuracy: float) -> np.ndarray:
    wrong = rng.dirichlet(np.ones(N_LABELS - 1), N_LABELS) * (1 - accuracy)
    matrix = np.eye(N_LABELS) * accuracy
    for label in range(N_LABELS):
        matrix[label, np.arange(N_LABELS) != label] = wrong[label]
    return matrix


@dataclass
class Outcome:
    """What a simulation gave.

    Attributes:
        defects: Share of wrong labels after each round.
        costs: What was spent until then, per item.
        found: Who was called a spammer.
        statuses: Status of each annotator.
        majority: Share of wrong labels of majority voting at the cost of the last round.
        model: The same by Dawid and Skene's model, also without rounds.
        bound: What the audit at the end says of the defect rate.
    """

    defects: list[float]
    costs: list[float]
    found: frozenset[int]
    statuses: list[str]
    majority: float
    model: float
    bound: float


class Rounds:
    """The rounds of a desk on a planted world."""

    def __init__(self, world: World, gold_share: float = 0.03, agree: float = 0.97) -> None:
        self.world, self.agree = world, agree
        n_gold = int(len(world.truth) * gold_share)
        # Gold items stand behind the others; their labels are known from the beginning.
        self.n = len(world.truth)
        self.hard = np.concatenate([world.hard, np.zeros(n_gold, bool)])
        gold_truth = world.rng.choice(world.truth, n_gold)
        self.truth = np.concatenate([world.truth, gold_truth])
        self.known = np.concatenate([np.full(self.n, -1), gold_truth])
        self.voted = np.zeros((len(self.truth), len(world.confusions)), bool)
        self.votes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.model: aggregate.DawidSkene | None = None
        self.statuses = ["new"] * len(world.confusions)
        self.n_spent = 0

    def vote(self, items: np.ndarray, weights: np.ndarray) -> None:
        """Let one more annotator vote on each item: one who has not, by weight."""
        rng, n = self.world.rng, len(self.world.confusions)
        keys = rng.random((len(items), n)) ** (1 / np.maximum(weights, 1e-9))
        keys[self.voted[items] | (weights == 0)] = -1
        chosen = keys.argmax(1)
        free = keys.max(1) >= 0
        items, chosen = items[free], chosen[free]
        self.voted[items, chosen] = True
        self.votes.append((items, chosen, self.answers(items, chosen)))
        self.n_spent += len(items)

    def answers(self, items: np.ndarray, annotators: np.ndarray) -> np.ndarray:
        """Return what annotators say of these items."""
        return self.world.answer(annotators, self.truth[items], self.hard[items])

    def vote_gold(self, per_annotator: int) -> None:
        """Let everyone who still gets items answer some gold items."""
        gold = np.arange(self.n, len(self.truth))
        for annotator, status in enumerate(self.statuses):
            left = gold[~self.voted[gold, annotator]]
            if status == "spam" or not len(left):
                continue
            items = self.world.rng.permutation(left)[:per_annotator]
            who = np.full(len(items), annotator)
            self.voted[items, annotator] = True
            self.votes.append((items, who, self.answers(items, who)))
            self.n_spent += len(items)

    def measure(self) -> None:
        """Estimate labels and annotators from all votes, as the desk does."""
        item, who, label = (np.concatenate(parts) for parts in zip(*self.votes, strict=True))
        votes = aggregate.Votes(item, who, label, len(self.truth), len(self.statuses), N_LABELS)
        self.model = aggregate.dawid_skene(votes, tolerance=1e-4, smoothing=4, known=self.known)
        self.intervals: list[Interval] = aggregate.informedness_intervals(self.model, 500)
        n_votes = np.bincount(who, minlength=len(self.statuses))
        for index, found in enumerate(self.intervals):
            self.statuses[index] = rounds.status_of(found, int(n_votes[index]), 20, 0.5, 0.25)

    def doubtful(self) -> np.ndarray:
        """Return the items whose votes do not agree."""
        assert self.model is not None
        return np.flatnonzero(self.model.posterior[: self.n].max(1) < self.agree)

    def defects(self) -> float:
        """Share of items whose label is wrong now."""
        assert self.model is not None
        return float((self.model.labels[: self.n] != self.world.truth).mean())

    def weights(self, statuses: tuple[str, ...]) -> np.ndarray:
        """Return who gets items, the better ones more often."""
        values = np.array([one.value for one in self.intervals])
        allowed = np.array([status in statuses for status in self.statuses])
        return np.where(allowed, np.maximum(values, 0.05) ** 2, 0.0)


def simulate(world: World, n_rounds: int = 5) -> Outcome:
    """Run the rounds: overlap, more for what is not agreed, then by the most reliable only."""
    desk = Rounds(world)
    everyone = np.ones(len(world.confusions))
    everything = np.arange(desk.n)
    defects, costs = [], []
    for number in range(1, n_rounds + 1):
        if number == 1:
            desk.vote_gold(10)
            desk.vote(everything, everyone)
            desk.vote(everything, everyone)
        else:
            if number == 2:
                desk.vote_gold(10)
            kinds = ("new", "doubtful", "trusted") if number == 2 else ("trusted",)
            desk.vote(desk.doubtful(), desk.weights(kinds))
        desk.measure()
        defects.append(desk.defects())
        costs.append(desk.n_spent / desk.n)
    sample = rounds.audit_size(desk.n, 0.05, 0.95, 3)
    drawn = world.rng.permutation(desk.n)[:sample]
    n_bad = int((desk.model.labels[drawn] != world.truth[drawn]).sum()) if desk.model else 0
    lot = rounds.judge_lot(desk.n, sample, n_bad, 0.05, 0.95)
    costs[-1] += sample / desk.n
    found = frozenset(i for i, status in enumerate(desk.statuses) if status == "spam")
    plain = without_rounds(world, costs[-1])
    return Outcome(defects, costs, found, desk.statuses, *plain, lot.bound)


def without_rounds(world: World, cost: float, n_repeats: int = 3) -> tuple[float, float]:
    """Share of wrong labels when as much is spent on votes of annotators drawn at random.

    Returns:
        By majority voting (ties count by chance), and by Dawid and Skene's model.
    """
    rng = np.random.default_rng(world.seed + 2)
    n, n_annotators = len(world.truth), len(world.confusions)
    by_majority, by_model = [], []
    for _ in range(n_repeats):
        # A cost between two whole numbers: some items get a vote more than others.
        n_votes = np.floor(cost) + (rng.random(n) < cost % 1)
        order = rng.random((n, n_annotators)).argsort(1)
        item, rank = np.nonzero(np.arange(n_annotators) < n_votes[:, None])
        who = order[item, rank]
        label = world.answer(who, world.truth[item], world.hard[item], rng)
        counts = np.zeros((n, N_LABELS))
        np.add.at(counts, (item, label), 1)
        best = counts == counts.max(1, keepdims=True)
        by_majority.append(1 - (best[np.arange(n), world.truth] / best.sum(1)).mean())
        votes = aggregate.Votes(item, who, label, n, n_annotators, N_LABELS)
        model = aggregate.dawid_skene(votes, tolerance=1e-3, smoothing=4)
        by_model.append((model.labels != world.truth).mean())
    return float(np.mean(by_majority)), float(np.mean(by_model))


def spam_scores(world: World, found: frozenset[int]) -> tuple[float, float]:
    """Return precision and recall of the spammers found."""
    hits = len(world.spammers & found)
    return hits / max(len(found), 1), hits / max(len(world.spammers), 1)


SETTINGS = {
    "18 careful, 6 careless, 6 spammers": (18, 6, 6, 0.0),
    "10 careful, 10 careless, 10 spammers": (10, 10, 10, 0.0),
    "18 careful, 6 careless, 6 spammers, a tenth of the items hard": (18, 6, 6, 0.1),
}
"""Name -> careful, careless and spamming annotators, and share of hard items."""


def run_rounds(n_worlds: int, n_items: int) -> None:
    """Simulate worlds of each setting and print their means."""
    print(f"{n_items} items, {N_LABELS} labels, {n_worlds} worlds per setting; everything that "
          "somebody looks at costs 1")  # fmt: skip
    for name, (careful, careless, spammers, hard) in SETTINGS.items():
        outcomes, scores = [], []
        for seed in range(n_worlds):
            world = make_world(n_items, careful, careless, spammers, seed, hard)
            outcomes.append(simulate(world))
            scores.append(spam_scores(world, outcomes[-1].found))
        _print_setting(name, outcomes, np.array(scores))


def _print_setting(name: str, outcomes: list[Outcome], scores: np.ndarray) -> None:
    defects = np.array([one.defects for one in outcomes])
    costs = np.mean([one.costs for one in outcomes], axis=0)
    print(f"\n{name}")
    for number, (rate, cost) in enumerate(zip(defects.mean(0), costs, strict=True), 1):
        print(f"  after round {number}: defect rate {100 * rate:5.2f} %, cost {cost:.2f} per item")
    falls = int((np.diff(defects, axis=1) < 0).all(1).sum())
    ratios = defects[:, -1] / np.array([one.majority for one in outcomes])
    print(f"  it fell in every round in {falls} of {len(outcomes)} worlds")
    plain = np.mean([[one.majority, one.model] for one in outcomes], axis=0)
    print(f"  at equal cost without rounds: majority voting {100 * plain[0]:.2f} %, "
          f"Dawid-Skene {100 * plain[1]:.2f} %")  # fmt: skip
    print(f"  rounds leave {ratios.mean():.2f} of the defects of majority voting, at most "
          f"{ratios.max():.2f}")  # fmt: skip
    passed = np.mean([one.bound < 0.05 for one in outcomes])
    print(f"  the audit finds the upper bound under 5 % in {passed:.0%} of the worlds")
    (precision, recall), (p_low, r_low) = scores.mean(0), scores.min(0)
    print(f"  spammers: precision {precision:.3f} (lowest {p_low:.2f}), recall {recall:.3f} "
          f"(lowest {r_low:.2f})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=10)
    parser.add_argument("--items", type=int, default=3000)
    given = parser.parse_args()
    run_rounds(given.worlds, given.items)


if __name__ == "__main__":
    main()
