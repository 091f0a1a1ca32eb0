"""Does a model know when it is right? From the option likelihoods of stored `choice` items; pure functions.

The confidence of an answer is its share of the options' total likelihood: softmax over the log-likelihoods, the largest
value. Expected calibration error and reliability bins: Naeini et al. 2015, "Obtaining well calibrated probabilities
using Bayesian binning"; Guo et al. 2017, arXiv:1706.04599.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medlora.evaluate.summary import Side

Item = dict[str, Any]
BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    low: float
    high: float
    count: int
    confidence: float
    """Mean over the bin's items."""
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well one side knows when it is right on one task."""

    task: str
    side: str
    bins: list[Bin]
    error: float
    """Expected calibration error."""
    coverage: dict[float, float]
    confident_errors: list[Item]


def calibrate(tasks: Mapping[str, Mapping[str, Side]]) -> list[Calibration]:
    """Of every multiple-choice task and side of an evaluation, as `summary.read` gives them."""
    found = []
    for task, sides in tasks.items():
        for name, side in sides.items():
            if side.header["kind"] == "choice":
                items = list(side.items.values())
                error, coverage = expected_calibration_error(items), accuracy_at_coverage(items)
                found.append(Calibration(task, name, reliability(items), error, coverage, confident_errors(items)))
    return found


def confidence(item: Item) -> float:
    """Share of the likelihood that the most likely option has, from 1 / options to 1."""
    values = item["loglikelihoods"]
    top = max(values)
    return 1 / sum(math.exp(value - top) for value in values)


def reliability(items: Sequence[Item], bins: int = BINS) -> list[Bin]:
    """Accuracy against confidence in bins of equal width over [0, 1]; empty bins are left out."""
    placed: list[list[Item]] = [[] for _ in range(bins)]
    for item in items:
        placed[min(int(confidence(item) * bins), bins - 1)].append(item)
    return [
        Bin(i / bins, (i + 1) / bins, len(held), _mean([confidence(x) for x in held]), _mean([x["acc"] for x in held]))
        for i, held in enumerate(placed)
        if held
    ]


def expected_calibration_error(items: Sequence[Item], bins: int = BINS) -> float:
    """Mean distance of accuracy from confidence over the bins, weighted by their items: 0 is calibrated."""
    return sum(b.count * abs(b.accuracy - b.confidence) for b in reliability(items, bins)) / len(items)


def accuracy_at_coverage(
    items: Sequence[Item], coverages: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
) -> dict[float, float]:
    """{share of the items answered, the most confident first: accuracy among them}; at least one item each."""
    ranked = sorted(items, key=confidence, reverse=True)
    counts = {coverage: max(1, round(coverage * len(ranked))) for coverage in coverages}
    return {coverage: _mean([item["acc"] for item in ranked[:count]]) for coverage, count in counts.items()}


def confident_errors(items: Sequence[Item], least: float = 0.8) -> list[Item]:
    """Wrong answers of at least this confidence, the most confident first."""
    wrong = [item for item in items if not item["acc"] and confidence(item) >= least]
    return sorted(wrong, key=confidence, reverse=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
