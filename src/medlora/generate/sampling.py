"""Choose the next token as users know it: repetition penalty, then temperature, top-k, top-p; 0 is greedy."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medlora.recipe import Generation


@dataclass(frozen=True, slots=True)
class Sampling:
    max_new_tokens: int = 300
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def from_recipe(cls, generation: Generation) -> "Sampling":
        fields = generation.model_dump(exclude={"prompts"})
        return cls(**fields)

    def override(self, **given: Any) -> "Sampling":
        """A copy with every argument that is not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


class Sampler:
    """Holds the random state of one answer."""

    def __init__(self, settings: Sampling, device: torch.device) -> None:
        from transformers import LogitsProcessorList
        from transformers.generation import logits_process as lp

        self.generator = torch.Generator(device)
        self.generator.manual_seed(settings.seed) if settings.seed is not None else self.generator.seed()
        self.greedy = settings.temperature == 0
        self.processors = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            self.processors.append(lp.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self.greedy:
            self.processors.append(lp.TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self.processors.append(lp.TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self.processors.append(lp.TopPLogitsWarper(settings.top_p))

    def __call__(self, ids: Tensor, logits: Tensor) -> int:
        """Next token id from all ids so far [1, T] and the last logits [1, V]."""
        scores = self.processors(ids, logits.float())
        if self.greedy:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
