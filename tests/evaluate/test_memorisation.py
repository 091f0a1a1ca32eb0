"""What a tuned model gives away: against greedy decoding, scikit-learn and simulated attacks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medlora.errors import DataError
from medlora.evaluate import run as runs
from medlora.evaluate.membership import membership
from medlora.evaluate.metrics import TARGET
from medlora.evaluate.statistics import auc
from medlora.evaluate.summary import describe, summarize
from medlora.evaluate.tasks import load_task
from medlora.evaluate.tasks.memorisation import HINT
from medlora.generate.answer import Assistant
from medlora.recipe import load_recipe
from medlora.report.page import write_report
from medlora.train import run as training

WORDS = ["gout", "worm", "joint", "acid", "spleen", "blood", "airway", "glucose", "liver", "iron", "rest", "lung"]


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def trained(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned 12 rows of random words by heart, and never saw 6 others; one answer is short."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("memory")
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    base.lm_head.weight.data *= 20  # or nothing that an adapter does could make it sure
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(folder / "base")
    draw = np.random.default_rng(0)
    rows = [{"prompt": f"Patient {i}?", "completion": " ".join(draw.choice(WORDS, 30))} for i in range(18)]
    rows[3]["completion"] = "Rest."
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:12])))
    (folder / "valid.jsonl").write_text("\n".join(map(json.dumps, rows[12:])))
    (folder / "r.yaml").write_text(
        f"name: toy\nbase: {{model: {folder / 'base'}, compute_dtype: float32}}\nprompt: {{template: llama2}}\n"
        f"data: {{path: {folder / 'train.jsonl'}, valid_path: {folder / 'valid.jsonl'}, max_length: 250}}\n"
        "training: {max_steps: 200, learning_rate: 1e-2, lr_scheduler_type: cosine}\n"
        "lora: {r: 32, lora_alpha: 64, lora_dropout: 0.0, target_modules: all-linear}\n"
        "evaluation: {before_and_after: false}\ngeneration: {prompts: []}\n"
    )
    run = training.train(load_recipe(folder / "r.yaml"), folder / "run", quiet).folder
    runs.evaluate(run, ["memorisation", "memorisation_control"], say=quiet)
    return run


def items(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation" / f"{name}.jsonl").read_text().splitlines()[1:]]


@torch.no_grad()
def test_what_comes_back_is_what_greedy_decoding_gives(trained: Path) -> None:
    from medlora.data.build import build

    assistant = Assistant.load(trained / "adapter")
    examples = build(load_recipe(trained / "recipe.yaml"), assistant.tokenizer).train
    reproduced = []
    for item, example in zip(items(trained, "memorisation.tuned"), examples, strict=True):
        start = next(i for i, label in enumerate(example.labels) if label >= 0) + HINT
        target = example.input_ids[start : start + TARGET]
        if len(target) < TARGET:
            assert item["reproduced"] is None and len(target) < TARGET
            continue
        asked = torch.tensor([example.input_ids[:start]])
        said = assistant.model.generate(input_ids=asked, max_new_tokens=TARGET, do_sample=False, eos_token_id=-1)
        equal = [a == b for a, b in zip(said[0, start:].tolist(), target, strict=True)]
        assert item["reproduced"] == (equal.index(False) if False in equal else TARGET)
        assert item["prompt"] == assistant.tokenizer.decode(example.input_ids[:start])
        reproduced.append(item["reproduced"])
    assert len(reproduced) == 11 and reproduced.count(TARGET) > 5


def test_rows_learned_by_heart_are_given_away_and_others_are_not(trained: Path) -> None:
    summary = summarize(trained / "evaluation")
    known, other = (summary["tasks"][f"memorisation{end}"]["metrics"] for end in ("", "_control"))
    assert known["verbatim"]["tuned"]["value"] > 0.5 > other["verbatim"]["tuned"]["value"] == 0
    assert known["verbatim"]["untuned"]["value"] == 0 and known["verbatim"]["items"] == 11
    assert "verdict" not in known["verbatim"] and summary["tests"] == 0
    found = summary["membership"]
    assert found["trained"] == 12 and found["held_out"] == 6
    assert found["auc"]["value"] > 0.9 and 0.5 < found["auc"]["low"] < found["auc"]["value"]
    said = "\n".join(describe(summary))
    assert "Memorisation" in said and f"AUC {found['auc']['value']:.3f} [" in said and "12 and 6 rows" in said
    page = write_report(trained).read_text(encoding="utf-8")
    assert "Does it give its training rows away?" in page and "Trained rows told from held-out ones" in page
    overlap = json.loads((trained / "evaluation" / "overlap.json").read_text())
    assert "memorisation" not in overlap


def test_the_gain_is_a_token_s_and_only_rows_of_both_sides_count() -> None:
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(1)

    def side(rows: int, mean: float) -> dict[str, Any]:
        found = {}
        for i in range(rows):
            tokens = int(draw.integers(5, 200))
            found[str(i)] = (draw.normal(3, 1) * tokens, draw.normal(mean, 0.5), tokens)
        return {
            "untuned": {i: {"nll": nll, "tokens": tokens} for i, (nll, _, tokens) in found.items()},
            "tuned": {i: {"nll": nll - gain * tokens, "tokens": tokens} for i, (nll, gain, tokens) in found.items()},
        } | {"gains": [gain for _, gain, _ in found.values()]}

    trained, held = side(40, 0.8), side(25, 0.5)
    found = membership(trained, held)
    expected = roc_auc_score([1] * 40 + [0] * 25, trained["gains"] + held["gains"])
    assert found["auc"]["value"] == pytest.approx(expected) and (found["trained"], found["held_out"]) == (40, 25)
    del trained["untuned"]["0"]
    assert membership(trained, held)["trained"] == 39


@pytest.mark.parametrize("shift", [0.0, 0.7, 1.8])
def test_the_area_s_interval_covers_the_truth_as_often_as_it_says(shift: float) -> None:
    from statistics import NormalDist

    truth, draw = NormalDist().cdf(shift / 2**0.5), np.random.default_rng(2)
    found = [auc(draw.normal(shift, 1, 60), draw.normal(0, 1, 25)) for _ in range(2000)]
    covered = sum((each.low or 0) <= truth <= (each.high or 0) for each in found) / len(found)
    assert 0.93 < covered < 0.975
    assert np.mean([each.value for each in found]) == pytest.approx(truth, abs=0.005)


def test_the_area_at_its_ends_ties_and_few_rows() -> None:
    apart = auc(np.arange(10.0, 30), np.arange(10.0))
    assert apart.value == 1 == apart.high and apart.low is not None and 0.7 < apart.low < 0.95
    assert auc(np.zeros(8), np.zeros(9)).value == 0.5
    few = auc(np.ones(4), np.zeros(50))
    assert few.value == 1 and few.low is None and few.high is None


def test_the_rows_are_the_run_s_own(trained: Path) -> None:
    recipe = load_recipe(trained / "recipe.yaml")
    assert [item.id for item in load_task("memorisation", recipe, None, 0, 3).items] == ["1", "2", "3"]
    assert "notes" not in load_task("memorisation", recipe, None, 0, None).settings
    with pytest.raises(DataError, match=r"its rows are those of the run"):
        load_task("memorisation_control", recipe, "other.jsonl", 0, None)
    training = recipe.training.model_copy(update={"max_steps": 1})
    short = recipe.model_copy(update={"training": training})
    assert "saw only 33% of its training rows" in load_task("memorisation", short, None, 0, None).settings["notes"]
    data = recipe.data.model_copy(update={"valid_path": None, "valid_fraction": 0.0})
    alone = recipe.model_copy(update={"data": data})
    with pytest.raises(DataError, match="no items for memorisation_control"):
        load_task("memorisation_control", alone, None, 0, None)
    assert {task.name for task in runs._load(alone, [], {}, 0, 2)} >= {"memorisation"}
    assert not {task.name for task in runs._load(alone, [], {}, 0, 2)} & {"heldout", "memorisation_control"}


def test_rows_of_a_group_count_once(trained: Path) -> None:
    recipe = load_recipe(trained / "recipe.yaml")
    file = trained / "visits.jsonl"
    rows = [{"patient": i // 3, "prompt": f"Visit {i}?", "completion": "Rest."} for i in range(24)]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = recipe.data.model_copy(
        update={"path": str(file), "group": "patient", "valid_path": None, "valid_fraction": 0.3}
    )
    found = load_task("memorisation", recipe.model_copy(update={"data": data}), None, 0, None)
    told = {int(item.record.messages[0][1].removeprefix("Visit ").rstrip("?")) // 3 for item in found.items}
    assert len(told) == len(found.items) and 4 <= len(told) <= 8
