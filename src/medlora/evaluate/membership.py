"""Can trained rows be told from rows that were held out, by what the tuning gained on each?

The attack needs the model before tuning and nothing of the training: a row's gain is by how much its loss fell, which
takes out how hard its text is (a reference model, as in Carlini et al. 2022, arXiv:2112.03570). The area under the ROC
curve is the chance that a trained row gained more than a held-out one: 0.5 is a guess, 1 gives every row away.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from medlora.evaluate.metrics import Item
from medlora.evaluate.statistics import Array, auc


def membership(trained: Mapping[str, Mapping[str, Item]], held: Mapping[str, Mapping[str, Item]]) -> dict[str, Any]:
    """{"auc": Interval as a dict, "trained": rows, "held_out": rows} from {side: {id: item}} of each."""
    inside, outside = _gains(trained), _gains(held)
    return {"auc": asdict(auc(inside, outside)), "trained": len(inside), "held_out": len(outside)}


def _gains(sides: Mapping[str, Mapping[str, Item]]) -> Array:
    """Nats a token."""
    before, after = sides["untuned"], sides["tuned"]
    return np.array([(before[i]["nll"] - after[i]["nll"]) / after[i]["tokens"] for i in after if i in before])
