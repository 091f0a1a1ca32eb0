"""Sampled frequencies against probabilities computed by hand."""

import pytest
import torch

from medlora.generate.sampling import Sampler, Sampling
from medlora.recipe import Generation

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0]])
IDS = torch.tensor([[3]])


def frequencies(settings: Sampling, draws: int = 4000) -> torch.Tensor:
    sampler = Sampler(settings, torch.device("cpu"))
    return torch.bincount(torch.tensor([sampler(IDS, LOGITS) for _ in range(draws)]), minlength=5) / draws


def expected(temperature: float = 1.0, keep: int = 5) -> torch.Tensor:
    weights = (LOGITS[0] / temperature).exp()
    weights[keep:] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        (Sampling(temperature=1.0, seed=1), expected()),
        (Sampling(temperature=2.0, seed=1), expected(2.0)),
        (Sampling(temperature=1.0, top_k=2, seed=1), expected(keep=2)),
        (Sampling(temperature=1.0, top_p=0.7, seed=1), expected(keep=2)),  # 0.64 < 0.7 <= 0.88
        (Sampling(temperature=1.0, top_p=0.6, seed=1), expected(keep=1)),
    ],
)
def test_frequencies_follow_the_settings(settings: Sampling, target: torch.Tensor) -> None:
    error = (frequencies(settings) - target).abs()
    assert (error < 4 * (target * (1 - target) / 4000).sqrt() + 1e-9).all()  # four standard errors


def test_zero_temperature_is_greedy_and_a_penalty_moves_it() -> None:
    assert Sampler(Sampling(), torch.device("cpu"))(IDS, LOGITS) == 0
    assert Sampler(Sampling(repetition_penalty=3.0), torch.device("cpu"))(torch.tensor([[0]]), LOGITS) == 1


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), torch.device("cpu"))
        return [sampler(IDS, LOGITS) for _ in range(64)]

    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_settings_come_from_the_recipe_and_are_overridden_by_what_is_given() -> None:
    settings = Sampling.from_recipe(Generation(temperature=0.5, max_new_tokens=9, max_length=40))
    assert (settings.temperature, settings.max_new_tokens, settings.max_length) == (0.5, 9, 40)
    assert settings.override(temperature=0.0, top_p=None).temperature == 0.0
