"""Scores of many options at once equal a plain forward pass of each option alone, and lm-evaluation-harness's own."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tuned_toy

from medlora.data.prompts import IGNORE, Example
from medlora.evaluate.likelihood import Request, choice_request, loss_request, score
from medlora.evaluate.score import choice_lines
from medlora.evaluate.tasks import load_task
from medlora.generate.answer import Assistant
from medlora.recipe import Base, Recipe

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
QUESTIONS = [
    ("Question: What is gout?\nAnswer:", [" a form of arthritis in the joints", " x", " a worm", " glucose"]),
    ("The spleen filters", [" blood", " the blood and stores platelets"]),
    ("Asthma is a disease of the ", ["airways", "joints of the foot"]),
]


@pytest.fixture(scope="module")
def assistant(llama_folder: Path) -> Any:
    return tuned_toy(llama_folder, 0.05)


@torch.no_grad()
def alone(model: Any, prefix: list[int], option: list[int]) -> float:
    logits = model(input_ids=torch.tensor([prefix + option]), use_cache=False).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(prefix) + i - 1, token]) for i, token in enumerate(option))


def requests(assistant: Any) -> list[Request]:
    return [choice_request(assistant.tokenizer, prompt, options, 256) for prompt, options in QUESTIONS]


def flat(batches: Iterator[list[list[float]]]) -> list[list[float]]:
    return [values for batch in batches for values in batch]


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_options_that_share_a_prefix_score_as_each_alone(assistant: Any, tuned: bool, tokens: int) -> None:
    from contextlib import nullcontext

    with nullcontext() if tuned else assistant.model.disable_adapter():
        found = flat(score(assistant.model, requests(assistant), tokens))
        for (prompt, options), values in zip(QUESTIONS, found, strict=True):
            prefix = assistant.tokenizer(prompt.rstrip())["input_ids"]
            for option, value in zip(options, values, strict=True):
                whole = assistant.tokenizer(prompt + option)["input_ids"]
                expected = alone(assistant.model, prefix, whole[len(prefix) :])
                assert value == pytest.approx(expected, abs=2e-4), (prompt, option)


def test_a_model_that_takes_no_packed_rows_gets_the_same_scores(
    assistant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = flat(score(assistant.model, requests(assistant)))
    monkeypatch.setattr("medlora.evaluate.likelihood.unsupported", lambda model, length: "not of the family")
    for a, b in zip(packed, flat(score(assistant.model, requests(assistant))), strict=True):
        assert a == pytest.approx(b, abs=2e-4)


def test_a_prompt_longer_than_the_context_loses_its_left_end(assistant: Any) -> None:
    prompt, options = "gout " * 300 + "is", [" a worm", " x"]
    request = choice_request(assistant.tokenizer, prompt, options, 64)
    whole = assistant.tokenizer(prompt)["input_ids"]
    longest = max(len(target) for target in request.targets)
    assert request.ids[: request.prefix] == whole[-(64 + 1 - longest) :]
    assert request.cut == len(whole) - request.prefix > 0
    expected = alone(assistant.model, request.ids[: request.prefix], [token for _, token in request.targets[1]])
    assert next(score(assistant.model, [request]))[0][1] == pytest.approx(expected, abs=2e-4)


@torch.no_grad()
def test_the_loss_of_a_row_is_cross_entropy_over_its_labels(assistant: Any) -> None:
    ids = assistant.tokenizer("Gout is a form of arthritis in which crystals settle.")["input_ids"]
    labels = [IGNORE if i < 4 or i == 7 else token for i, token in enumerate(ids)]
    value = -next(score(assistant.model, [loss_request(Example("x", ids, labels))]))[0][0]
    logits = assistant.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=IGNORE, reduction="sum")
    assert value == pytest.approx(float(expected), rel=1e-5)


CASES = [
    ("pubmedqa", "pubmedqa", "pubmedqa/ori_pqal_dev.json.gz", "pubmedqa/ori_pqal_dev.json.gz", 3, 0),
    ("medqa", "medqa", "medqa/phrases_no_exclude_sample.jsonl", "medqa/phrases_no_exclude_sample.jsonl", 3, 0),
    ("medmcqa", "medmcqa", "medmcqa/dev_sample.json", "medmcqa/dev_sample.json", 4, 0),
    ("mmlu", "mmlu_anatomy", "mmlu", "mmlu/val/anatomy_val.csv", 4, 0),
    ("mmlu", "mmlu_anatomy", "mmlu", "mmlu/val/anatomy_val.csv", 2, 5),
]


@pytest.fixture(scope="module")
def bench() -> Any:
    """bench/evaluation.py, which feeds local rows to lm-evaluation-harness's own task definitions."""
    spec = importlib.util.spec_from_file_location("evaluation", Path(__file__).parents[2] / "bench" / "evaluation.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@published
@pytest.mark.parametrize(("task", "theirs", "source", "rows", "count", "shots"), CASES)
def test_acc_and_acc_norm_equal_lm_evaluation_harness_item_by_item(
    embedded: Path, bench: Any, task: str, theirs: str, source: str, rows: str, count: int, shots: int
) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    base = Assistant.load(base=Base(compute_dtype="float32"))
    ours: Any = load_task(task, Recipe(), str(DATA / source), shots, count).items
    lm = huggingface.HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=4)
    examples = bench.published_rows(theirs, DATA / "mmlu/dev/anatomy_dev.csv", shots) if shots else []
    samples = bench.harness(lm, theirs, bench.published_rows(theirs, DATA / rows, count), examples)
    assert len(samples) == len(ours) == count
    for line, sample in zip(choice_lines(base, ours, tuned=False), samples, strict=True):
        assert line["prompt"] == sample["arguments"][0][0]
        assert line["loglikelihoods"] == pytest.approx([float(r[0][0]) for r in sample["resps"]], abs=1e-3)
        assert (line["acc"], line["acc_norm"]) == (sample["acc"], sample["acc_norm"])
