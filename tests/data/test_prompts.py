"""Templates, masks and lengths, against strings written by hand."""

from pathlib import Path
from typing import Any

import pytest

from medlora.data.prompts import IGNORE, Example, encode, fit, prepare_tokenizer, prompt_ids, render
from medlora.data.sources import Record
from medlora.errors import DataError, RecipeError
from medlora.recipe import Prompt

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer(llama_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama_folder)


def chat(*turns: str) -> Record:
    roles = ("user", "assistant")
    return Record("r:1", None, tuple((roles[i % 2], turn) for i, turn in enumerate(turns)), "g")


def test_llama2_renders_as_published(tokenizer: Any) -> None:
    prepare_tokenizer(tokenizer, Prompt(template="llama2"))
    turns = [("user", "What is gout?"), ("assistant", "Arthritis."), ("user", "Why?")]
    assert render(tokenizer, turns, ask=True) == "<s>[INST] What is gout? [/INST] Arthritis. </s><s>[INST] Why? [/INST]"
    prepare_tokenizer(tokenizer, Prompt(template="llama2", system="Be brief; it's true."))
    assert render(tokenizer, turns[:1], ask=True) == (
        "<s>[INST] <<SYS>>\nBe brief; it's true.\n<</SYS>>\n\nWhat is gout? [/INST]"
    )


def test_completion_mask_covers_the_answer_and_the_end_token_although_pad_is_eos(tokenizer: Any) -> None:
    prompt = Prompt(template="llama2")
    prepare_tokenizer(tokenizer, prompt)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.padding_side == "right"
    (example,) = encode(tokenizer, [chat("What is gout?", "Gout is a form of arthritis.")], prompt)
    trained = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE]
    assert tokenizer.decode(trained).strip() == "Gout is a form of arthritis. </s>"
    assert example.labels[-1] == tokenizer.eos_token_id
    asked = prompt_ids(tokenizer, [("user", "What is gout?")])
    assert example.input_ids[: len(asked)] == asked  # generation sees what training saw
    assert example.labels[: len(asked)] == [IGNORE] * len(asked)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


def test_every_answer_of_a_conversation_is_trained_and_no_question(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    prompt = Prompt(template="base")
    prepare_tokenizer(tokenizer, prompt)
    (example,) = encode(tokenizer, [chat("Gout?", "Arthritis.", "Asthma?", "The airways.")], prompt)
    trained = tokenizer.decode([label for label in example.labels if label != IGNORE])
    assert "Arthritis" in trained and "airways" in trained and "?" not in trained and "user" not in trained
    assert trained.count("</s>") == 2
    assert example.input_ids[-1] == tokenizer.eos_token_id  # the newline behind it is never asked for


def test_loss_on_all_trains_everything_but_the_first_token(tokenizer: Any) -> None:
    prompt = Prompt(template="llama2", loss_on="all")
    prepare_tokenizer(tokenizer, prompt)
    (example,) = encode(tokenizer, [chat("What is gout?", "Arthritis.")], prompt)
    assert example.labels == [IGNORE, *example.input_ids[1:]]


@pytest.mark.parametrize("text", ["<s>[INST] Gout? [/INST] Arthritis. </s>", "[INST] Gout? [/INST] Arthritis."])
def test_raw_text_has_one_bos_and_one_eos(tokenizer: Any, text: str) -> None:
    prompt = Prompt(template="llama2", loss_on="all")
    prepare_tokenizer(tokenizer, prompt)
    (example,) = encode(tokenizer, [Record("r:1", text, (), "g")], prompt)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids.count(tokenizer.eos_token_id) == 1 and example.labels[-1] == tokenizer.eos_token_id


def test_raw_text_stays_whole_under_a_tokenizer_that_ends_every_text(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    (bos, _), (eos, _) = ends
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ends)
    prompt = Prompt(template="llama2", loss_on="all")
    prepare_tokenizer(tokenizer, prompt)
    (example,) = encode(tokenizer, [Record("r:1", "Gout is arthritis.", (), "g")], prompt)
    assert example.input_ids == tokenizer("Gout is arthritis.").input_ids and len(example.input_ids) > 5
    assert tokenizer.decode(example.input_ids[1:-1]).strip() == "Gout is arthritis."


def test_raw_text_in_inst_form_can_train_its_answer_alone(tokenizer: Any) -> None:
    prompt = Prompt(template="llama2", loss_on="completion")
    prepare_tokenizer(tokenizer, prompt)
    (marked,) = encode(tokenizer, [Record("r:1", "<s>[INST] Gout? [/INST] Arthritis. </s>", (), "g")], prompt)
    (paired,) = encode(tokenizer, [chat("Gout?", "Arthritis.")], prompt)
    assert (marked.input_ids, marked.labels) == (paired.input_ids, paired.labels)
    with pytest.raises(DataError, match=r"r:1: prompt.loss_on is `completion`.*marks no answer"):
        encode(tokenizer, [Record("r:1", "no answer is marked", (), "g")], prompt)


@pytest.mark.parametrize("backed", [True, False])
def test_many_rows_are_the_ids_that_each_has_alone(
    backed: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tokenizer last cut or padded, and where it is no fast one."""
    alone, whole = ["Gout.", "é 関節 <s>", "", "a </s> b  c"], Prompt(loss_on="all")
    expected = [tokenizer(text)["input_ids"] for text in alone]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a b c d"], truncation=True, max_length=2, padding="max_length")
    if not backed:
        monkeypatch.setattr(type(tokenizer), "backend_tokenizer", None)
    records = [Record(f"r:{i}", text, (), "g") for i, text in enumerate(alone)]
    found = [example.input_ids for example in encode(tokenizer, records, whole)]
    eos = tokenizer.eos_token_id
    assert found[:3] == [[*ids, eos] for ids in expected[:3]] and len(found[1]) > 3
    assert found[3] == expected[3][: expected[3].index(eos) + 1]


def test_a_base_without_a_template_says_what_to_do(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="set prompt.template=llama2"):
        prepare_tokenizer(tokenizer, Prompt(template="base"))


def test_turns_out_of_order_are_refused_by_the_template(tokenizer: Any) -> None:
    prompt = Prompt(template="llama2")
    prepare_tokenizer(tokenizer, prompt)
    record = Record("r:7", None, (("user", "a"), ("user", "b"), ("assistant", "c")), "g")
    with pytest.raises(DataError, match="r:7: .*alternate"):
        encode(tokenizer, [record], prompt)


LONG = Example("r:1", list(range(10)), [IGNORE] * 4 + list(range(4, 10)))
SHORT = Example("r:2", [1, 2, 3], [IGNORE, 2, 3])


def test_long_rows_are_dropped_truncated_or_refused_and_counted() -> None:
    dropped = fit([LONG, SHORT], 8, "drop")
    assert (dropped.examples, dropped.long) == ([SHORT], 1)
    cut = fit([LONG, SHORT], 8, "truncate")
    assert cut.examples[0].input_ids == list(range(8)) and cut.long == 1
    with pytest.raises(DataError, match=r"r:1: 10 tokens, more than data.max_length \(8\); 1 such rows"):
        fit([LONG, SHORT], 8, "error")


def test_split_repeats_the_prompt_and_loses_no_answer_token() -> None:
    pieces = fit([LONG], 6, "split").examples
    assert [p.input_ids for p in pieces] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7], [0, 1, 2, 3, 8, 9]]
    assert [label for p in pieces for label in p.labels if label != IGNORE] == [4, 5, 6, 7, 8, 9]
    everything = Example("r:3", list(range(7)), [IGNORE, *range(1, 7)])
    windows = fit([everything], 3, "split")
    assert [p.input_ids for p in windows.examples] == [[0, 1, 2], [3, 4, 5]]  # a lone token predicts nothing
    assert windows.long == 2


def test_all_labels_masked_fails_and_names_the_rows() -> None:
    with pytest.raises(DataError, match=r"all 1 rows have no answer token left.*r:1"):
        fit([LONG], 4, "truncate")
    with pytest.raises(DataError, match=r"all 1 rows are longer than data.max_length \(4\): r:1"):
        fit([LONG], 4, "drop")
