"""Constrained answers of an untrained toy, which would never keep a format by itself."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("llguidance")

from medlora.errors import RecipeError
from medlora.generate.answer import Assistant
from medlora.generate.sampling import Sampling
from medlora.recipe import Base, Prompt

SCHEMA = json.dumps({
    "type": "object",
    "properties": {"dose_mg": {"type": "integer", "minimum": 1, "maximum": 99}, "route": {"enum": ["oral", "iv"]}},
    "required": ["dose_mg", "route"],
    "additionalProperties": False,
})  # fmt: skip


@pytest.fixture(scope="module")
def assistant(llama_folder: Path) -> Assistant:
    return Assistant.load(base=Base(model=str(llama_folder), compute_dtype="float32"), prompt=Prompt(template="llama2"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_keep_a_schema_and_a_pattern_beside_free_ones(assistant: Assistant, temperature: float) -> None:
    settings = Sampling(max_new_tokens=120, temperature=temperature, seed=3)
    asked = [[("user", f"Which dose, {i}?")] for i in range(3)]
    for answer in assistant.answer_many(asked, settings.override(json_schema=SCHEMA)):
        found = json.loads(answer.text)
        assert answer.finished and 1 <= found["dose_mg"] <= 99 and found["route"] in ("oral", "iv"), answer
    for answer in assistant.answer_many(asked, settings.override(regex=r"[0-9]{2} mg (daily|weekly)")):
        assert answer.finished and re.fullmatch(r"[0-9]{2} mg (daily|weekly)", answer.text), answer


def test_other_architectures_keep_a_pattern_too(assistant: Assistant) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = len(assistant.tokenizer)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=size, eos_token_id=2, bos_token_id=1)
    other = Assistant(GPT2LMHeadModel(config).eval(), assistant.tokenizer)
    assert other.slow
    assert other.ask("Yes?", Sampling(max_new_tokens=20, regex="(yes|no)")).text in ("yes", "no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Sampling(json_schema="{bad"), "the JSON schema cannot be used: key must be a string"),
        (Sampling(json_schema='{"type": "nope"}'), "the JSON schema cannot be used: Invalid type: nope"),
        (Sampling(regex="(a"), "the regex cannot be used"),
        (Sampling(regex="a", json_schema="{}"), "an answer can follow one of them"),
    ],
)
def test_what_cannot_be_used_is_said(assistant: Assistant, settings: Sampling, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        assistant.ask("Yes?", settings)
