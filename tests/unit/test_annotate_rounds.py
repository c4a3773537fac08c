"""The decisions of the rounds, and a simulation with planted annotators that takes them."""

import numpy as np
import pytest
from bench_annotate import make_world, simulate, spam_scores

from puna.post.annotate import rounds
from puna.post.annotate.intervals import Interval


def test_votes_agree_when_the_label_is_likely_enough():
    unknown = [None, None]
    assert rounds.gate([1, 1], unknown, 2, 0.9) == (1, pytest.approx(16 / 17), True)
    assert not rounds.gate([0, 1], unknown, 2, 0.9).agreed
    assert not rounds.gate([1], [None], 2, 0.9).agreed
    assert rounds.gate([1], [None], 2, 0.9, alone_is_enough=True).agreed


def test_a_vote_that_tells_nothing_changes_nothing():
    spam = np.tile([0.5, 0.3, 0.2], (3, 1))
    with_spam = rounds.posterior_of([2, 0], [None, spam], 3)
    assert with_spam == pytest.approx(rounds.posterior_of([2], [None], 3))
    misleading = 1 - np.eye(2)
    assert rounds.gate([0], [misleading], 2, 0.9) == (1, pytest.approx(1.0), True)


def test_the_status_follows_the_interval():
    def status(low, high, n=100):
        return rounds.status_of(Interval((low + high) / 2, low, high), n, 20, 0.5, 0.25)

    assert status(0.6, 0.8) == "trusted"
    assert status(0.4, 0.8) == "doubtful"
    assert status(0.0, 0.2) == "spam"
    assert status(0.0, 0.2, n=19) == "new"


def test_a_small_batch_is_looked_at_as_a_whole():
    assert rounds.audit_size(30, 0.05, 0.95, 1) == 30
    assert rounds.judge_lot(30, 30, 1, 0.05, 0.95) == (30, 1, pytest.approx(1 / 30), True)
    n = rounds.audit_size(10_000, 0.05, 0.95, 1)
    assert n == 93
    assert rounds.judge_lot(10_000, n, 1, 0.05, 0.95).accepted
    assert not rounds.judge_lot(10_000, n, 2, 0.05, 0.95).accepted


@pytest.mark.parametrize("hard_share", [0.0, 0.1])
def test_rounds_beat_majority_voting_at_equal_cost_and_find_the_spammers(hard_share):
    world = make_world(1500, seed=11, hard_share=hard_share)
    found = simulate(world)
    assert (np.diff(found.defects) < 0).all()
    assert found.defects[-1] < 0.5 * found.majority
    assert min(spam_scores(world, found.found)) >= 0.9
