"""Text, stop strings and many answers at once; the embedded base beside Transformers' generate."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MEDQUAD, TEXTS

from medlora.data.prompts import prompt_ids
from medlora.generate.answer import Assistant, Messages
from medlora.generate.sampling import Sampling
from medlora.generate.text import Text
from medlora.recipe import Base, Prompt

QUESTIONS = int(os.environ.get("MEDLORA_QUESTIONS", "8"))


@pytest.fixture(scope="module")
def assistant(llama_folder: Path) -> Assistant:
    return Assistant.load(base=Base(model=str(llama_folder), compute_dtype="float32"), prompt=Prompt(template="llama2"))


def conversation(question: str) -> Messages:
    return [("user", question)]


def test_the_stream_is_the_answer_and_many_are_each_alone(assistant: Assistant) -> None:
    settings = Sampling(max_new_tokens=24, temperature=0.9, seed=5)
    conversations = [conversation(text[:40]) for text in TEXTS]
    together = assistant.answer_many(conversations, settings)
    for messages, answer in zip(conversations, together, strict=True):
        assert "".join(assistant.stream(messages, settings)).strip() == answer.text
        assert assistant.answer(messages, settings).text == answer.text
        assert answer.finished or answer.tokens == 24
    assert len({answer.text for answer in together}) > 1


def test_an_answer_ends_before_a_stop_string(assistant: Assistant) -> None:
    messages, settings = conversation("What is gout?"), Sampling(max_new_tokens=40, temperature=0.9, seed=1)
    whole = assistant.answer(messages, settings)
    stop = whole.text[9:12]
    cut = assistant.answer(messages, settings.override(stop=(stop, "never this")))
    assert cut.text == whole.text[: whole.text.index(stop)].strip() and cut.finished and cut.tokens < whole.tokens
    assert "".join(assistant.stream(messages, settings.override(stop=(stop,)))).strip() == cut.text


def test_text_comes_in_whole_characters_and_never_shows_the_start_of_a_stop_string(assistant: Assistant) -> None:
    said = "Fièvre 🌡 at 39 °C.\nUser: no"
    text, shown = Text(assistant.tokenizer, ["\nUser:"]), ""
    ids = assistant.tokenizer(said, add_special_tokens=False)["input_ids"]
    for i in range(len(ids)):
        stopped = text.ends_with(ids[: i + 1])
        shown += text.piece(last=stopped)
        assert said.startswith(shown) and "\n" not in shown
        if stopped:
            break
    assert shown == "Fièvre 🌡 at 39 °C."


def test_other_architectures_decode_through_transformers_and_it_is_said(assistant: Assistant) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = len(assistant.tokenizer)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=size, eos_token_id=2, bos_token_id=1)
    other = Assistant(GPT2LMHeadModel(config).eval(), assistant.tokenizer)
    assert assistant.slow is None and other.slow == "gpt2 is not of the LLaMA family (llama, mistral, qwen2)"
    messages = conversation("What is gout?")
    answers = other.answer_many([messages, messages], Sampling(max_new_tokens=6, logprobs=2))
    prompt = torch.tensor([prompt_ids(other.tokenizer, messages)])
    target = other.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    for answer in answers:
        assert [token.id for token in answer.logprobs] == target[0, prompt.shape[1] :].tolist()
        assert all(token.top[0] == (token.id, token.logprob) for token in answer.logprobs)


@pytest.fixture(scope="module")
def real(embedded: Path) -> Assistant:
    return Assistant.load(base=Base(compute_dtype="float32"))


@pytest.mark.slow
@pytest.mark.skipif(not MEDQUAD.is_dir(), reason="MedQuAD is not beside this checkout")
def test_greedy_answers_of_the_embedded_base_are_those_of_transformers(real: Assistant) -> None:
    """MEDLORA_QUESTIONS=200 asks two hundred. Where tokens part, both logits must be within float32's rounding."""
    with gzip.open(MEDQUAD / "valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        asked = [conversation(json.loads(line)["question"]) for line, _ in zip(lines, range(QUESTIONS), strict=False)]
    ours = real.answer_many(asked, Sampling(max_new_tokens=24, logprobs=0))
    for messages, answer in zip(asked, ours, strict=True):
        prompt = prompt_ids(real.tokenizer, messages)
        found = [token.id for token in answer.logprobs]
        target = theirs(real.model, prompt, 24)
        parted = next((i for i, (a, b) in enumerate(zip(found, target, strict=False)) if a != b), None)
        if parted is None:
            assert found == target
            continue
        with torch.inference_mode():
            logits = real.model(input_ids=torch.tensor([prompt + target[:parted]])).logits[0, -1]
        gap = abs(float(logits[found[parted]] - logits[target[parted]]))
        assert gap < 1e-5 * float(logits.abs().max()), f"{messages}: token {parted}, logits {gap} apart"


def theirs(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True
        )
    return list(out[0, len(prompt) :].tolist())
