"""What a difference between two models on the same items is worth: intervals, paired tests, items needed.

proportions  Wilson's interval (1927); their paired difference by Newcombe's tenth method (Statistics in Medicine 17,
             1998); exact McNemar test; sample size by Connor (Biometrics 43, 1987)
the rest     sum of numerators / sum of denominators over items: a mean, or a token-weighted loss. Bootstrap over units,
             which are items, or whole topics where items share one and so are not independent. Percentile intervals,
             expanded for few units (Hesterberg, American Statistician 69, 2015); the p-value centres the resampled
             differences on zero (Efron and Tibshirani 1993, chapter 16)
AUC          of two groups of items; Newcombe's fifth method (Statistics in Medicine 25, 2006, 559-573): Hanley and
             McNeil's variance at the bound itself, which holds near 0 and 1 too
many tests   Holm (1979)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE, POWER = 0.95, 0.8
RESAMPLES = 10_000
LEAST_UNITS = 5  # with fewer no interval is given
_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf((1 + CONFIDENCE) / 2)
_CHUNK = 2_000_000  # random draws held at once


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval; bounds are None where too few units were measured."""

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A score over items: shape(sum of `numerator` / sum of `denominator`), both float64 of shape (items,)."""

    numerator: Array
    denominator: Array
    shape: Callable[[Array], Array] = np.asarray
    """Monotone; exp turns a loss into a perplexity."""

    def of(self, sums: Array) -> Array:
        """The score of each row of `sums`, (..., 2): summed numerators and denominators."""
        return self.shape(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same items."""

    first: Interval
    second: Interval
    difference: Interval
    """second - first."""
    p: float
    """Two-sided, uncorrected."""
    items: int
    items_needed: int | None
    """Items at which a difference as large as this one is seen with power 0.8; None where there is none."""


def wilson(successes: int, items: int) -> Interval:
    """95 % interval of a proportion."""
    share, z2 = successes / items, _Z**2
    centre = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = _Z * math.sqrt(share * (1 - share) / items + z2 / (4 * items**2)) / (1 + z2 / items)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided p from the items that only one of the two models gets right."""
    discordant = first_only + second_only
    tail = sum(math.comb(discordant, k) for k in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def compare_proportions(first: Array, second: Array) -> Comparison:
    """Two models that are right (1) or wrong (0) on the same independent items; both of shape (items,)."""
    items = len(first)
    both, only_first = int(np.sum(first * second)), int(np.sum(first * (1 - second)))
    only_second = int(np.sum(second * (1 - first)))
    one, two = wilson(both + only_first, items), wilson(both + only_second, items)
    difference = _newcombe(both, only_first, only_second, items, one, two)
    needed = _items_for_proportions((only_first + only_second) / items, difference.value)
    return Comparison(one, two, difference, mcnemar(only_first, only_second), items, needed)


def _newcombe(both: int, only_first: int, only_second: int, items: int, one: Interval, two: Interval) -> Interval:
    """Interval of two - one: Wilson's bounds, squared and added, less what the two shares have in common."""
    neither = items - both - only_first - only_second
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    product = float(both * neither - only_first * only_second)
    if product > 0:  # continuity correction
        product = max(product - items / 2, 0.0)
    phi = product / math.sqrt(margins) if margins else 0.0

    def half(down: float, up: float) -> float:
        return math.sqrt(max(down**2 - 2 * phi * down * up + up**2, 0.0))

    assert one.low is not None and one.high is not None and two.low is not None and two.high is not None
    value = two.value - one.value
    low = value - half(two.value - two.low, one.high - one.value)
    return Interval(value, low, value + half(two.high - two.value, one.value - one.low))


def _items_for_proportions(discordant: float, difference: float) -> int | None:
    if difference == 0:
        return None
    power = _NORMAL.inv_cdf(POWER) * math.sqrt(max(discordant - difference**2, 0.0))
    return math.ceil((_Z * math.sqrt(discordant) + power) ** 2 / difference**2)


def estimate(score: Ratio, units: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """One model's score, with its bootstrap interval. `units`: the topic of each item; None takes items alone."""
    groups = _groups(len(score.numerator), units)
    sums = _unit_sums(groups, score)
    return _interval(score.of(sums.sum(0)), score.of(_resample(sums, seed)), len(sums))


def compare_ratios(first: Ratio, second: Ratio, units: Sequence[str] | None = None, seed: int = 0) -> Comparison:
    """Two models' scores on the same items, resampled together. `units` as in `estimate`."""
    items = len(first.numerator)
    sums = _unit_sums(_groups(items, units), first, second)
    drawn, whole = _resample(sums, seed), sums.sum(0)
    values = [first.of(whole[:2]), second.of(whole[2:])]
    spread = [first.of(drawn[:, :2]), second.of(drawn[:, 2:])]
    gap, gaps = values[1] - values[0], spread[1] - spread[0]
    one, two = (_interval(value, resampled, len(sums)) for value, resampled in zip(values, spread, strict=True))
    beyond = np.sum(np.abs(gaps - gap) >= abs(gap) - 1e-12)
    p = max((1 + beyond) / (1 + len(gaps)), 2.0 ** (1 - len(sums)))  # no less than that many signs could show
    needed = _items_for_ratios(items, float(gap), float(gaps.std()))
    return Comparison(one, two, _interval(gap, gaps, len(sums)), min(1.0, float(p)), items, needed)


def _items_for_ratios(items: int, difference: float, error: float) -> int | None:
    """The standard error falls with the root of the items."""
    if difference == 0:
        return None
    return max(1, math.ceil(items * ((_Z + _NORMAL.inv_cdf(POWER)) * error / difference) ** 2))


def auc(above: Array, below: Array) -> Interval:
    """Area under the ROC curve: the chance that one of `above` exceeds one of `below`, a tie counting half."""
    pairs = (above[:, None] > below) + 0.5 * (above[:, None] == below)
    value, least = float(pairs.mean()), min(pairs.shape)
    if least < LEAST_UNITS:
        return Interval(value, None, None)
    low, high = (_auc_bound(value, end, *pairs.shape) for end in (0.0, 1.0))
    return Interval(value, low, high)


def _auc_bound(value: float, end: float, above: int, below: int) -> float:
    """The area between `value` and `end` that lies as far from `value` as its own standard error allows."""
    more = (above + below) / 2 - 1
    near, far = value, end
    for _ in range(60):
        area = (near + far) / 2
        spread = area * (1 - area) * (1 + more * ((1 - area) / (2 - area) + area / (1 + area))) / (above * below)
        near, far = (area, far) if (value - area) ** 2 < _Z**2 * spread else (near, area)
    return near


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction; the order of `p` is kept."""
    corrected, running = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = running
    return corrected


def verdict(difference: Interval, p_holm: float, *, lower_is_better: bool) -> str:
    """`better` and `worse` need both a corrected p below 0.05 and an interval without zero."""
    if p_holm >= 1 - CONFIDENCE or not difference.excludes_zero:
        return "no difference shown"
    return "better" if (difference.value < 0) == lower_is_better else "worse"


def _groups(items: int, units: Sequence[str] | None) -> NDArray[np.intp]:
    return np.arange(items) if units is None else np.unique(np.asarray(units), return_inverse=True)[1]


def _unit_sums(groups: NDArray[np.intp], *scores: Ratio) -> Array:
    """(units, 2 x scores): numerator and denominator of each score, summed within each unit."""
    columns = [column for score in scores for column in (score.numerator, score.denominator)]
    return np.stack([np.bincount(groups, weights=column) for column in columns], axis=1)


def _resample(sums: Array, seed: int) -> Array:
    """(RESAMPLES, columns): the sums over as many units, drawn with replacement."""
    generator, units = np.random.default_rng(seed), len(sums)
    rows = max(1, _CHUNK // units)
    chunks = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    drawn = [sums[generator.integers(units, size=(count, units))].sum(1) for count in chunks]
    return np.concatenate(drawn)


def _interval(value: Array, resampled: Array, units: int) -> Interval:
    if units < LEAST_UNITS:
        return Interval(float(value), None, None)
    tail = _NORMAL.cdf(-math.sqrt(units / (units - 1)) * _student(units - 1))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def _student(freedom: int) -> float:
    """Student's t at 97.5 %, by the series 26.7.5 of Abramowitz and Stegun."""
    z, n = _Z, freedom
    terms = (
        z,
        (z**3 + z) / 4 / n,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96 / n**2,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / n**3,
    )
    return sum(terms)
