"""`medlora evaluate` from a run folder to item files: both sides, resumable, bad input refused before a model loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medlora.data.build import build
from medlora.evaluate import run as runs
from medlora.evaluate.loss import held_out_loss
from medlora.generate.answer import Assistant
from medlora.recipe import load_recipe
from medlora.train import run as training

CHOICES = [
    {"id": f"q{i}", "question": f"What is {word}?", "options": ["a disease of the joints", "a worm"], "answer": i % 2}
    for i, word in enumerate(["gout", "ascariasis", "asthma", "the spleen"])
]
Lines = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    rows = [
        {"focus": f"T{i}", "qtype": "treatment", "prompt": f"Question {i}: how is it treated?",
         "completion": f"With rest and {i} mg of iron, twice."}
        for i in range(24)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, CHOICES)))
    (folder / "r.yaml").write_text(
        f"name: toy\nbase: {{model: {llama_folder}, compute_dtype: float32}}\nprompt: {{template: llama2}}\n"
        f"data: {{path: {folder / 'rows.jsonl'}, group: focus, valid_fraction: 0.3, max_length: 128}}\n"
        "training: {max_steps: 3, learning_rate: 1e-2}\nlora: {r: 4, lora_dropout: 0.0, target_modules: all-linear}\n"
        "evaluation: {before_and_after: false}\ngeneration: {max_new_tokens: 6}\n"
    )
    return training.train(load_recipe(folder / "r.yaml"), folder / "run", lambda line: None).folder


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> Path:
    sources = {"choices": str(trained.parent / "choices.jsonl")}
    names = ("heldout", "answers", "choices", "general_text")
    return runs.evaluate(trained, names, sources, limit=5, letters=True, say=lambda line: None)


def read(folder: Path) -> Lines:
    return {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in folder.glob("*.jsonl")}


def test_every_task_and_side_has_its_file_of_complete_items(evaluated: Path) -> None:
    found = read(evaluated)
    kinds = {
        "heldout": "loss",
        "general_text": "loss",
        "answers": "answer",
        "choices": "choice",
        "choices_letters": "letter",
    }
    assert set(found) == {f"{task}.{side}" for task in kinds for side in ("untuned", "tuned")}
    for name, (header, *items) in found.items():
        task, side = name.split(".")
        assert (header["task"], header["side"], header["kind"]) == (task, side, kinds[task])
        assert (header["adapter_sha256"] is None) == (side == "untuned")
        assert len(items) == min(5, header["settings"]["items"]) > 0
        assert all({"id", "prompt", "group"} <= item.keys() for item in items)
    assert found["answers.tuned"][1]["claims"].keys() == {"precision", "recall", "missing", "extra", "matched"}
    assert found["heldout.tuned"][1]["group"].keys() == {"qtype", "topic"}
    assert found["choices.tuned"][1]["lengths"] == [23, 6]
    overlap = json.loads((evaluated / "overlap.json").read_text())
    assert overlap["general_text"].keys() == {item["id"] for item in found["general_text.tuned"][1:]}


def test_the_sides_differ_and_their_loss_is_that_of_training(trained: Path, evaluated: Path) -> None:
    recipe = load_recipe(trained / "recipe.yaml")
    assistant = Assistant.load(trained / "adapter")
    rows = build(recipe, assistant.tokenizer).valid[:5]
    losses = {}
    for side, (_, *items) in ((s, read(evaluated)[f"heldout.{s}"]) for s in ("untuned", "tuned")):
        losses[side] = sum(item["nll"] for item in items) / sum(item["tokens"] for item in items)
    assert losses["tuned"] == pytest.approx(held_out_loss(assistant.model, rows).loss, rel=1e-4)
    with assistant.model.disable_adapter():
        assert losses["untuned"] == pytest.approx(held_out_loss(assistant.model, rows).loss, rel=1e-4)
    assert losses["tuned"] < losses["untuned"] - 0.01


def test_bytes_count_what_the_completion_says(trained: Path, evaluated: Path) -> None:
    rows = [json.loads(text) for text in (trained.parent / "rows.jsonl").read_text().splitlines()]
    for item in read(evaluated)["heldout.tuned"][1:]:
        row = rows[int(item["id"]) - 1]
        assert item["bytes"] == len(row["completion"].encode()) and row["prompt"] in item["prompt"]
        assert row["completion"] not in item["prompt"]


def test_an_interrupted_evaluation_goes_on_and_scores_nothing_twice(
    trained: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = evaluated / "choices.tuned.jsonl"
    whole = file.read_text()
    file.write_text("\n".join(whole.splitlines()[:3]) + '\n{"id": "q2", "pro')
    asked: list[int] = []
    original = runs.score_task

    def counting(assistant: Any, recipe: Any, task: Any, store: Any, **side: Any) -> None:
        asked.append(len(task.items) - len(store.done))
        original(assistant, recipe, task, store, **side)

    monkeypatch.setattr(runs, "score_task", counting)
    runs.evaluate(
        trained, ["choices"], {"choices": str(trained.parent / "choices.jsonl")}, limit=5, say=lambda line: None
    )
    assert asked == [0, 2]
    for old, new in zip(whole.splitlines(), file.read_text().splitlines(), strict=True):
        old_item, new_item = json.loads(old), json.loads(new)
        assert old_item.pop("loglikelihoods", []) == pytest.approx(new_item.pop("loglikelihoods", []), abs=1e-4)
        assert old_item == new_item


def test_the_command_ends_with_verdicts(trained: Path, evaluated: Path, call: Callable[..., Any]) -> None:
    data = f"choices={trained.parent / 'choices.jsonl'}"
    code, out, _ = call("evaluate", trained, "--tasks", "choices,heldout", "--data", data, "--limit", 5, "--offline")
    assert code == 0 and "perplexity" in out and "Calibration" in out and "no difference shown" in out
    code, out, _ = call("evaluate", trained, "--tasks", "choices", "--data", data, "--limit", 5, "--json")
    assert code == 0 and json.loads(out)["calibration"]["choices"]["tuned"]["ece"] >= 0


def test_one_sentence_for_every_wrong_call(
    trained: Path, evaluated: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_model(*arguments: object) -> None:
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr(Assistant, "load", no_model)
    data = f"choices={trained.parent / 'choices.jsonl'}"
    for arguments, code, said in (
        ((tmp_path,), 6, "not a run of medlora"),
        ((trained, "--tasks", "chess"), 3, "chess: no such task"),
        ((trained, "--data", "choices"), 3, "write it as TASK=PATH"),
        ((trained, "--data", "chess=x"), 3, "--data chess=...: no such task"),
        ((trained, "--tasks", "heldout", "--data", data), 3, "choices is not among --tasks"),
        ((trained, "--tasks", "choices", "--data", "choices=nowhere.jsonl"), 3, "nowhere.jsonl: no such file"),
    ):
        found = call("evaluate", *arguments)
        assert found[0] == code and said in found[2] and found[2].count("\n") == 1, (arguments, found)
