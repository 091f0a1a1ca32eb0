"""Held-out loss: the mean negative log-likelihood of the tokens that carry a label, and its exponential."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medlora.data.prompts import IGNORE, Example
from medlora.model.packed import pack, packed_loss, packing, unsupported
from medlora.progress import bar

TOKENS_PER_ROW = 4096


@dataclass(frozen=True, slots=True)
class HeldOut:
    loss: float
    """Nats a token, averaged over tokens."""
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def held_out_loss(model: Any, examples: Sequence[Example], title: str = "Held-out loss") -> HeldOut:
    """Token-weighted mean over all labelled tokens of `examples`.

    Rows pass packed where the model allows it, else one by one; neither pads, so both give the same figure.
    """
    model.eval()
    total, tokens = 0.0, 0
    longest = max(len(example.input_ids) for example in examples)
    plain = unsupported(model, longest)
    rows = [[e] for e in examples] if plain else _rows(examples)
    with packing(model) if not plain else torch.no_grad(), bar(title, len(examples)) as progress:
        for row in rows:
            loss, count = _one_by_one(model, row[0]) if plain else packed_loss(model, pack(row))
            total, tokens = total + float(loss), tokens + int(count)
            progress.advance(len(row), f"loss {total / max(tokens, 1):.3f}")
    return HeldOut(total / tokens, tokens, len(examples))


def _rows(examples: Sequence[Example]) -> list[list[Example]]:
    """Fill rows up to TOKENS_PER_ROW, in order."""
    rows: list[list[Example]] = [[]]
    held = 0
    for example in examples:
        if rows[-1] and held + len(example.input_ids) > TOKENS_PER_ROW:
            rows.append([])
            held = 0
        rows[-1].append(example)
        held += len(example.input_ids)
    return rows


def _one_by_one(model: Any, example: Example) -> tuple[torch.Tensor, int]:
    ids = torch.tensor([example.input_ids], device=model.device)
    labels = torch.tensor(example.labels[1:], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return loss, example.trained
