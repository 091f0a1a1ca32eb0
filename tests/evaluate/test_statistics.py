"""Intervals and tests against SciPy, published figures, and simulation: how often they hold what they promise."""

import math

import numpy as np
import pytest

from medlora.evaluate.statistics import (
    Interval,
    Ratio,
    compare_proportions,
    compare_ratios,
    estimate,
    holm,
    mcnemar,
    verdict,
    wilson,
)

stats = pytest.importorskip("scipy.stats", reason="SciPy is the reference of these tests")


def mean(values: np.ndarray) -> Ratio:
    return Ratio(np.asarray(values, dtype=float), np.ones(len(values)))


@pytest.mark.parametrize(("successes", "items"), [(0, 7), (3, 7), (276, 500), (500, 500)])
def test_wilson_is_scipys(successes: int, items: int) -> None:
    theirs = stats.binomtest(successes, items).proportion_ci(method="wilson")
    ours = wilson(successes, items)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (5, 1), (12, 12), (40, 71), (900, 1000)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    theirs = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(theirs, rel=1e-9)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_bootstrap_interval_is_scipys_on_many_items() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=400)
    ours = estimate(mean(values))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_few_items_get_the_width_of_students_t() -> None:
    values = np.random.default_rng(3).normal(size=12)
    ours = estimate(mean(values))
    theirs = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert ours.high - ours.low == pytest.approx(theirs[1] - theirs[0], rel=0.05)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(4)
    covered = [(i := estimate(mean(generator.normal(size=15)), seed=n)).low < 0 < i.high for n in range(400)]
    assert 0.92 <= np.mean(covered) <= 0.98


def test_a_token_weighted_loss_is_not_a_mean_of_means() -> None:
    nll, tokens = np.array([10.0, 1, 1, 1, 1, 1]), np.array([100.0, 1, 1, 1, 1, 1])
    assert estimate(Ratio(nll, tokens)).value == pytest.approx(15 / 105)
    assert estimate(Ratio(nll, tokens, np.exp)).value == pytest.approx(math.exp(15 / 105))


def test_items_of_one_topic_are_drawn_together() -> None:
    """20 topics with 10 equal items each carry the information of 20 items."""
    topics = np.random.default_rng(5).normal(size=20)
    whole = estimate(mean(topics))
    clustered = estimate(mean(np.repeat(topics, 10)), [f"{i // 10:02}" for i in range(200)])
    alone = estimate(mean(np.repeat(topics, 10)))
    assert (clustered.low, clustered.high) == pytest.approx((whole.low, whole.high), abs=1e-9)
    assert alone.high - alone.low < 0.5 * (clustered.high - clustered.low)


def test_the_paired_bootstrap_agrees_with_the_paired_t_test() -> None:
    generator = np.random.default_rng(6)
    first = generator.normal(size=200)
    second = first + generator.normal(0.14, 0.6, size=200)
    ours, theirs = compare_ratios(mean(first), mean(second)), stats.ttest_rel(second, first)
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.01) and 0.001 < theirs.pvalue < 0.1
    interval = theirs.confidence_interval()
    assert (ours.difference.low, ours.difference.high) == pytest.approx((interval.low, interval.high), abs=0.015)
    assert ours.difference.value == pytest.approx(ours.second.value - ours.first.value)


def test_equal_models_are_seldom_called_different() -> None:
    generator, called = np.random.default_rng(7), 0
    for n in range(300):
        result = compare_ratios(mean(generator.normal(size=30)), mean(generator.normal(size=30)), seed=n)
        called += verdict(result.difference, result.p, lower_is_better=True) != "no difference shown"
    assert called / 300 <= 0.08


@pytest.mark.parametrize("items", [1, 3, 5])
def test_a_handful_of_items_shows_nothing(items: int) -> None:
    result = compare_ratios(mean(np.zeros(items)), mean(np.ones(items)))
    assert result.p >= 2.0 ** (1 - items)
    assert verdict(result.difference, result.p, lower_is_better=False) == "no difference shown"
    assert (result.difference.low is None) == (items < 5)


def test_the_paired_difference_of_proportions_covers_the_truth() -> None:
    """Right both 0.4, only the first 0.1, only the second 0.2, neither 0.3: the difference is 0.1."""
    generator, hit = np.random.default_rng(8), 0
    cells = np.array([[1.0, 1], [1, 0], [0, 1], [0, 0]])
    for _ in range(1000):
        drawn = cells[generator.choice(4, p=[0.4, 0.1, 0.2, 0.3], size=60)]
        found = compare_proportions(drawn[:, 0], drawn[:, 1]).difference
        hit += found.low <= 0.1 <= found.high
    assert 0.93 <= hit / 1000 <= 0.97


def test_the_paired_difference_of_proportions_is_the_bootstraps_on_many_items() -> None:
    drawn = np.repeat([[1.0, 1], [1, 0], [0, 1], [0, 0]], [400, 100, 200, 300], axis=0)
    closed = compare_proportions(drawn[:, 0], drawn[:, 1]).difference
    drawn_again = compare_ratios(mean(drawn[:, 0]), mean(drawn[:, 1])).difference
    assert (closed.low, closed.high) == pytest.approx((drawn_again.low, drawn_again.high), abs=0.003)


def test_the_items_needed_give_the_power_promised() -> None:
    """Simulated: with so many items McNemar's test sees the difference about 8 times in 10."""
    generator = np.random.default_rng(11)
    base = np.repeat([[1.0, 1], [0, 0], [1, 0], [0, 1]], [40, 30, 10, 20], axis=0)
    needed = compare_proportions(base[:, 0], base[:, 1]).items_needed
    assert needed is not None
    seen = []
    for _ in range(1000):
        drawn = generator.multinomial(needed, [0.4, 0.3, 0.1, 0.2])
        seen.append(mcnemar(int(drawn[2]), int(drawn[3])) < 0.05)
    assert 0.74 <= np.mean(seen) <= 0.84


def test_the_items_needed_of_a_mean_are_those_of_a_z_test() -> None:
    generator = np.random.default_rng(12)
    first = np.zeros(500)
    second = generator.normal(0.2, 1, size=500)
    needed = compare_ratios(mean(first), mean(second)).items_needed
    expected = ((1.959964 + 0.841621) * second.std() / second.mean()) ** 2
    assert needed == pytest.approx(expected, rel=0.05)
    assert compare_ratios(mean(first), mean(first)).items_needed is None
    assert compare_proportions(first, first).items_needed is None


def test_the_verdict_knows_the_direction_and_needs_both_signs() -> None:
    down = Interval(-0.5, -0.8, -0.2)
    assert verdict(down, 0.01, lower_is_better=True) == "better"
    assert verdict(down, 0.01, lower_is_better=False) == "worse"
    assert verdict(down, 0.06, lower_is_better=True) == "no difference shown"
    assert verdict(Interval(-0.5, -1.1, 0.1), 0.01, lower_is_better=True) == "no difference shown"
    assert verdict(Interval(-0.5, None, None), 0.01, lower_is_better=True) == "no difference shown"
