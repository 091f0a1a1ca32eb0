"""Sampled frequencies against probabilities computed by hand, and distributions against Transformers' warpers."""

from typing import Any

import pytest
import torch

from medlora.generate.engine import Engine
from medlora.generate.request import Request
from medlora.generate.sampling import Controls, Sampler, Sampling, distribution, draw
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


def warped(scores: torch.Tensor, settings: Sampling) -> torch.Tensor:
    """Probabilities of one row by Transformers' own processors."""
    from transformers.generation import logits_process as lp

    warpers: list[Any] = [lp.TemperatureLogitsWarper(settings.temperature)]
    warpers += [lp.TopKLogitsWarper(settings.top_k)] if settings.top_k else []
    warpers += [lp.TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
    warpers += [lp.MinPLogitsWarper(settings.min_p)] if settings.min_p else []
    return lp.LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.int64), scores[None]).softmax(-1)[0]


MIXES = [
    [Sampling(temperature=0.7, top_p=0.9), Sampling(temperature=1.0, top_k=5), Sampling(temperature=2.0, min_p=0.1)],
    [Sampling(temperature=0.7, top_p=0.5, top_k=40), Sampling(temperature=1.5, top_k=7, top_p=0.8, min_p=0.05)],
    [Sampling(temperature=0.5, top_p=0.95), Sampling()],  # a greedy row beside a sampled one
    [Sampling(temperature=3.0, top_p=0.99)],  # more tokens than are looked at first
    [Sampling(temperature=1.3, min_p=0.02), Sampling(temperature=0.9)],
]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("vocabulary", [50, 2000])
def test_rows_of_one_batch_have_the_distributions_of_transformers(mix: list[Sampling], vocabulary: int) -> None:
    scores = 3 * torch.randn(len(mix), vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    found = distribution(scores, Controls(mix, torch.device("cpu")))
    for row, settings, p in zip(scores, mix, found, strict=True):
        if settings.temperature:
            torch.testing.assert_close(p, warped(row, settings), rtol=1e-4, atol=1e-6)


def test_draws_follow_the_cumulative_distribution_and_never_hit_what_has_no_probability() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    uniform = [0.0, 0.2499, 0.25, 0.9999999]
    found = draw(p.expand(4, -1), torch.tensor(uniform, dtype=torch.float64))
    assert found.tolist() == [1, 1, 3, 3]


def test_answers_have_the_distribution_of_the_model(toy_model: Any) -> None:
    """Chi-square of 4,000 sampled first and second tokens against the model's own probabilities."""
    from scipy.stats import chisquare

    settings = [Sampling(max_new_tokens=2, temperature=0.6, top_k=4, seed=i) for i in range(4000)]
    tokens = Engine(toy_model, rows=400).generate([Request([7, 8, 9], each) for each in settings])
    with toy_model.disable_adapter(), torch.inference_mode():
        first = toy_model(input_ids=torch.tensor([[7, 8, 9]])).logits[0, -1]
        target = warped(first, settings[0])
        kept = target.nonzero()[:, 0]
        fed = torch.tensor([[7, 8, 9, int(token)] for token in kept])
        following = torch.stack([warped(row, settings[0]) for row in toy_model(input_ids=fed).logits[:, -1]])
    joint = target[kept, None] * following
    counts = torch.zeros_like(joint)
    for one, two in tokens:
        counts[int((kept == one.id).nonzero()), two.id] += 1
    assert counts[joint == 0].sum() == 0
    often = joint * 4000 >= 5
    rest = [counts[~often].sum().item()], [4000 * joint[~often].sum().item()]
    observed = counts[often].tolist() + (rest[0] if rest[1][0] > 1e-6 else [])
    expected = (4000 * joint[often]).tolist() + (rest[1] if rest[1][0] > 1e-6 else [])
    scale = sum(observed) / sum(expected)
    assert len(observed) > 5 and chisquare(observed, [scale * e for e in expected]).pvalue > 1e-3
