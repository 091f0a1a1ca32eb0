"""Held-out loss: the mean negative log-likelihood of the tokens that carry a label, and its exponential."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
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


def held_out_loss(
    model: Any, examples: Sequence[Example], title: str | None = "Held-out loss", *, routed: bool = False
) -> HeldOut:
    """Token-weighted mean over all labelled tokens of `examples`.

    Rows pass packed where the model allows it, else one by one; neither pads, so both give the same figure. On a GPU
    whose memory a training run has filled they pass by themselves. Draws nothing from the generator.

    Args:
        title: of the progress bar; None for none.
        routed: packed rows take medlora's way already, as within a run.
    """
    with torch.random.fork_rng([]):
        try:
            return _held_out_loss(model, examples, title, routed, TOKENS_PER_ROW)
        except torch.OutOfMemoryError:
            if not routed:
                raise
        torch.cuda.empty_cache()
        return _held_out_loss(model, examples, title, routed, 0)


@torch.no_grad()
def _held_out_loss(model: Any, examples: Sequence[Example], title: str | None, routed: bool, limit: int) -> HeldOut:
    model.eval()
    total, tokens = 0.0, 0
    longest = max(len(example.input_ids) for example in examples)
    plain = None if routed else unsupported(model, longest)
    rows = [[e] for e in examples] if plain else _rows(examples, limit)
    way = nullcontext() if plain or routed else packing(model)
    with way, bar(title, len(examples)) if title else nullcontext() as progress:
        for row in rows:
            loss, count = _one_by_one(model, row[0]) if plain else packed_loss(model, pack(row))
            total, tokens = total + float(loss), tokens + int(count)
            if progress:
                progress.advance(len(row), f"loss {total / max(tokens, 1):.3f}")
    return HeldOut(total / tokens, tokens, len(examples))


def _rows(examples: Sequence[Example], limit: int) -> list[list[Example]]:
    """Fill rows up to so many tokens, in order."""
    rows: list[list[Example]] = [[]]
    held = 0
    for example in examples:
        if rows[-1] and held + len(example.input_ids) > limit:
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
