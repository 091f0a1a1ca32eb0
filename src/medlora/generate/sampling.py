"""Choose next tokens as users know it: repetition penalty, temperature, top-k, top-p, min-p, in Transformers' order.

Every row of a batch has settings of its own, and all are applied at once on the device. A row draws one uniform number
a token from its own seeded generator and takes the token at that place of the cumulative distribution, so its tokens do
not depend on which other rows share the batch.

Shapes: B rows, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medlora.recipe import Generation

WIDE = 256  # most likely tokens looked at first on a CPU, where sorting a vocabulary costs half a step


@dataclass(frozen=True, slots=True)
class Sampling:
    max_new_tokens: int = 300
    max_length: int | None = None
    """Prompt and answer together, in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative scores of tokens seen (Keskar et al. 2019, arXiv:1909.05858)."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    logprobs: int | None = None
    """Report the log-probability of each chosen token, and of this many likeliest ones; before any setting."""
    json_schema: str | None = None
    """The answer is JSON that this schema (as JSON text) allows, where the length limit does not cut it."""
    regex: str | None = None
    """The answer matches this as a whole."""

    @classmethod
    def from_recipe(cls, generation: Generation) -> "Sampling":
        fields = generation.model_dump(exclude={"prompts"})
        return cls(**fields)

    def override(self, **given: Any) -> "Sampling":
        """A copy with every argument that is not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def generator(self) -> random.Random:
        return random.Random(self.seed)


class Controls:
    """The settings of a batch's rows on the device; each [B, 1]."""

    def __init__(self, settings: Sequence[Sampling], device: torch.device) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32)[:, None].to(device)

        sampled = [s for s in settings if s.temperature]
        self.greedy = not sampled
        self.penalises = any(s.repetition_penalty != 1 for s in settings)
        self.narrows = any(s.top_p < 1 or s.top_k for s in sampled)
        self.widest = max((s.top_k or 0 for s in sampled), default=0) if all(s.top_k for s in sampled) else 0
        self.penalty = column([s.repetition_penalty for s in settings])
        self.temperature = column([s.temperature or 1.0 for s in settings])
        self.draws = column([float(s.temperature > 0) for s in settings])[:, 0] > 0
        self.top_k = column([s.top_k or float("inf") for s in settings])
        self.top_p = column([s.top_p for s in settings])
        self.min_p = column([s.min_p for s in settings])
        self.settings = settings

    def repeat(self, times: Sequence[int]) -> "Controls":
        """Each row as often as `times` says."""
        return Controls([s for s, n in zip(self.settings, times, strict=True) for _ in range(n)], self.draws.device)


def penalise(scores: Tensor, seen: Tensor, controls: Controls) -> Tensor:
    """Scores [B, V] after the penalty on tokens `seen` [B, V] bool."""
    lowered = torch.where(scores > 0, scores / controls.penalty, scores * controls.penalty)
    return torch.where(seen, lowered, scores)


def distribution(scores: Tensor, controls: Controls) -> Tensor:
    """What a row draws from: scores [B, V] float32 -> probabilities [B, V] float32."""
    scores = scores / controls.temperature
    if not controls.narrows:
        p = scores.softmax(-1)
        p = p.masked_fill(p < controls.min_p * p.amax(-1, keepdim=True), 0.0)
        return p / p.sum(-1, keepdim=True)
    values, order = _likeliest(scores, controls)
    p = (values - scores.logsumexp(-1, keepdim=True)).exp()
    p = p.masked_fill(torch.arange(p.shape[1], device=p.device) >= controls.top_k, 0.0)
    # top-p counts what top-k left; where that cut nothing, `values` may be the head of a longer list
    p = torch.where(controls.top_k < scores.shape[1], p / p.sum(-1, keepdim=True), p)
    before = p.cumsum(-1) - p
    p = p.masked_fill((before >= controls.top_p) | (p < controls.min_p * p[:, :1]), 0.0)
    return torch.zeros_like(scores).scatter_(1, order, p / p.sum(-1, keepdim=True))


def _likeliest(scores: Tensor, controls: Controls) -> tuple[Tensor, Tensor]:
    """Scores in falling order and their places, as many as the settings can keep."""
    V = scores.shape[1]
    if 0 < controls.widest < V:
        return scores.topk(controls.widest)
    if not scores.is_cuda and V > WIDE:
        values, order = scores.topk(WIDE)
        mass = (values - scores.logsumexp(-1, keepdim=True)).exp().sum(-1, keepdim=True)
        covered = (mass >= controls.top_p) & (controls.top_p < 1) | (controls.top_k <= WIDE)
        if bool(covered[controls.draws].all()):
            return values, order
    return scores.sort(-1, descending=True)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """The token [B] at place `uniform` [B] float64 in [0, 1) of each distribution p [B, V]."""
    cumulative = p.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]


def choose(scores: Tensor, controls: Controls, uniform: Tensor | None) -> Tensor:
    """Next tokens [B] from scores [B, V] float32; `uniform` [B] float64, None if all rows are greedy."""
    likeliest = scores.argmax(-1)
    if controls.greedy or uniform is None:
        return likeliest
    return torch.where(controls.draws, draw(distribution(scores, controls), uniform), likeliest)


def log_probabilities(logits: Tensor, tokens: Tensor, likeliest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the chosen tokens [B], of the likeliest ones [B, n], and which those are [B, n]; logits [B, V] float32."""
    every = logits.log_softmax(-1)
    values, order = every.topk(likeliest)
    return every.gather(1, tokens[:, None])[:, 0], values, order


class Sampler:
    """One answer's choices, for models that decode through Transformers."""

    def __init__(self, settings: Sampling, device: torch.device) -> None:
        self.controls, self.random = Controls([settings], device), settings.generator()

    def __call__(self, ids: Tensor, logits: Tensor, allowed: Tensor | None = None) -> int:
        """Next token id from all ids so far [1, T] and the last logits [1, V]; `allowed` [V] bool leaves some out."""
        scores = logits.float()
        if self.controls.penalises:
            seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids, True)
            scores = penalise(scores, seen, self.controls)
        if allowed is not None:
            scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        uniform = torch.tensor([self.random.random()], dtype=torch.float64, device=scores.device)
        return int(choose(scores, self.controls, uniform))
