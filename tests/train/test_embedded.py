"""The embedded base for real: it learns to stop, and its adapter works outside medlora."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medlora.generate.answer import Assistant
from medlora.generate.sampling import Sampling
from medlora.recipe import Base, load_recipe
from medlora.train import run

pytestmark = pytest.mark.slow
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "brown", "grey", "pink", "orange"]
THINGS = ["pill", "syrup", "patch", "vial", "box"]


@pytest.fixture(scope="module")
def tuned(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 50 short rows."""
    folder = tmp_path_factory.mktemp("fifty")
    rows = [
        {"prompt": f"Where is the {c} {t}?", "completion": f"The {c} {t} is in the cabinet."}
        for c in COLOURS
        for t in THINGS
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = load_recipe(
        "demo",
        [f"data.path={folder / 'rows.jsonl'}", "data.group=null", "data.valid_fraction=0", "training.max_steps=14",
         "training.warmup_steps=1", "evaluation.before_and_after=false", "training.learning_rate=2e-3"],
    )  # fmt: skip
    return run.train(recipe, folder / "run", lambda line: None).folder / "adapter"


def test_a_model_tuned_on_fifty_short_rows_ends_its_answers_by_itself(tuned: Path) -> None:
    assistant = Assistant.load(tuned)
    for question in ("Where is the red pill?", "Where is the purple tablet?", "Where is the small bottle?"):
        answer = assistant.ask(question, Sampling(max_new_tokens=60))
        assert answer.finished and answer.tokens < 25, answer
        assert "cabinet" in answer.text


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@torch.no_grad()
def test_the_adapter_gives_the_same_logits_in_plain_peft(tuned: Path, embedded: Path) -> None:
    """Outside medlora: Transformers, PEFT and bitsandbytes alone, on the files as they were saved."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    def outside(**kwargs: Any) -> Any:
        base = AutoModelForCausalLM.from_pretrained(embedded, device_map={"": "cpu"}, **kwargs)
        return PeftModel.from_pretrained(base, tuned).eval()

    tokenizer = AutoTokenizer.from_pretrained(tuned)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is the red pill?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    exact = Assistant.load(tuned, Base(quantization="none", compute_dtype="float32")).model(ids).logits
    theirs = outside(dtype=torch.float32)
    torch.testing.assert_close(exact, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    with theirs.disable_adapter():
        assert distance(theirs(ids).logits, exact) > 0.05  # the adapter does something

    # in 4-bit and bfloat16 two orders of summation differ by rounding, no more than rounding itself moves ours
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    ours = Assistant.load(tuned, Base(compute_dtype="bfloat16")).model(ids).logits
    rounding = distance(ours, Assistant.load(tuned, Base(compute_dtype="float32")).model(ids).logits)
    in_four_bits = outside(quantization_config=config, dtype=torch.bfloat16)(ids).logits
    assert distance(ours, in_four_bits) < 2 * rounding
    assert torch.equal(ours[0, -1].argmax(), in_four_bits[0, -1].argmax())


def test_untuned_answers_come_from_the_same_loaded_base(tuned: Path, embedded: Path) -> None:
    settings = Sampling(max_new_tokens=12)
    both = Assistant.load(tuned)
    assert both.ask("Hello", settings, tuned=False).text == Assistant.load().ask("Hello", settings).text
    assert (
        both.ask("Where is the red pill?", settings).text
        != both.ask("Where is the red pill?", settings, tuned=False).text
    )


def test_greedy_answers_are_those_of_transformers_generate(embedded: Path) -> None:
    assistant: Any = Assistant.load(base=Base(compute_dtype="float32"))  # in bfloat16 ties fall either way
    from medlora.data.prompts import prompt_ids

    for question in ("What is gout?", "Name three vitamins."):
        ids = torch.tensor([prompt_ids(assistant.tokenizer, [("user", question)])])
        out = assistant.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        expected = assistant.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert assistant.ask(question, Sampling(max_new_tokens=24)).text == expected


def test_the_stream_adds_up_to_the_answer_and_seeds_repeat(embedded: Path) -> None:
    assistant = Assistant.load()
    settings = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.9, seed=7)
    streamed = "".join(assistant.stream([("user", "Tell me about µ and 漢字")], settings)).strip()
    assert streamed == assistant.answer([("user", "Tell me about µ and 漢字")], settings).text
    other = assistant.answer([("user", "Tell me about µ and 漢字")], settings.override(seed=8)).text
    assert other != streamed
