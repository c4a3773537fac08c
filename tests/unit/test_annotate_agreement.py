"""Agreement and aggregation reproduce the published values of the classic data sets."""

import math

import numpy as np
import pytest

from puna.post.annotate import aggregate, agreement
from puna.post.annotate.intervals import (
    binomial_cdf,
    bootstrap,
    clopper_pearson,
    sample_size,
    upper_bound,
    wilson,
)
from tests.unit.rating_data import (
    ANAESTHETIST,
    ANAESTHETIST_LABELS,
    ANXIETY,
    FLEISS_1971,
    FLEISS_COUNTS,
    KRIPPENDORFF_3,
    KRIPPENDORFF_2011,
)


@pytest.mark.parametrize(
    ("ratings", "nominal", "ordinal", "interval", "ratio"),
    [  # to nine digits as fast-krippendorff 0.9.0 computes them; published to three
        (KRIPPENDORFF_2011, 0.743421053, 0.815387504, 0.849107143, 0.797402775),
        (KRIPPENDORFF_3, 0.691358025, 0.806721420, 0.810844893, 0.808943671),
        (FLEISS_1971, 0.433409828, 0.335857522, 0.288049626, 0.240010294),
        (ANXIETY, -0.023725212, 0.228386945, 0.170098608, 0.141801341),
    ],
)
def test_krippendorffs_alpha_on_all_levels(ratings, nominal, ordinal, interval, ratio):
    found = [
        agreement.krippendorff_alpha(ratings, level)
        for level in ("nominal", "ordinal", "interval", "ratio")
    ]
    assert found == pytest.approx([nominal, ordinal, interval, ratio], abs=1e-9)


def test_fleiss_kappa_of_1971_and_its_z():
    counts = agreement.counts_of(FLEISS_1971)
    assert agreement.fleiss_kappa(counts) == pytest.approx(0.4302445, abs=5e-8)  # R's irr
    assert agreement.fleiss_z(counts) == pytest.approx(17.65183, abs=5e-6)
    assert agreement.fleiss_kappa(FLEISS_COUNTS) == pytest.approx(0.20993070, abs=1e-8)


def test_fixed_and_free_margins_of_randolph():
    counts = np.array([[7, 1], [3, 5]])
    assert agreement.fleiss_kappa(counts) == pytest.approx(0.161905, abs=5e-7)
    assert agreement.fleiss_kappa(counts, "randolph") == pytest.approx(0.214286, abs=5e-7)


def test_cohens_kappa_plain_and_weighted():
    table = np.array([[0, 4, 1], [0, 8, 0], [0, 1, 5]])
    assert agreement.cohen_kappa(table) == pytest.approx(0.484162896, abs=1e-9)
    expected = {  # statsmodels 0.15 on the same table of six categories
        (0, 1): (0.119496855, 0.189189189, 0.296765120),
        (0, 2): (-0.165644172, -0.051051051, 0.069506726),
        (1, 2): (-0.006289308, 0.126213592, 0.229797980),
    }
    for (a, b), values in expected.items():
        pair = agreement.table_of(ANXIETY[:, a], ANXIETY[:, b], np.arange(1, 7))
        found = [agreement.cohen_kappa(pair, how) for how in ("none", "linear", "quadratic")]
        assert found == pytest.approx(values, abs=1e-9)


def test_a_category_that_nobody_chose_still_has_its_place():
    first, second = ANXIETY[:, 1], ANXIETY[:, 2]
    whole = agreement.cohen_kappa(agreement.table_of(first, second), "linear")
    occurring = np.unique([first, second])
    assert 5 not in occurring
    closed = agreement.table_of(first, second, occurring)
    assert whole == pytest.approx(0.126213592, abs=1e-9)
    assert agreement.cohen_kappa(closed, "linear") == pytest.approx(0.145907473, abs=1e-9)


def test_agreement_that_is_not_defined_is_nan():
    assert math.isnan(agreement.krippendorff_alpha(np.array([[1.0, np.nan], [np.nan, 2.0]])))
    assert math.isnan(agreement.krippendorff_alpha(np.ones((5, 3))))
    assert math.isnan(agreement.cohen_kappa(np.zeros((2, 2))))
    with pytest.raises(ValueError, match="equally many"):
        agreement.fleiss_kappa(np.array([[2, 0], [1, 2]]))


def test_intervals_hold_the_value_and_shrink_with_more_items():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 800)
    noisy = np.where(rng.random((800, 3)) < 0.8, truth[:, None], rng.integers(0, 3, (800, 3)))
    few = agreement.alpha_interval(noisy[:80], n_resamples=200)
    many = agreement.alpha_interval(noisy, n_resamples=200)
    assert few.low < few.value < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    kappa = agreement.kappa_interval(noisy[:, :2], n_resamples=100)
    assert kappa.low < kappa.value < kappa.high
    fleiss = agreement.fleiss_interval(agreement.counts_of(noisy), n_resamples=100)
    assert fleiss.value == pytest.approx(many.value, abs=2e-3)


def anaesthetist_votes():
    observer = (0, 0, 0, 1, 2, 3, 4)
    triples = [
        (item, observer[at], int(label) - 1)
        for item, row in enumerate(ANAESTHETIST)
        for at, label in enumerate(row)
    ]
    return aggregate.Votes(*np.array(triples).T, n_items=45, n_annotators=5, n_labels=4)


def test_dawid_and_skene_1979():
    found = aggregate.dawid_skene(anaesthetist_votes())
    assert found.priors == pytest.approx([0.3996, 0.4220, 0.1118, 0.0667], abs=6e-5)
    assert found.log_likelihood == pytest.approx(-192.89088, abs=1e-4)
    assert "".join(str(one + 1) for one in found.labels) == ANAESTHETIST_LABELS
    first = [
        [0.8895, 0.1105, 0, 0], [0.0706, 0.8764, 0.0530, 0],
        [0, 0.3388, 0.6612, 0], [0, 0, 0.5556, 0.4444],
    ]  # fmt: skip
    assert found.confusion[0] == pytest.approx(np.array(first), abs=6e-5)
    assert found.confusion[4][1] == pytest.approx([0.1590, 0.7345, 0.1064, 0], abs=6e-5)
    assert found.posterior.max(1).min() == pytest.approx(0.9479952, abs=1e-4)


def planted(n_items=400, seed=0):
    """Votes of 8 careful annotators, one who always says 0, and one who guesses."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n_items)
    careful = np.where(
        rng.random((n_items, 8)) < 0.85, truth[:, None], rng.integers(0, 3, (n_items, 8))
    )
    spam = np.stack([np.zeros(n_items, int), rng.integers(0, 3, n_items)], 1)
    labels = np.concatenate([careful, spam], 1)
    keep = rng.random(labels.shape) < 0.5
    item, annotator = np.nonzero(keep)
    votes = aggregate.Votes(item, annotator, labels[keep], n_items, 10, 3)
    return truth, votes


def test_spammers_are_told_from_careful_annotators():
    truth, votes = planted()
    competence = aggregate.mace(votes).competence
    assert competence[:8].min() > 0.6 > 0.25 > competence[8:].max()
    found = aggregate.dawid_skene(votes, smoothing=2)
    intervals = aggregate.informedness_intervals(found)
    assert min(one.low for one in intervals[:8]) > max(one.high for one in intervals[8:])
    assert (found.labels == truth).mean() > 0.95


def test_gold_is_believed_and_accuracy_has_bounds():
    truth, votes = planted(200)
    known = np.full(200, -1)
    known[:40] = truth[:40]
    found = aggregate.dawid_skene(votes, smoothing=2, known=known)
    assert (found.labels[:40] == truth[:40]).all()
    bounds = aggregate.accuracy_intervals(votes, found, n_resamples=30)
    assert all(one.low <= one.value <= one.high for one in bounds)
    assert bounds[0].low > bounds[8].high


def test_exact_bounds_of_shares():
    assert clopper_pearson(3, 20) == pytest.approx((0.15, 0.0320709, 0.3789268), abs=1e-6)
    assert clopper_pearson(0, 10)[1:] == pytest.approx((0.0, 0.3084971), abs=1e-6)
    assert upper_bound(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59), abs=1e-12)
    assert upper_bound(0, 0) == upper_bound(5, 5) == 1.0
    assert wilson(8, 10) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)
    assert binomial_cdf(2, 5, 0.5) == pytest.approx(0.5)


def test_a_sample_is_as_small_as_the_limit_allows():
    assert sample_size(0.05) == 59  # the first n with 0.95^n < 0.05
    for defects in (0, 1, 3):
        n = sample_size(0.1, n_defects=defects)
        assert upper_bound(defects, n) < 0.1 <= upper_bound(defects, n - 1)


def test_resampling_leaves_out_what_is_not_defined():
    found = bootstrap(lambda rows: math.nan if rows.sum() == 0 else rows.mean(), np.eye(3)[0])
    assert found.low > 0
    nothing = bootstrap(lambda rows: math.nan, np.zeros(3), 10)
    assert math.isnan(nothing.low)
