"""Was it in the training text? The share of each item's word n-grams that also stand in the training data.

Words are runs of letters and digits in lower case. With n = 8 (as in PaLM, Chowdhery et al. 2022, arXiv:2204.02311) a
shared sequence is rarely chance, but a standing phrase of a source counts too. An item with fewer than n words has no
n-gram and counts as 0. A paraphrase is not seen.
"""

import re
from collections.abc import Iterable, Iterator

N = 8
_WORD = re.compile(r"[^\W_]+")


def overlap(items: dict[str, str], training: Iterable[str], n: int = N) -> dict[str, float]:
    """{item id: share of its distinct n-grams found in `training`} for {item id: text}.

    Memory grows with the items, not with the training text.
    """
    grams = {key: set(_grams(text, n)) for key, text in items.items()}
    looked_for = set().union(*grams.values())
    seen: set[tuple[str, ...]] = set()
    for text in training:
        seen.update(looked_for.intersection(_grams(text, n)))
    return {key: round(len(own & seen) / len(own), 4) if own else 0.0 for key, own in grams.items()}


def _grams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return zip(*(words[i:] for i in range(n)), strict=False)
