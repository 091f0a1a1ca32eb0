"""From item lines to scores: which metrics each kind of task has, which way is better, and how two sides compare.

An item line is a dict as `medlora evaluate` stores it; a side is the list of a model's item lines.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medlora.evaluate.statistics import (
    Array,
    Comparison,
    Interval,
    Ratio,
    compare_proportions,
    compare_ratios,
    estimate,
    holm,
    verdict,
    wilson,
)

TARGET = 32
"""Tokens that a row of kind `memory` is asked for."""
Item = dict[str, Any]
Entry = dict[str, Any]
CLUSTER = "topic"
"""Items that share this group are not independent and are resampled together."""


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    label: str
    of: Callable[[Item], float | None]
    """Value of one item, None where it is undefined; the score is sum(of) / sum(per)."""
    lower_is_better: bool | None = False
    """None: neither way is better."""
    per: Callable[[Item], float] = lambda item: 1.0
    shape: Callable[[Array], Array] = np.asarray
    proportion: bool = False
    digits: int = 3


def _claims(name: str) -> Callable[[Item], float | None]:
    return lambda item: (item.get("claims") or {}).get(name)


def _reproduced(of: Callable[[int], float]) -> Callable[[Item], float | None]:
    return lambda item: None if item["reproduced"] is None else of(item["reproduced"])


_ACC = Metric("acc", "accuracy", lambda item: item["acc"], proportion=True)
METRICS: dict[str, tuple[Metric, ...]] = {
    "loss": (
        Metric("loss", "loss (nats a token)", lambda i: i["nll"], True, lambda i: i["tokens"]),
        Metric("perplexity", "perplexity", lambda i: i["nll"], True, lambda i: i["tokens"], np.exp, digits=2),
        Metric("bits_per_byte", "bits per byte", lambda i: i["nll"] / math.log(2), True, lambda i: i["bytes"]),
    ),
    "choice": (
        _ACC,
        Metric("acc_norm", "accuracy, length-normalised", lambda item: item["acc_norm"], proportion=True),
    ),
    "letter": (
        _ACC,
        Metric("unparsed", "unparsed answers", lambda item: float(item["parsed"] is None), True, proportion=True),
    ),
    "memory": (  # that more comes back has no better way: text also comes back because it is understood
        Metric(
            "verbatim",
            f"{TARGET} tokens word for word",
            _reproduced(lambda n: float(n == TARGET)),
            None,
            proportion=True,
        ),
        Metric("reproduced", "share of them up to a miss", _reproduced(lambda n: n / TARGET), None),
        Metric("loss", "loss (nats a token)", lambda i: i["nll"], None, lambda i: i["tokens"]),
    ),
    "answer": (
        Metric("rougeL", "ROUGE-L", lambda item: item.get("rougeL")),
        Metric("chrf", "chrF", lambda item: item.get("chrf"), digits=2),
        Metric("claims_precision", "claims, precision", _claims("precision")),
        Metric("claims_recall", "claims, recall", _claims("recall")),
        Metric("repetition", "repetition", lambda item: item.get("repetition"), True),
        Metric("truncated", "truncated answers", lambda item: float(not item["finished"]), True, proportion=True),
        Metric("tokens", "answer length (tokens)", lambda item: item.get("tokens"), None, digits=1),
    ),
}


def metric(kind: str, name: str) -> Metric:
    return next(found for found in METRICS[kind] if found.name == name)


def measure(kind: str, sides: Mapping[str, Sequence[Item]], *, clustered: bool = True) -> dict[str, Entry]:
    """Every metric of one side, or of two sides with the same items in the same order.

    Returns:
        {metric: {side: Interval as a dict, ..., "items"}}, and for two sides `difference` (second - first), `p` and
        `items_needed`. An item whose value is undefined on either side is left out of that metric on both.
    """
    entries: dict[str, Entry] = {}
    for found in METRICS[kind]:
        rows = [row for row in zip(*sides.values(), strict=True) if all(found.of(item) is not None for item in row)]
        if rows:
            columns = [list(column) for column in zip(*rows, strict=True)]
            entries[found.name] = _entry(found, list(sides), columns, _units(columns[0]) if clustered else None)
    return entries


def correct(kind_entries: Sequence[tuple[str, dict[str, Entry]]]) -> int:
    """Add `p_holm` and `verdict` to every difference that has a better direction; all of them are one family.

    Returns:
        How many tests the family has.
    """
    family = [
        (found, entries[found.name])
        for kind, entries in kind_entries
        for found in METRICS[kind]
        if found.lower_is_better is not None and "p" in entries.get(found.name, {})
    ]
    for (found, entry), p_holm in zip(family, holm([entry["p"] for _, entry in family]), strict=True):
        difference = Interval(**entry["difference"])
        entry["p_holm"] = p_holm
        entry["verdict"] = verdict(difference, p_holm, lower_is_better=bool(found.lower_is_better))
    return len(family)


def _entry(found: Metric, names: list[str], columns: list[list[Item]], units: list[str] | None) -> Entry:
    scores = [_ratio(found, column) for column in columns]
    independent = found.proportion and units is None
    if len(names) == 1:
        one = wilson(round(scores[0].numerator.sum()), len(columns[0])) if independent else estimate(scores[0], units)
        return {names[0]: asdict(one), "items": len(columns[0])}
    compared: Comparison = (
        compare_proportions(scores[0].numerator, scores[1].numerator)
        if independent
        else compare_ratios(scores[0], scores[1], units)
    )
    return {
        names[0]: asdict(compared.first),
        names[1]: asdict(compared.second),
        "difference": asdict(compared.difference),
        "p": compared.p,
        "items": compared.items,
        "items_needed": compared.items_needed,
    }


def _ratio(found: Metric, items: list[Item]) -> Ratio:
    numerator = np.array([found.of(item) for item in items], dtype=np.float64)
    return Ratio(numerator, np.array([found.per(item) for item in items], dtype=np.float64), found.shape)


def _units(items: list[Item]) -> list[str] | None:
    """The topic of each item; None where no two share one."""
    topics = [item.get("group", {}).get(CLUSTER) or f"id {item['id']}" for item in items]
    return topics if len(set(topics)) < len(topics) else None
